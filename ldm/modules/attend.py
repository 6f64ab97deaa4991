"""Softmax attention (arXiv:1706.03762, equation 1): the one function that all attention layers end in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

SMALL = 64 * 64  # largest table of query-key products that is worth writing out


def attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
    """softmax(q kᵀ / √d) v, by torch's `scaled_dot_product_attention` with its `options`.

    Training in bfloat16 on the CPU writes small tables of products out, in float32: torch's flash kernel takes several
    times as long for their gradients (a step of a small U-Net, half as long again). Results differ by rounding only.

    Args:
        q: (B, heads, N, d).
        k, v: (B, heads, M, d).
        attn_mask: broadcasts to (B, heads, N, M), False where a key must not be seen.

    Returns:
        (B, heads, N, d).
    """
    plain = attn_mask is None and not any(options.values())
    if plain and _slow_gradients(q) and q.shape[-2] * k.shape[-2] <= SMALL:
        with torch.autocast(q.device.type, enabled=False):
            products = (q * q.shape[-1] ** -0.5).float() @ k.float().transpose(-1, -2)
            return products.softmax(dim=-1).to(v.dtype) @ v
    return scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, **options)


def _slow_gradients(q: Tensor) -> bool:
    return q.dtype == torch.bfloat16 and q.device.type == "cpu" and q.requires_grad and torch.is_grad_enabled()
