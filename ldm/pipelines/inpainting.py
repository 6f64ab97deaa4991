"""In-painting: fill the masked part of an image (arXiv:2112.10752, section 4.5)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Unpack

from ldm.config.model_info import ModelInfo
from ldm.config.values import MASK_MODES
from ldm.errors import UserError, did_you_mean
from ldm.models.diffusion.batch_keys import MASK_KEY, MASKED_KEY
from ldm.pipelines.pipeline import Conditioned, check_count
from ldm.pipelines.text import text_settings, warn_prompts
from ldm.pipelines.tiled import TiledPipeline

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ldm.pipelines.inputs import ImageLike
    from ldm.pipelines.run import SamplerOptions

logger = logging.getLogger(__name__)

LARGEST_LOSS = 0.1  # share of a mask that may be lost at the size of the latents without a warning


@dataclass(frozen=True, eq=False)
class MaskedImage:
    """Request of in-painting: an image (H, W, 3) uint8, and a mask (H, W) bool, True where it is to be filled.

    The prompt is that of a model that fills images by a text.

    Raises:
        UserError: Image and mask differ in size, or the mask is False everywhere.
    """

    image: np.ndarray
    mask: np.ndarray
    prompt: str = ""

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
        mask_mode: reduction of a mask to the size of the latents. "nearest", as published, takes one pixel for each
            latent, so that thin strokes can vanish. With "max", each latent with a masked pixel is masked and hidden
            from the network with all its pixels; the result still changes inside the mask only.
        tile: side in pixels of the overlapping tiles that larger images are sampled in; 0 samples them whole.
    """

    feather: int = 0
    mask_mode: str = "nearest"

    def check(self, info: ModelInfo) -> None:
        """See `Pipeline.check`."""
        self.check_kind(info)
        super().check(info)
        check_count("feather", self.feather)
        if self.mask_mode not in MASK_MODES:
            near = did_you_mean(str(self.mask_mode), MASK_MODES)
            raise UserError(f'there is no mask_mode "{self.mask_mode}"{near}; choose {", ".join(MASK_MODES)}')

    def check_kind(self, info: ModelInfo) -> None:
        """Raise an error if the model is not conditioned as this pipeline does it.

        Raises:
            UserError: It is conditioned on something else.
        """
        info.check_condition(MASKED_KEY, "an in-painting")

    def batch_key(self, request: MaskedImage) -> tuple[int, ...]:
        """Return the image size."""
        return request.mask.shape

    def condition(self, model: Any, requests: Sequence[MaskedImage]) -> Conditioned:
        """See `Pipeline.condition`."""
        import torch

        image, mask = self.padded(model, requests)
        mask = mask * 2.0 - 1.0
        masked_image = torch.where(mask > 0, -1.0, image)  # black, as in training
        cond = model.get_learned_conditioning({MASKED_KEY: masked_image, MASK_KEY: mask})
        return Conditioned(tuple(cond.shape[2:]), cond, tile=self.latent_tile(model))

    def padded(self, model: Any, requests: Sequence[MaskedImage]) -> tuple[Tensor, Tensor]:
        """Return images (B, 3, H, W) in [-1, 1] and masks (B, 1, H, W) of 0 and 1, in sizes that suit the model."""
        import numpy as np
        import torch

        from ldm.io.pixels import pad_to_multiple, to_batch

        multiple = model.downsampling * model.model.diffusion_model.downsampling
        image = to_batch([pad_to_multiple(each.image, multiple) for each in requests]).to(model.device, model.dtype)
        masks = [pad_to_multiple(each.mask, multiple) for each in requests]
        if self.mask_mode == "max":
            masks = [whole_latents(mask, model.downsampling) for mask in masks]
        return image, torch.from_numpy(np.stack(masks))[:, None].to(image)

    def finish(self, requests: Sequence[MaskedImage], images: np.ndarray) -> list[np.ndarray]:
        """Return the requested images with their masked parts filled."""
        return [blend(each, filling, self.feather) for each, filling in zip(requests, images, strict=True)]


def inpaint(
    model: Any,
    images: ImageLike | Sequence[ImageLike],
    masks: ImageLike | Sequence[ImageLike],
    prompts: str | Sequence[str] = "",
    *,
    negative_prompt: str = "",
    scale: float | None = None,
    feather: int = 0,
    mask_mode: str = "nearest",
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
        prompts: one for all images, or one for each, for a model that fills images by a text.
        negative_prompt: text whose content guidance suppresses, for such a model.
        scale: guidance scale of such a model; default: 7.5.
        feather: pixels inside the edge of the mask over which the filling fades in.
        mask_mode: reduction of masks to the size of the latents: "nearest", as published, or "max", which keeps thin
            strokes; see `Inpainting`. A log line names masks of which "nearest" loses more than a tenth.
        tile: side in pixels of the overlapping tiles that larger images are sampled in; 0 samples them whole.
        steps: number of sampler steps.
        **options: `seed`, `sampler`, `eta`, `timestep_spacing`, `batch_size`, `latents`, `output_type`, `progress`,
            `callback`, `device`, `precision`; see `ldm.pipelines.run.SamplerOptions`.

    Returns:
        PIL images, or what `output_type` names.

    Raises:
        UserError: The model does not fill images, a mask does not suit its image, or the model reads no prompts.
    """
    from ldm.pipelines.inputs import as_list, as_mask, as_pixels, broadcast
    from ldm.pipelines.run import run, split_options

    sampler, rest = split_options(options)
    settings = {"feather": feather, "mask_mode": mask_mode, "tile": tile, "steps": steps, **sampler}
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    pipeline = inpainting_pipeline(ModelInfo.of(model), settings, texts, negative_prompt, scale)
    pixels = [as_pixels(image) for image in as_list(images)]
    own_masks = [as_mask(mask) for mask in _as_masks(masks, len(pixels))]
    if len(pixels) == 1:
        pixels = pixels * max(len(own_masks), len(texts))
    if mask_mode == "nearest":
        _warn_if_any_is_lost(own_masks, getattr(model, "downsampling", 1))
    own_masks = broadcast(own_masks, len(pixels), "masks")
    texts = broadcast(texts, len(pixels), "prompts")
    warn_prompts(model, texts, negative_prompt)
    requests = [MaskedImage(*each) for each in zip(pixels, own_masks, texts, strict=True)]
    return run(pipeline, model, requests, **rest)


def inpainting_pipeline(
    info: ModelInfo, settings: Mapping[str, Any], prompts: Sequence[str], negative_prompt: str, scale: float | None
) -> Inpainting:
    """Return the pipeline of a model: a `TextInpainting` if it fills images by a text.

    Args:
        info: facts about the model.
        settings: settings of both pipelines.
        prompts, negative_prompt, scale: see `inpaint`.

    Raises:
        UserError: The model fills no images, or it reads no text, and one is given.
    """
    from ldm.pipelines.text_inpainting import TextInpainting

    if not info.fills_by_text:
        Inpainting().check_kind(info)  # first, as a text-to-image model does read texts
    text = text_settings(info, info.fills_by_text, prompts, negative_prompt, scale)
    return TextInpainting(**settings, **text) if info.fills_by_text else Inpainting(**settings)


def _as_masks(masks: Any, count: int) -> list[Any]:
    """Return a list of masks; an array (B, H, W) is a batch if it has one mask for each of `count` images."""
    from ldm.pipelines.inputs import as_list

    return list(masks) if getattr(masks, "ndim", 0) == 3 and len(masks) == count else as_list(masks)


def whole_latents(mask: np.ndarray, factor: int) -> np.ndarray:
    """Return a mask (H, W) extended to all pixels of each latent, factor × factor of them, with a masked pixel."""
    height, width = mask.shape
    latents = mask.reshape(height // factor, factor, width // factor, factor).any(axis=(1, 3))
    return latents.repeat(factor, axis=0).repeat(factor, axis=1)


def lost_share(mask: np.ndarray, factor: int) -> float:
    """Return the share of a mask (H, W) that `mask_mode` "nearest" loses, in [0, 1].

    The share is the larger of two: of the area, and of the masked pixels that are far from each masked latent, which is
    neither their own nor one beside it. A thin diagonal stroke may keep its area and lose most of its length.
    """
    import numpy as np

    latents = mask[::factor, ::factor]
    near = np.pad(latents, 1)
    near = latents | near[2:, 1:-1] | near[:-2, 1:-1] | near[1:-1, 2:] | near[1:-1, :-2]
    kept, near = (
        each.repeat(factor, axis=0).repeat(factor, axis=1)[: mask.shape[0], : mask.shape[1]] for each in (latents, near)
    )
    count = mask.sum()
    return float(max(1.0 - kept.sum() / count, (mask & ~near).sum() / count, 0.0))


def loss_warning(name: str, mask: np.ndarray, factor: int, remedy: str) -> str | None:
    """Return a warning if `mask_mode` "nearest" loses more than a tenth of a mask, else None.

    Args:
        name: of the mask.
        mask: (H, W) bool, not empty.
        factor: pixels of a latent, a side.
        remedy: the option that keeps the mask.
    """
    share = lost_share(mask, factor)
    if share <= LARGEST_LOSS:
        return None
    return (
        f"{name} loses {100 * share:.0f} % of its area at the size of the latents ({factor} × {factor} pixels each), "
        f"which may come out dark; {remedy} keeps it"
    )


def _warn_if_any_is_lost(masks: Sequence[np.ndarray], factor: int) -> None:
    """Log a warning about the first mask of which `mask_mode` "nearest" loses more than a tenth."""
    named = [(f"mask {index}", mask) for index, mask in enumerate(masks) if mask.any()]
    warnings = [loss_warning(name, mask, factor, 'mask_mode="max"') for name, mask in named]
    lost = [warning for warning in warnings if warning is not None]
    if lost:
        logger.warning("%s%s", lost[0], f" (and {len(lost) - 1} more masks)" if len(lost) > 1 else "")


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

    outside = 1.0 - torch.tensor(mask).float()[None, None]
    weight = 1.0 - outside
    for _ in range(feather):
        outside = F.max_pool2d(outside, 3, stride=1, padding=1)
        weight += 1.0 - outside
    return (weight / (feather + 1))[0, 0].numpy()
