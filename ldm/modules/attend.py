"""Softmax attention (arXiv:1706.03762, equation 1), shared by all attention layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

SMALL = 64 * 64  # largest number of query-key products for which the explicit formula is faster


def attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
    """Return softmax(q kᵀ / √d) v, computed by `torch.nn.functional.scaled_dot_product_attention` with `options`.

    Small attention maps in bfloat16 training on the CPU use the explicit formula in float32. There the backward pass
    of torch's flash kernel takes several times as long. The two results differ only by rounding.

    Args:
        q: (B, heads, N, d).
        k, v: (B, heads, M, d).
        attn_mask: broadcasts to (B, heads, N, M), False for keys to ignore.

    Returns:
        (B, heads, N, d).
    """
    no_options = attn_mask is None and not any(options.values())
    if no_options and _has_slow_backward(q) and q.shape[-2] * k.shape[-2] <= SMALL:
        with torch.autocast(q.device.type, enabled=False):
            scores = (q * q.shape[-1] ** -0.5).float() @ k.float().transpose(-1, -2)
            return scores.softmax(dim=-1).to(v.dtype) @ v
    return scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, **options)


def _has_slow_backward(q: Tensor) -> bool:
    return q.dtype == torch.bfloat16 and q.device.type == "cpu" and q.requires_grad and torch.is_grad_enabled()
