"""Softmax attention (arXiv:1706.03762, equation 1), shared by all attention layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

SMALL = 64 * 64  # largest number of query-key products for which the explicit formula is faster
LARGE = 2048  # number of queries and of keys from which on matrix products are faster than torch's flash kernel
ROWS = 512  # queries whose scores are computed at once, so that they stay in the cache
SAMPLED = 8  # the largest score of a query is estimated from every 8th key
TOLERATED = 2.0  # excess of a score over that estimate; its rounding step is 2⁻⁶
PADDING = 8  # columns that are added to keys and values; the products are fastest for multiples of 8


def attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
    """Return softmax(q kᵀ / √d) v, computed by `torch.nn.functional.scaled_dot_product_attention` with `options`.

    Small attention maps in bfloat16 training on the CPU use the explicit formula in float32. There the backward pass
    of torch's flash kernel takes several times as long. The two results differ only by rounding. So do those of large
    attention maps in bfloat16 on the CPU without gradients, see `attend_in_rows`.

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
    if no_options and _suits_rows(q, k, v):
        return attend_in_rows(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)).view(*q.shape[:3], v.shape[-1])
    return scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, **options)


def attend_in_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return the same for q (B, N, d) and k, v (B, M, d), by products of matrices, some rows of q at a time.

    The products are faster than torch's flash kernel for the CPU in bfloat16, but round the scores to bfloat16. An
    estimate of the largest score of a query is therefore subtracted within the product: its key is a column of ones.
    What is rounded is then near 0 for the keys that count. The rows are computed again where the estimate was too low.
    The values have such a column too, which sums the weights.
    """
    count, d, width = q.shape[-2], q.shape[-1], v.shape[-1]
    some_keys = k[:, ::SAMPLED].transpose(1, 2).contiguous()
    keys = _with_ones(k).transpose(1, 2).contiguous()
    values = _with_ones(v)
    queries = torch.cat([q * d**-0.5, q.new_zeros(*q.shape[:2], PADDING)], dim=-1)
    sums = q.new_empty(*q.shape[:2], width + PADDING)
    all_scores = q.new_empty(min(ROWS, count), k.shape[-2])
    for item in range(len(q)):
        for start in range(0, count, ROWS):
            rows = queries[item, start : start + ROWS]
            rows[:, d] = -(rows[:, :d] @ some_keys[item]).amax(dim=-1)
            scores = torch.mm(rows, keys[item], out=all_scores[: len(rows)])
            if scores.max() > TOLERATED:
                rows[:, d] -= scores.amax(dim=-1).clamp(min=0.0)
                torch.mm(rows, keys[item], out=scores)
            torch.mm(scores.exp_(), values[item], out=sums[item, start : start + ROWS])
    return sums[..., :width] / sums[..., width : width + 1]


def _with_ones(x: Tensor) -> Tensor:
    """Return x (B, M, d) with a column of ones, and columns of zeros up to `PADDING`."""
    added = x.new_zeros(*x.shape[:2], PADDING)
    added[..., 0] = 1.0
    return torch.cat([x, added], dim=-1)


def _suits_rows(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Return whether `attend_in_rows` is faster: for large maps in bfloat16 on the CPU without gradients."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return False
    is_plain = type(q) is Tensor  # fake tensors, which count memory, have no values
    is_large = q.dim() == 4 and min(q.shape[-2], k.shape[-2]) >= LARGE
    return is_plain and is_large and q.device.type == "cpu" and q.dtype == k.dtype == v.dtype == torch.bfloat16


def _has_slow_backward(q: Tensor) -> bool:
    return q.dtype == torch.bfloat16 and q.device.type == "cpu" and q.requires_grad and torch.is_grad_enabled()
