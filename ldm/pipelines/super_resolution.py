"""Super-resolution: an image with several times as many pixels a side (arXiv:2112.10752, section 4.4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Unpack

from ldm.config.model_info import ModelInfo
from ldm.errors import UserError
from ldm.models.diffusion.batch_keys import LOW_RESOLUTION_KEY
from ldm.pipelines.pipeline import Conditioned
from ldm.pipelines.tiled import TiledPipeline

if TYPE_CHECKING:
    import numpy as np

    from ldm.pipelines.inputs import ImageLike
    from ldm.pipelines.run import RunOptions


@dataclass(frozen=True, kw_only=True)
class SuperResolution(TiledPipeline):
    """Pipeline that enlarges images; the model determines the factor. A request is an image (H, W, 3) uint8.

    Args:
        factor: pixels of the result over pixels of the request, a side; see `upscaling_factor`.
        tile: side in pixels, in the result, of the overlapping tiles that larger images are sampled in; 0 for none.
    """

    decoding_tile: ClassVar[int | None] = 128

    steps: int = 100
    eta: float = 1.0
    factor: int = 4

    def check(self, info: ModelInfo) -> None:
        """See `Pipeline.check`."""
        own = upscaling_factor(info)
        super().check(info)
        if self.factor != own:
            raise UserError(f'the model "{info.name}" enlarges {own} times, not {self.factor} times')

    def batch_key(self, request: np.ndarray) -> tuple[int, ...]:
        """Return the image size."""
        return request.shape

    def condition(self, model: Any, requests: Sequence[np.ndarray]) -> Conditioned:
        """See `Pipeline.condition`."""
        from ldm.io.pixels import pad_to_multiple, to_batch

        multiple = model.downsampling * model.model.diffusion_model.downsampling // self.factor
        images = to_batch([pad_to_multiple(image, multiple) for image in requests]).to(model.device, model.dtype)
        cond = model.get_learned_conditioning(images)
        return Conditioned(tuple(cond.shape[2:]), cond, tile=self.latent_tile(model))

    def finish(self, requests: Sequence[np.ndarray], images: np.ndarray) -> np.ndarray:
        """Return the images without their padding."""
        height, width = (self.factor * side for side in requests[0].shape[:2])
        return images[:, :height, :width]


def super_resolve(
    model: Any,
    images: ImageLike | Sequence[ImageLike],
    *,
    tile: int | None = None,
    steps: int = 100,
    sampler: str = "ddim",
    eta: float | None = None,
    **options: Unpack[RunOptions],
) -> list[Any]:
    """Enlarge images, typically four times a side, and sample the details that they lack.

    Args:
        model: a super-resolution model, such as `ldm.load("emoji64-superres")`.
        images: PIL images, arrays or tensors of any size.
        tile: side in pixels, in the result, of the overlapping tiles that larger images are sampled in; 0 samples them
            whole. Default: the size that the model was trained on.
        steps: number of sampler steps.
        sampler: "ddim", "plms", "dpm" or "ddpm".
        eta: noise of a DDIM step; default: 1 for DDIM, 0 for the other samplers.
        **options: `seed`, `batch_size`, `latents`, `output_type`, `progress`, `callback`, `device` and `precision`; see
            `ldm.pipelines.run.RunOptions`.

    Returns:
        PIL images, or what `output_type` names.

    Raises:
        UserError: The model does not enlarge images, or the tile does not suit it.
    """
    from ldm.pipelines.inputs import as_list, as_pixels
    from ldm.pipelines.run import run

    info = ModelInfo.of(model)
    if eta is None:
        eta = float(sampler == "ddim")
    pipeline = SuperResolution(
        sampler=sampler,
        steps=steps,
        eta=eta,
        factor=upscaling_factor(info),
        tile=default_tile(info) if tile is None else tile,
    )
    return run(pipeline, model, [as_pixels(image) for image in as_list(images)], **options)


def default_tile(info: ModelInfo) -> int:
    """Return the size that the model was trained on, in pixels."""
    return max(info.size.height, info.size.width)


def upscaling_factor(info: ModelInfo) -> int:
    """Return how many times a model enlarges: pixels of a latent over those of the small image at its position.

    Raises:
        UserError: The model does not enlarge images, or its conditioning stage is unknown.
    """
    info.check_condition(LOW_RESOLUTION_KEY, "a super-resolution")
    stage = info.params.get("cond_stage_config")
    target = stage.get("target") if isinstance(stage, Mapping) else stage
    if target not in ("torch.nn.Identity", "torch.nn.PixelUnshuffle"):
        raise UserError(
            f'the model "{info.name}" encodes small images with "{target}", so its upscaling factor is unknown; '
            "its cond_stage_config must be torch.nn.Identity or torch.nn.PixelUnshuffle"
        )
    pixels = 1 if target == "torch.nn.Identity" else int(stage["params"]["downscale_factor"])
    return info.size.factor // pixels
