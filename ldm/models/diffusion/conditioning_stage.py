"""Conditioning stage of a latent diffusion model: from the entries of a batch to the conditioning of the network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import nn

from ldm.config.instantiate import instantiate_from_config
from ldm.config.model_config import TEXT_KEYS
from ldm.io.pixels import batch_entry, batch_integers
from ldm.models.autoencoder import Autoencoder
from ldm.models.diffusion.batch_keys import CLASS_KEY, LAYOUT_KEY, MASK_KEY, MASKED_KEY, NEIGHBOURS_KEY
from ldm.models.diffusion.conditioning import DiffusionWrapper, map_tensors
from ldm.models.diffusion.latent_space import encode_in_range
from ldm.models.diffusion.process import DiffusionProcess
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.frozen import freeze
from ldm.util import default


class _ReadsBatches(Protocol):
    """Parts of a model that read the entries of a batch."""

    cond_stage_key: str

    @property
    def device(self) -> torch.device: ...

    def get_input(self, batch: Mapping[str, Any], k: str) -> Any: ...


class ConditioningStage(DiffusionProcess):
    """Mixin of `LatentDiffusion`: encoding and dropout of the conditioning with `cond_stage_model`."""

    model: DiffusionWrapper
    first_stage_model: Any  # the configuration chooses the classes of the stages
    cond_stage_model: Any
    cond_stage_trainable: bool
    cond_stage_forward: str | None
    cond_dropout: float
    cond_ids: torch.Tensor  # only with `num_timesteps_cond` above 1

    num_timesteps_cond: int

    def register_schedule(self, *args: Any, **kwargs: Any) -> None:
        """Register the noise schedule, and that of the conditioning if `num_timesteps_cond` is above 1."""
        super().register_schedule(*args, **kwargs)
        self.shorten_cond_schedule = self.num_timesteps_cond > 1
        if self.shorten_cond_schedule:
            self.make_cond_schedule()

    def make_cond_schedule(self) -> None:
        """Register `cond_ids` (T,), the timesteps that a noised conditioning has at each timestep of the model."""
        count, last = self.num_timesteps_cond, self.num_timesteps - 1
        ids = torch.full((self.num_timesteps,), last, dtype=torch.long)
        ids[:count] = torch.linspace(0, last, count).round().long()
        self.register_buffer("cond_ids", ids, persistent=False)

    def instantiate_cond_stage(self, config: Mapping[str, Any] | str) -> None:
        """Build the conditioning stage, frozen unless it is trainable."""
        if config == "__is_first_stage__":
            self.cond_stage_model = self.first_stage_model
            return
        model = instantiate_from_config(config)
        self.cond_stage_model = model if model is None or self.cond_stage_trainable else freeze(model)

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
        encode: Any = getattr(self.cond_stage_model, "encode", None)
        if isinstance(self.cond_stage_model, Autoencoder):
            encoded = encode_in_range(self.cond_stage_model, encode, c)
        else:
            encoded = encode(c) if callable(encode) else self.cond_stage_model(c)
        return encoded.mode() if isinstance(encoded, DiagonalGaussianDistribution) else encoded

    def raw_conditioning(self: _ReadsBatches, batch: Mapping[str, Any], cond_key: str | None = None) -> Any:
        """Return the conditioning of a batch before it is encoded."""
        key = default(cond_key, self.cond_stage_key)
        if key == CLASS_KEY:
            return {key: batch_integers(batch, key).to(self.device)}
        if key == LAYOUT_KEY:
            return batch_integers(batch, key).to(self.device)
        if key in TEXT_KEYS:
            return batch_entry(batch, key)
        if key == NEIGHBOURS_KEY:
            return batch_entry(batch, key).to(self.device, torch.float32)
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
