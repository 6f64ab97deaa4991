"""Reconstruction: encode images with a first stage and decode them again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from ldm.config.model_info import ModelInfo
from ldm.errors import UserError
from ldm.pipelines.pipeline import Pipeline

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.models.autoencoder import Autoencoder
    from ldm.pipelines.inputs import ImageLike
    from ldm.pipelines.run import RunOptions


@dataclass(frozen=True, kw_only=True)
class Reconstruction(Pipeline):
    """Pipeline that encodes images and decodes the mode of their posterior; a request is an image (H, W, 3) uint8.

    Args:
        size: side in pixels of the centred square that is used of each image; None uses whole images.
    """

    size: int | None = None

    def check_model(self, model: Any) -> None:
        """See `Pipeline.check_model`."""
        first_stage(model)

    def check(self, info: ModelInfo) -> None:
        """Do nothing: loading the first stage of a model checks that it has one."""

    def batch_key(self, request: np.ndarray) -> tuple[int, ...]:
        """Return the image size."""
        return request.shape

    def count_steps(self, request: np.ndarray, timesteps: int) -> int:
        """Return 1: a batch is encoded and decoded once."""
        return 1

    def sample(
        self, model: Any, requests: Sequence[np.ndarray], noise: Any, x_T: Tensor | None = None, on_step: Any = None
    ) -> Tensor:
        """Return the latents (B, C, h, w) of a batch of images, scaled if `model` is a latent diffusion model.

        The latents of a posterior are its mode.

        Raises:
            ValueError: Start noise is given.
        """
        from ldm.io.pixels import to_batch
        from ldm.modules.precision import retry_in_float32

        if x_T is not None:
            raise ValueError("reconstruction starts from images; leave out `latents`")
        stage = first_stage(model)
        padded = [_padded(image, 2 ** (len(stage.encoder.down) - 1)) for image in requests]
        latents = retry_in_float32(stage, partial(_encoded, stage), to_batch(padded).to(stage.device))
        if on_step is not None:
            on_step()
        return getattr(model, "scale_factor", 1.0) * latents.float()

    def decode(self, model: Any, requests: Sequence[np.ndarray], latents: Tensor) -> Sequence[np.ndarray | None]:
        """Return the reconstructed images, each (H, W, 3) float32 in [-1, 1], so that scores see no rounding.

        An image with values that are not finite is None.
        """
        from ldm.modules.precision import finite_items, retry_in_float32
        from ldm.pipelines.sampling import clamped

        height, width, _ = requests[0].shape
        stage = first_stage(model)
        latents = latents / getattr(model, "scale_factor", 1.0)
        decoded = retry_in_float32(stage, lambda z: stage.decode(z.to(stage.get_last_layer().dtype)), latents)
        images = clamped(decoded)[:, :, :height, :width]
        finite = finite_items(images).tolist()
        pixels = images.permute(0, 2, 3, 1).numpy()
        return [image if is_valid else None for image, is_valid in zip(pixels, finite, strict=True)]


def _encoded(stage: Any, images: Tensor) -> Tensor:
    """Return the latents of images; of a posterior its mode."""
    from ldm.modules.distributions.distributions import DiagonalGaussianDistribution

    encoded = stage.encode(images.to(stage.get_last_layer().dtype))
    if isinstance(encoded, tuple):  # quantized latents, codebook loss, indices
        encoded = encoded[0]
    return encoded.mode() if isinstance(encoded, DiagonalGaussianDistribution) else encoded


def first_stage(model: Any) -> Autoencoder:
    """Return the first stage of a latent diffusion model, and an autoencoder itself.

    Raises:
        UserError: `model` is neither.
    """
    stage = getattr(model, "first_stage_model", model)
    if not hasattr(stage, "encoder") or not hasattr(stage, "decode"):
        raise UserError(
            f"this {type(model).__name__} has no first stage; give an autoencoder, or a latent diffusion model"
        )
    return stage


def _padded(image: np.ndarray, factor: int) -> np.ndarray:
    """Return the image, mirrored at its lower and right border up to multiples of `factor`."""
    return np.pad(image, (*((0, -side % factor) for side in image.shape[:2]), (0, 0)), "reflect")


def reconstruct(model: Any, images: ImageLike | Sequence[ImageLike], **options: Unpack[RunOptions]) -> list[Any]:
    """Encode images with a first stage and decode them again.

    Args:
        model: an autoencoder, or a latent diffusion model, whose first stage is used.
        images: PIL images, arrays or tensors of any size.
        **options: `seed`, `batch_size`, `latents`, `output_type`, `progress`, `callback`, `device` and `precision`; see
            `ldm.pipelines.run.RunOptions`.

    Returns:
        PIL images, or what `output_type` names.
    """
    from ldm.pipelines.inputs import as_list, as_pixels
    from ldm.pipelines.run import run

    return run(Reconstruction(), model, [as_pixels(each) for each in as_list(images)], **options)
