"""The space that a latent diffusion model lives in: its first stage, and the scale of the latents.

Shapes: images x (B, 3, H, W) in about [-1, 1]; latents z (B, c, h, w).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from ldm.models.autoencoder import VQModelInterface
from ldm.models.diffusion.tiling import check_params, tiled, tiled_encode
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution


class LatentSpace(nn.Module):
    """What `LatentDiffusion` does with its `first_stage_model`; latents are multiplied by `scale_factor`."""

    _split_input_params: Mapping[str, Any] | None = None

    @torch.no_grad()
    def encode_first_stage(self, x: torch.Tensor) -> Any:
        """What the first stage says of images (B, 3, H, W): a posterior, or latents."""
        split = self.split_input_params
        if split and split.get("patch_distributed_vq"):
            return tiled_encode(self.first_stage_model.encode, x, split)
        return self.first_stage_model.encode(x)

    def get_first_stage_encoding(self, encoder_posterior: Any) -> torch.Tensor:
        """Scaled latents from the result of `encode_first_stage`; a posterior is sampled."""
        if isinstance(encoder_posterior, DiagonalGaussianDistribution):
            encoder_posterior = encoder_posterior.sample()
        if not isinstance(encoder_posterior, torch.Tensor):
            raise TypeError(f"cannot take latents from a {type(encoder_posterior).__name__}")
        return self.scale_factor * encoder_posterior

    @torch.no_grad()
    def decode_first_stage(
        self, z: torch.Tensor, predict_cids: bool = False, force_not_quantize: bool = False
    ) -> torch.Tensor:
        """Images (B, 3, H, W) in about [-1, 1] from scaled latents, or with `predict_cids` from codebook logits."""
        return self.differentiable_decode_first_stage(z, predict_cids, force_not_quantize)

    def differentiable_decode_first_stage(
        self, z: torch.Tensor, predict_cids: bool = False, force_not_quantize: bool = False
    ) -> torch.Tensor:
        """`decode_first_stage` with gradients."""
        if predict_cids:
            indices = z.argmax(dim=1)
            shape = (*indices.shape, self.first_stage_model.embed_dim)
            z = self.first_stage_model.quantize.get_codebook_entry(indices.reshape(-1), shape=shape)
        z = (z / self.scale_factor).to(next(self.first_stage_model.parameters(), z).dtype)
        decode = self.first_stage_model.decode
        if isinstance(self.first_stage_model, VQModelInterface):
            decode = partial(decode, force_not_quantize=predict_cids or force_not_quantize)
        split = self.split_input_params
        if split and split.get("patch_distributed_vq"):
            return tiled(decode, [z], split, split["vqf"])
        return decode(z)

    @property
    def downsampling(self) -> int:
        """Pixels that one latent stands for, in each direction."""
        decoder = getattr(self.first_stage_model, "decoder", None)
        return 1 if decoder is None else 2 ** (len(decoder.up) - 1)

    @property
    def split_input_params(self) -> Mapping[str, Any] | None:
        """How to tile large pictures, see `tiling`; None for not at all."""
        return self._split_input_params

    @split_input_params.setter
    def split_input_params(self, params: Mapping[str, Any] | None) -> None:
        if params is not None:
            check_params(params)
        self._split_input_params = params
