"""What a retrieval-augmented model is conditioned on: the prompt and pictures near it, in CLIP's space.

Shapes: B prompts, k neighbours, D channels of CLIP's joint space.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def retrieval_conditioning(prompts: Tensor, neighbours: Tensor | None = None) -> Tensor:
    """The context of a retrieval-augmented model (arXiv:2204.11824): the prompt first, then its neighbours.

    Args:
        prompts: (B, D) CLIP embeddings of texts.
        neighbours: (B, k, D) CLIP embeddings of pictures, the nearest first; None draws from the texts alone.

    Returns:
        (B, 1 + k, D), every vector of length 1.
    """
    context = prompts[:, None]
    if neighbours is not None:
        context = torch.cat([context, neighbours.to(prompts)], dim=1)
    return F.normalize(context, dim=-1)


def unconditional_conditioning(conditioning: Tensor) -> Tensor:
    """What guidance leads away from: zeros in the shape of `conditioning` (B, 1 + k, D)."""
    return torch.zeros_like(conditioning)
