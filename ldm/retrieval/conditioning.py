"""Conditioning of retrieval-augmented models: CLIP embeddings of a prompt and of its neighbours.

Shapes: B prompts, k neighbours, D channels of CLIP's joint space.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def retrieval_conditioning(prompts: Tensor, neighbours: Tensor | None = None) -> Tensor:
    """Return the context of a retrieval-augmented model: the prompt, then its neighbours.

    Args:
        prompts: (B, D) CLIP embeddings of texts.
        neighbours: (B, k, D) CLIP embeddings of images, the nearest first; None for a context of the prompt alone.

    Returns:
        (B, 1 + k, D) unit vectors.
    """
    context = prompts[:, None]
    if neighbours is not None:
        context = torch.cat([context, neighbours.to(prompts)], dim=1)
    return F.normalize(context, dim=-1)


def unconditional_conditioning(conditioning: Tensor) -> Tensor:
    """Return the unconditional context for guidance: zeros in the shape of `conditioning` (B, 1 + k, D)."""
    return torch.zeros_like(conditioning)
