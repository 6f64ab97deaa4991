"""In-painting: fill the masked part of an image (arXiv:2112.10752, section 4.5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Unpack

from ldm.config.model_info import ModelInfo
from ldm.errors import UserError
from ldm.models.diffusion.batch_keys import MASK_KEY, MASKED_KEY
from ldm.pipelines.pipeline import Conditioned, check_count
from ldm.pipelines.tiled import TiledPipeline

if TYPE_CHECKING:
    import numpy as np

    from ldm.pipelines.inputs import ImageLike
    from ldm.pipelines.run import SamplerOptions


@dataclass(frozen=True, eq=False)
class MaskedImage:
    """Request of in-painting: an image (H, W, 3) uint8, and a mask (H, W) bool, True where it is to be filled.

    Raises:
        UserError: Image and mask differ in size, or the mask is False everywhere.
    """

    image: np.ndarray
    mask: np.ndarray

    def __post_init__(self) -> None:
        (height, width), (h, w) = self.image.shape[:2], self.mask.shape
        if (height, width) != (h, w):
            raise UserError(f"the mask has {w} × {h} pixels, its image {width} × {height}; make them equal")
        if not self.mask.any():
            raise UserError("the mask is black everywhere: there is nothing to fill")


@dataclass(frozen=True, kw_only=True)
class Inpainting(TiledPipeline):
    """Pipeline that fills masked parts of images; all other pixels keep their values. A request is a `MaskedImage`.

    Args:
        feather: pixels inside the edge of the mask over which the filling fades in.
        tile: side in pixels of the overlapping tiles that larger images are sampled in; 0 samples them whole.
    """

    feather: int = 0

    def check(self, info: ModelInfo) -> None:
        """See `Pipeline.check`."""
        info.check_condition(MASKED_KEY, "an in-painting")
        super().check(info)
        check_count("feather", self.feather)

    def batch_key(self, request: MaskedImage) -> tuple[int, ...]:
        """Return the image size."""
        return request.mask.shape

    def condition(self, model: Any, requests: Sequence[MaskedImage]) -> Conditioned:
        """See `Pipeline.condition`."""
        import torch

        from ldm.io.pixels import pad_to_multiple, to_batch

        multiple = model.downsampling * model.model.diffusion_model.downsampling
        image = to_batch([pad_to_multiple(each.image, multiple) for each in requests]).to(model.device, model.dtype)
        masks = [torch.from_numpy(pad_to_multiple(each.mask, multiple)) for each in requests]
        mask = torch.stack(masks)[:, None].to(image) * 2.0 - 1.0
        masked_image = torch.where(mask > 0, -1.0, image)  # black, as in training
        cond = model.get_learned_conditioning({MASKED_KEY: masked_image, MASK_KEY: mask})
        return Conditioned(tuple(cond.shape[2:]), cond, tile=self.latent_tile(model))

    def finish(self, requests: Sequence[MaskedImage], images: np.ndarray) -> list[np.ndarray]:
        """Return the requested images with their masked parts filled."""
        return [blend(each, filling, self.feather) for each, filling in zip(requests, images, strict=True)]


def inpaint(
    model: Any,
    images: ImageLike | Sequence[ImageLike],
    masks: ImageLike | Sequence[ImageLike],
    *,
    feather: int = 0,
    tile: int = 0,
    steps: int = 50,
    **options: Unpack[SamplerOptions],
) -> list[Any]:
    """Fill the masked part of each image; all other pixels keep their values, bit for bit.

    Args:
        model: an in-painting model, such as `ldm.load("emoji64-inpaint")`.
        images: PIL images, arrays or tensors of any size.
        masks: one for each image, or one for all: white, 1 or True where the image is filled; see
            `ldm.pipelines.inputs.as_mask`.
        feather: pixels inside the edge of the mask over which the filling fades in.
        tile: side in pixels of the overlapping tiles that larger images are sampled in; 0 samples them whole.
        steps: number of sampler steps.
        **options: `seed`, `sampler`, `eta`, `batch_size`, `latents`, `output_type`, `progress`, `callback`, `device`,
            `precision`; see `ldm.pipelines.run.SamplerOptions`.

    Returns:
        PIL images, or what `output_type` names.

    Raises:
        UserError: The model does not fill images, or a mask does not suit its image.
    """
    from ldm.pipelines.inputs import as_list, as_mask, as_pixels, broadcast
    from ldm.pipelines.run import run, split_options

    sampler, rest = split_options(options)
    pipeline = Inpainting(feather=feather, tile=tile, steps=steps, **sampler)
    pixels = [as_pixels(image) for image in as_list(images)]
    own_masks = [as_mask(mask) for mask in _as_masks(masks, len(pixels))]
    if len(pixels) == 1:
        pixels = pixels * len(own_masks)
    own_masks = broadcast(own_masks, len(pixels), "masks")
    return run(pipeline, model, [MaskedImage(*each) for each in zip(pixels, own_masks, strict=True)], **rest)


def _as_masks(masks: Any, count: int) -> list[Any]:
    """Return a list of masks; an array (B, H, W) is a batch if it has one mask for each of `count` images."""
    from ldm.pipelines.inputs import as_list

    return list(masks) if getattr(masks, "ndim", 0) == 3 and len(masks) == count else as_list(masks)


def blend(request: MaskedImage, filling: np.ndarray, feather: int) -> np.ndarray:
    """Return the image with `filling` (at least H × W) inside its mask; pixels outside keep their values."""
    import numpy as np

    height, width = request.mask.shape
    weight = edge_weights(request.mask, feather)[..., None]
    mixed = (1.0 - weight) * request.image + weight * filling[:height, :width]
    return np.where(request.mask[..., None], mixed.round().astype(np.uint8), request.image)


def edge_weights(mask: np.ndarray, feather: int) -> np.ndarray:
    """Return weights (H, W): 0 outside the mask, rising to 1 inside it over `feather` pixels from its edge."""
    import torch
    from torch.nn import functional as F

    outside = 1.0 - torch.from_numpy(mask).float()[None, None]
    weight = 1.0 - outside
    for _ in range(feather):
        outside = F.max_pool2d(outside, 3, stride=1, padding=1)
        weight += 1.0 - outside
    return (weight / (feather + 1))[0, 0].numpy()
