"""Sample from a text-to-image model with the functions that pipelines consist of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.pipelines.sampling import decode, sample_latents
from ldm.pipelines.text import text_conditioning


@torch.no_grad()
def sample_text(
    model: Any,
    prompts: Sequence[str],
    *,
    size: tuple[int, int] = (8, 8),
    scale: float = 1.0,
    negative_prompt: str = "",
    **options: Any,
) -> Tensor:
    """Return an image for each prompt, (B, 3, H, W) in [-1, 1], sampled as one batch.

    Args:
        model: a text-to-image model.
        prompts: B texts.
        size: (h, w) of the latents.
        scale: guidance scale.
        negative_prompt: the unconditional text.
        **options: see `sample_latents`.
    """
    cond, uncond = text_conditioning(model, prompts, scale, negative_prompt)
    shape = (len(prompts), model.channels, *size)
    return decode(model, sample_latents(model, shape, scale=scale, cond=cond, uncond=uncond, **options))
