"""Conditioning stage of a latent diffusion model: from the entries of a batch to the conditioning of the network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ldm.config.instantiate import instantiate_from_config
from ldm.config.model_config import TEXT_KEYS
from ldm.io.pixels import batch_entry
from ldm.models.diffusion.batch_keys import CLASS_KEY, LAYOUT_KEY, MASK_KEY, MASKED_KEY
from ldm.models.diffusion.conditioning import map_tensors
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.frozen import freeze
from ldm.util import default


class ConditioningStage(nn.Module):
    """Mixin of `LatentDiffusion`: encoding and dropout of the conditioning with `cond_stage_model`."""

    def register_cond_schedule(self, num_timesteps_cond: int) -> None:
        """Register `cond_ids` (T,), the timesteps that a noised conditioning has at each timestep of the model."""
        self.num_timesteps_cond = num_timesteps_cond
        self.shorten_cond_schedule = num_timesteps_cond > 1
        if self.shorten_cond_schedule:
            ids = torch.full((self.num_timesteps,), self.num_timesteps - 1, dtype=torch.long)
            ids[:num_timesteps_cond] = torch.linspace(0, self.num_timesteps - 1, num_timesteps_cond).round().long()
            self.register_buffer("cond_ids", ids, persistent=False)

    def build_cond_stage(self, config: Mapping[str, Any] | str) -> nn.Module | None:
        """Return the conditioning stage, frozen unless it is trainable."""
        if config == "__is_first_stage__":
            return self.first_stage_model
        model = instantiate_from_config(config)
        return model if model is None or self.cond_stage_trainable else freeze(model)

    def get_learned_conditioning(self, c: Any) -> Any:
        """Encode texts, labels or images with the conditioning stage.

        Masked images {`masked_image`: (B, 3, H, W), `mask`: (B, 1, H, W) of -1 and 1} are concatenated with their
        mask, which is resized to the size of the encoding.
        """
        if isinstance(c, Mapping) and MASK_KEY in c:
            encoded = self.get_learned_conditioning(c[MASKED_KEY])
            mask = nn.functional.interpolate(c[MASK_KEY], size=encoded.shape[-2:])
            return torch.cat([encoded, mask.to(encoded)], dim=1)
        if self.cond_stage_forward is not None:
            return getattr(self.cond_stage_model, self.cond_stage_forward)(c)
        encode = getattr(self.cond_stage_model, "encode", None)
        encoded = encode(c) if callable(encode) else self.cond_stage_model(c)
        return encoded.mode() if isinstance(encoded, DiagonalGaussianDistribution) else encoded

    def raw_conditioning(self, batch: Mapping[str, Any], cond_key: str | None = None) -> Any:
        """Return the conditioning of a batch before it is encoded."""
        key = default(cond_key, self.cond_stage_key)
        if key == CLASS_KEY:
            return {key: batch_entry(batch, key).to(self.device)}
        if key == LAYOUT_KEY:
            return batch_entry(batch, key).to(self.device)
        if key in TEXT_KEYS:
            return batch_entry(batch, key)
        if key == MASKED_KEY:
            return {name: self.get_input(batch, name) for name in (MASKED_KEY, MASK_KEY)}
        return self.get_input(batch, key)

    def drop_conditioning(self, xc: Any) -> Any:
        """Return `xc` with each item replaced by the empty conditioning with probability `cond_dropout`."""
        empty = self.empty_conditioning(xc)
        n = len(next(iter(xc.values()))) if isinstance(xc, Mapping) else len(xc)
        dropped = torch.rand(n, device=self.device) < self.cond_dropout
        if isinstance(xc, list):
            return [e if drop else x for drop, e, x in zip(dropped.tolist(), empty, xc, strict=True)]
        return map_tensors(lambda e, x: torch.where(dropped.reshape(-1, *[1] * (x.dim() - 1)), e, x), empty, xc)

    def empty_conditioning(self, xc: Any) -> Any:
        """Return the empty conditioning like `xc`: "" for text, the last class for labels, zeros otherwise."""
        if isinstance(xc, Mapping) and MASK_KEY in xc:
            return map_tensors(torch.zeros_like, xc)
        if isinstance(xc, Mapping):
            num_classes = getattr(self.cond_stage_model, "n_classes", None) or self.model.diffusion_model.num_classes
            return {key: torch.full_like(value, num_classes - 1) for key, value in xc.items()}
        return torch.zeros_like(xc) if isinstance(xc, torch.Tensor) else [""] * len(xc)
