"""Noise augmentation of the small image that conditions an upscaler (arXiv:2106.15282, section 4.2).

Shapes: images x (B, C, H, W) in [-1, 1]; noise levels (B,) int64, which are timesteps of the augmentation's schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ldm.modules.diffusionmodules.schedule import diffusion_tables, extract_into_tensor, make_beta_schedule

# The tables of the schedule that published checkpoints hold.
TABLES = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
)


class AbstractLowScaleModel(nn.Module):
    """Base class of the models of the small image, with a noise schedule if `noise_schedule_config` is given."""

    computed_buffers = TABLES  # for `load_weights`: a file may lack all of them
    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor

    def __init__(self, noise_schedule_config: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        if noise_schedule_config is not None:
            self.register_schedule(**noise_schedule_config)

    def register_schedule(
        self,
        beta_schedule: str = "linear",
        timesteps: int = 1000,
        linear_start: float = 1e-4,
        linear_end: float = 2e-2,
        cosine_s: float = 8e-3,
    ) -> None:
        """Register the tables of a noise schedule as buffers (T,); see `make_beta_schedule`."""
        tables = diffusion_tables(make_beta_schedule(beta_schedule, timesteps, linear_start, linear_end, cosine_s))
        self.num_timesteps = timesteps
        self.linear_start, self.linear_end = linear_start, linear_end
        for name in TABLES:
            self.register_buffer(name, torch.tensor(tables[name], dtype=torch.float32))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AbstractLowScaleModel:
        """Move or cast the model, but keep its tables in float32: half precision cannot represent ᾱ of small t."""
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, table in before.items():
            if getattr(self, name).dtype != table.dtype:
                setattr(self, name, table.to(getattr(self, name).device))
        return self

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """Sample from q(x_t | x_0) of the augmentation's schedule."""
        noise = torch.randn_like(x_start) if noise is None else noise
        mean = extract_into_tensor(self.sqrt_alphas_cumprod, t, x_start.shape) * x_start
        return mean + extract_into_tensor(self.sqrt_one_minus_alphas_cumprod, t, x_start.shape) * noise

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the image and its noise levels."""
        return x, None

    def decode(self, x: Tensor) -> Tensor:
        """Return the image."""
        return x


class SimpleImageConcat(AbstractLowScaleModel):
    """Model of the small image that adds no noise."""

    def __init__(self) -> None:
        super().__init__(noise_schedule_config=None)
        self.max_noise_level = 0

    def forward(
        self, x: Tensor, noise_level: Tensor | None = None, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the image and noise levels of zero."""
        return x, torch.zeros(x.shape[0], device=x.device, dtype=torch.long)


class ImageConcatWithNoiseAugmentation(AbstractLowScaleModel):
    """Model of the small image that adds noise of a random or given level below `max_noise_level`.

    Args:
        noise_schedule_config: arguments of `register_schedule`.
        max_noise_level: number of noise levels.
        to_cuda: accepted for published configurations; has no effect.
    """

    def __init__(
        self, noise_schedule_config: Mapping[str, Any], max_noise_level: int = 1000, to_cuda: bool = False
    ) -> None:
        super().__init__(noise_schedule_config=noise_schedule_config)
        self.max_noise_level = max_noise_level

    def forward(
        self, x: Tensor, noise_level: Tensor | None = None, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the image with noise and its noise levels (B,); both are random by default."""
        if noise_level is None:
            noise_level = torch.randint(0, self.max_noise_level, (x.shape[0],), device=x.device).long()
        return self.q_sample(x, noise_level, noise), noise_level
