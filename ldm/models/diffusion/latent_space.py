"""Latent space of a diffusion model: its first stage and the scale of its latents.

Shapes: images x (B, 3, H, W) in about [-1, 1]; latents z (B, c, h, w).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import nn

from ldm.config.instantiate import instantiate_from_config
from ldm.errors import UserError
from ldm.io.batch_items import describe_items
from ldm.io.pixels import in_random_colours
from ldm.models.autoencoder import Autoencoder, VQModelInterface
from ldm.models.diffusion.tiling import TilingMethods, check_params, tiled, tiled_encode
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.frozen import freeze
from ldm.modules.precision import retry_in_float32

# Share of the largest latent below which a standard deviation is that of rounding errors.
CONSTANT = 1e-5


def encode_in_range(first_stage: nn.Module, encode: Callable[[torch.Tensor], Any], x: torch.Tensor) -> Any:
    """Return `encode(x)`; images that overflow in half precision are encoded again in float32.

    Args:
        first_stage: the weights that `encode` uses.
        encode: maps images (B, 3, H, W) to a posterior or to latents.
        x: (B, 3, H, W).
    """
    encoding = encode(x)
    if isinstance(encoding, DiagonalGaussianDistribution):
        moments = retry_in_float32(first_stage, lambda images: encode(images).parameters, x, encoding.parameters)
        if moments is not encoding.parameters:
            return DiagonalGaussianDistribution(moments, encoding.deterministic)
    elif isinstance(encoding, torch.Tensor):
        return retry_in_float32(first_stage, encode, x, encoding)
    return encoding


def deviation(z: torch.Tensor, names: Sequence[str] = ()) -> torch.Tensor:
    """Return the standard deviation of the latents of a batch.

    Args:
        z: latents (B, c, h, w).
        names: names of the items, for the message.

    Raises:
        UserError: the latents are constant or not finite.
    """
    measured = z.flatten().std()
    if measured.isfinite() and measured > CONSTANT * z.abs().max():
        return measured
    finite = z.flatten(1).isfinite().all(dim=1).tolist()
    positions = [position for position, is_finite in enumerate(finite) if not is_finite] or range(len(z))
    reason = "constant" if all(finite) else "not finite"
    raise UserError(
        f"scale_by_std measures the latents of the first training batch, and those of "
        f"{describe_items(names, positions)} are {reason}; "
        "check these images, or give another --seed for another first batch"
    )


def measured_batches(scale_by_std: bool | Mapping[str, Any]) -> int:
    """Return the number of batches in which `scale_by_std` measures the latents: 1, or N of `{batches: N}`.

    Raises:
        UserError: it is neither a truth value nor such a mapping.
    """
    if not isinstance(scale_by_std, Mapping):
        return 1
    batches = scale_by_std.get("batches")
    if set(scale_by_std) != {"batches"} or not isinstance(batches, int) or isinstance(batches, bool) or batches < 1:
        raise UserError(f"scale_by_std must be true, false or {{batches: N}} with N of at least 1, not {scale_by_std}")
    return batches


class LatentSpace(TilingMethods, nn.Module):
    """Mixin of `LatentDiffusion`: encoding and decoding with `first_stage_model`, scaled by `scale_factor`."""

    first_stage_model: Any  # the configuration chooses its class
    scale_factor: torch.Tensor | float
    _split_input_params: Mapping[str, Any] | None = None

    def instantiate_first_stage(self, config: Mapping[str, Any]) -> None:
        """Build the first stage and freeze it."""
        self.first_stage_model = freeze(instantiate_from_config(config))

    @torch.no_grad()
    def to_rgb(self, x: torch.Tensor) -> torch.Tensor:
        """Convert maps (B, K, H, W) to images (B, 3, H, W) in [-1, 1], in random but fixed colours."""
        return in_random_colours(x.float(), getattr(self, "colorize", None))

    @torch.no_grad()
    def encode_first_stage(self, x: torch.Tensor) -> Any:
        """Encode images (B, 3, H, W) to the posterior or the latents of the first stage."""
        if isinstance(self.first_stage_model, Autoencoder):
            self.first_stage_model.check_channels(x)
        split = getattr(self, "split_input_params", None)
        if split and split.get("patch_distributed_vq"):
            encode = partial(tiled_encode, self.first_stage_model.encode, params=split)
        else:
            encode = self.first_stage_model.encode
        return encode_in_range(self.first_stage_model, encode, x)

    def get_first_stage_encoding(self, encoder_posterior: Any) -> torch.Tensor:
        """Return scaled latents for the result of `encode_first_stage`; a posterior is sampled.

        Raises:
            TypeError: an encoding that is neither a posterior nor a tensor.
        """
        if isinstance(encoder_posterior, DiagonalGaussianDistribution):
            encoder_posterior = encoder_posterior.sample()
        if not isinstance(encoder_posterior, torch.Tensor):
            raise TypeError(f"cannot take latents from a {type(encoder_posterior).__name__}")
        return self.scale_factor * encoder_posterior

    @torch.no_grad()
    def decode_first_stage(
        self, z: torch.Tensor, predict_cids: bool = False, force_not_quantize: bool = False
    ) -> torch.Tensor:
        """Decode scaled latents to images (B, 3, H, W) in about [-1, 1].

        Images that overflow in half precision are decoded again in float32.

        Args:
            z: scaled latents (B, c, h, w), or with `predict_cids` the logits of codebook indices (B, n_embed, h, w).
            predict_cids: decode the most likely entries of the codebook.
            force_not_quantize: do not quantize the latents of a VQ model.
        """
        decode = partial(
            self.differentiable_decode_first_stage, predict_cids=predict_cids, force_not_quantize=force_not_quantize
        )
        return retry_in_float32(self.first_stage_model, decode, z)

    def differentiable_decode_first_stage(
        self, z: torch.Tensor, predict_cids: bool = False, force_not_quantize: bool = False
    ) -> torch.Tensor:
        """Decode with gradients; see `decode_first_stage`."""
        if predict_cids:
            indices = z.argmax(dim=1)
            shape = (*indices.shape, self.first_stage_model.embed_dim)
            z = self.first_stage_model.quantize.get_codebook_entry(rearrange(indices, "b h w -> (b h w)"), shape=shape)
        z = (z / self.scale_factor).to(next(self.first_stage_model.parameters(), z).dtype)
        decode = self.first_stage_model.decode
        if isinstance(self.first_stage_model, VQModelInterface):
            decode = partial(decode, force_not_quantize=predict_cids or force_not_quantize)
        split = getattr(self, "split_input_params", None)
        if split and split.get("patch_distributed_vq"):
            return tiled(decode, [z], split, split["vqf"])
        return decode(z)

    @property
    def downsampling(self) -> int:
        """Downsampling factor f of the first stage: pixels per latent in each direction."""
        decoder = getattr(self.first_stage_model, "decoder", None)
        return 1 if decoder is None else 2 ** (len(decoder.up) - 1)

    @property
    def split_input_params(self) -> Mapping[str, Any]:
        """Parameters of tiled processing of large images, see `tiling`.

        Raises:
            AttributeError: it is disabled; published programs ask with `hasattr`.
        """
        if self._split_input_params is None:
            raise AttributeError("split_input_params")
        return self._split_input_params

    @split_input_params.setter
    def split_input_params(self, params: Mapping[str, Any] | None) -> None:
        if params is not None:
            check_params(params)
            self.check_tiling()
        self._split_input_params = params

    @split_input_params.deleter
    def split_input_params(self) -> None:
        self._split_input_params = None
