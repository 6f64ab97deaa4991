"""Attention layers of the U-Net and of the autoencoder.

Shapes: B batch, C channels, H x W image, N = H*W tokens, M context tokens, D context channels.
All softmax attention runs through `attend`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from ldm.errors import UserError
from ldm.modules.attend import attend
from ldm.modules.cached import Cached
from ldm.modules.diffusionmodules.util import checkpoint as run_checkpointed
from ldm.modules.diffusionmodules.util import zero_module


def Normalize(in_channels: int, num_groups: int = 32) -> nn.GroupNorm:
    """Group normalization (arXiv 1803.08494) with a learned scale and shift for each channel.

    Raises:
        UserError: the channels do not divide into `num_groups` groups.
    """
    if in_channels % num_groups:
        raise UserError(
            f"{in_channels} channels do not divide into {num_groups} normalization groups; "
            f'choose "ch" and "ch_mult" so that every level has a multiple of {num_groups} channels'
        )
    return nn.GroupNorm(num_groups, in_channels, eps=1e-6, affine=True)


class GEGLU(nn.Module):
    """Linear layer gated by the GELU of a second one (arXiv:2002.05202): `(..., dim_in) -> (..., dim_out)`."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim_in, 2 * dim_out)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * gelu(gate)


class FeedForward(nn.Module):
    """Two-layer perceptron with hidden width `dim * mult`; `glu` makes its activation a GEGLU."""

    def __init__(
        self, dim: int, dim_out: int | None = None, mult: int = 4, glu: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__()
        hidden = int(dim * mult)
        first = GEGLU(dim, hidden) if glu else nn.Sequential(nn.Linear(dim, hidden), nn.GELU())
        self.net = nn.Sequential(first, nn.Dropout(dropout), nn.Linear(hidden, dim_out or dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class CrossAttention(nn.Module):
    """Multi-head attention of `x` to `context`, or to itself (arXiv:1706.03762; arXiv:2112.10752, section 3.3).

    Keys and values depend on the context alone. `cached_contexts` makes the layer compute them once for each context.
    """

    def __init__(
        self, query_dim: int, context_dim: int | None = None, heads: int = 8, dim_head: int = 64, dropout: float = 0.0
    ) -> None:
        super().__init__()
        inner_dim = dim_head * heads
        context_dim = context_dim or query_dim
        self.heads = heads
        self.to_q = nn.Linear(query_dim, inner_dim, bias=False)
        self.to_k = nn.Linear(context_dim, inner_dim, bias=False)
        self.to_v = nn.Linear(context_dim, inner_dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner_dim, query_dim), nn.Dropout(dropout))
        self.kept: Cached[tuple[Tensor, Tensor]] | None = None

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            x: (B, N, query_dim).
            context: (B, M, context_dim), or None for self-attention.
            mask: boolean (B, M), False where a context token must not be seen.

        Returns:
            (B, N, query_dim).
        """
        q = self._split(self.to_q(x))
        if context is None:
            k, v = self._keys_and_values(x)
        elif self.kept is None or torch.is_grad_enabled():
            k, v = self._keys_and_values(context)
        else:
            k, v = self.kept(lambda: self._keys_and_values(context), context)
        if mask is not None:
            mask = mask.flatten(1)[:, None, None, :]
        out = attend(q, k, v, attn_mask=mask)
        return self.to_out(out.transpose(1, 2).flatten(2))

    def _split(self, tokens: Tensor) -> Tensor:
        """(B, N, heads * d) to (B, heads, N, d)."""
        return tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _keys_and_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        return self._split(self.to_k(context)), self._split(self.to_v(context))


@contextmanager
def cached_contexts(module: nn.Module) -> Iterator[None]:
    """Run with every `CrossAttention` in `module` computing its keys and values once for the same context.

    A sampling run attends to one context at every step. The same context is the same tensor, not written to
    since; its results are the same bits. The layers' weights must stay as they are inside. With gradients
    nothing is kept.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, CrossAttention) and layer.kept is None]
    for layer in layers:
        layer.kept = Cached()
    try:
        yield
    finally:
        for layer in layers:
            layer.kept = None


def keeps_contexts(module: nn.Module) -> bool:
    """Whether `module` runs within `cached_contexts`."""
    return any(isinstance(part, CrossAttention) and part.kept is not None for part in module.modules())


class BasicTransformerBlock(nn.Module):
    """Self-attention, attention to the context and a perceptron, each residual with a layer norm before it."""

    def __init__(
        self,
        dim: int,
        n_heads: int,
        d_head: int,
        dropout: float = 0.0,
        context_dim: int | None = None,
        gated_ff: bool = True,
        checkpoint: bool = True,
    ) -> None:
        super().__init__()
        self.attn1 = CrossAttention(dim, heads=n_heads, dim_head=d_head, dropout=dropout)
        self.ff = FeedForward(dim, dropout=dropout, glu=gated_ff)
        self.attn2 = CrossAttention(dim, context_dim, heads=n_heads, dim_head=d_head, dropout=dropout)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)
        self.checkpoint = checkpoint

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """`x: (B, N, dim)` and `context: (B, M, context_dim)` to (B, N, dim); without context both attend to `x`."""
        return run_checkpointed(self._forward, (x, context), self.parameters(), self.checkpoint)

    def _forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map, residual; starts as the identity.

    Args:
        context_dim: channels of the context, one number or one for each of the `depth` blocks.
        checkpoint: recompute the blocks in the backward pass (as published): less memory, slower training.
    """

    def __init__(
        self,
        in_channels: int,
        n_heads: int,
        d_head: int,
        depth: int = 1,
        dropout: float = 0.0,
        context_dim: int | Sequence[int] | None = None,
        checkpoint: bool = True,
    ) -> None:
        super().__init__()
        inner_dim = n_heads * d_head
        context_dims = list(context_dim) if isinstance(context_dim, Sequence) else [context_dim]
        if len(context_dims) == 1:
            context_dims *= depth
        if len(context_dims) != depth:
            raise ValueError(f"context_dim has {len(context_dims)} values for {depth} transformer blocks")
        self.in_channels = in_channels
        self.norm = Normalize(in_channels)
        self.proj_in = nn.Conv2d(in_channels, inner_dim, kernel_size=1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(inner_dim, n_heads, d_head, dropout, context_dim=dim, checkpoint=checkpoint)
            for dim in context_dims
        )
        self.proj_out = zero_module(nn.Conv2d(inner_dim, in_channels, kernel_size=1))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """`x: (B, C, H, W)` and `context: (B, M, D)` to (B, C, H, W)."""
        height, width = x.shape[-2:]
        h = self.proj_in(self.norm(x))
        h = h.flatten(2).transpose(1, 2)  # (B, N, inner); a view if h is channels-last
        for block in self.transformer_blocks:
            h = block(h, context)
        h = h.transpose(1, 2).unflatten(2, (height, width))
        return x + self.proj_out(h)


class LinearAttention(nn.Module):
    """Attention whose cost grows linearly with the pixels (arXiv:1812.01243, softmax over keys only)."""

    def __init__(self, dim: int, heads: int = 4, dim_head: int = 32) -> None:
        super().__init__()
        self.heads = heads
        hidden = dim_head * heads
        self.to_qkv = nn.Conv2d(dim, 3 * hidden, kernel_size=1, bias=False)
        self.to_out = nn.Conv2d(hidden, dim, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W)` to the same shape."""
        qkv = self.to_qkv(x).flatten(2).unflatten(1, (3, self.heads, -1))
        q, k, v = qkv.unbind(dim=1)  # each (B, heads, dim_head, N)
        summary = k.softmax(dim=-1) @ v.transpose(-1, -2)
        out = summary.transpose(-1, -2) @ q
        return self.to_out(out.reshape(x.shape[0], -1, *x.shape[2:]))


class SpatialSelfAttention(nn.Module):
    """Single-head attention between the pixels of a feature map, residual."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.norm = Normalize(in_channels)
        self.q = nn.Conv2d(in_channels, in_channels, kernel_size=1)
        self.k = nn.Conv2d(in_channels, in_channels, kernel_size=1)
        self.v = nn.Conv2d(in_channels, in_channels, kernel_size=1)
        self.proj_out = nn.Conv2d(in_channels, in_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W)` to the same shape."""
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2)[:, None] for layer in (self.q, self.k, self.v))
        out = attend(q, k, v)[:, 0]
        return x + self.proj_out(out.transpose(1, 2).unflatten(2, x.shape[2:]))
