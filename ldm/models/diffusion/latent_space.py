"""Latent space of a diffusion model: its first stage and the scale of its latents.

Shapes: images x (B, 3, H, W) in about [-1, 1]; latents z (B, c, h, w).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import nn

from ldm.models.autoencoder import VQModelInterface
from ldm.models.diffusion.tiling import check_params, tiled, tiled_encode
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution


class LatentSpace(nn.Module):
    """Mixin of `LatentDiffusion`: encoding and decoding with `first_stage_model`, scaled by `scale_factor`."""

    _split_input_params: Mapping[str, Any] | None = None

    @torch.no_grad()
    def encode_first_stage(self, x: torch.Tensor) -> Any:
        """Encode images (B, 3, H, W) to the posterior or the latents of the first stage."""
        split = self.split_input_params
        if split and split.get("patch_distributed_vq"):
            return tiled_encode(self.first_stage_model.encode, x, split)
        return self.first_stage_model.encode(x)

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

        Args:
            z: scaled latents (B, c, h, w), or with `predict_cids` the logits of codebook indices (B, n_embed, h, w).
            predict_cids: decode the most likely entries of the codebook.
            force_not_quantize: do not quantize the latents of a VQ model.
        """
        return self.differentiable_decode_first_stage(z, predict_cids, force_not_quantize)

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
        split = self.split_input_params
        if split and split.get("patch_distributed_vq"):
            return tiled(decode, [z], split, split["vqf"])
        return decode(z)

    @property
    def downsampling(self) -> int:
        """Downsampling factor f of the first stage: pixels per latent in each direction."""
        decoder = getattr(self.first_stage_model, "decoder", None)
        return 1 if decoder is None else 2 ** (len(decoder.up) - 1)

    @property
    def split_input_params(self) -> Mapping[str, Any] | None:
        """Parameters of tiled processing of large images, see `tiling`; None disables it."""
        return self._split_input_params

    @split_input_params.setter
    def split_input_params(self, params: Mapping[str, Any] | None) -> None:
        if params is not None:
            check_params(params)
        self._split_input_params = params
