"""Attention layers of the U-Net and of the autoencoder.

Shapes: B batch, C channels, H x W image, N = H*W tokens, M context tokens, D context channels.
Every softmax attention calls `attend`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import gelu

from ldm.compat import published_names
from ldm.errors import UserError
from ldm.modules.attend import attend
from ldm.modules.cached import ResultCache
from ldm.modules.diffusionmodules.util import checkpoint as run_checkpointed
from ldm.modules.diffusionmodules.util import zero_module

__getattr__ = published_names(__name__)


def Normalize(in_channels: int, num_groups: int = 32) -> nn.GroupNorm:
    """Return a group normalization layer (arXiv:1803.08494) with a learned scale and shift for each channel.

    Raises:
        UserError: `in_channels` is not a multiple of `num_groups`.
    """
    if in_channels % num_groups:
        raise UserError(
            f"{in_channels} channels cannot be divided into {num_groups} normalization groups; "
            f'choose "ch" and "ch_mult" so that every level has a multiple of {num_groups} channels'
        )
    return nn.GroupNorm(num_groups, in_channels, eps=1e-6, affine=True)


class GEGLU(nn.Module):
    """Linear layer gated by the GELU of a second linear layer (arXiv:2002.05202): (..., dim_in) -> (..., dim_out)."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim_in, 2 * dim_out)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * gelu(gate)


class FeedForward(nn.Module):
    """Two-layer perceptron with hidden width `dim * mult`; its activation is GEGLU with `glu`, else GELU."""

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

    The keys and values depend only on the context. Inside `cached_contexts` they are computed once per context.

    Attributes:
        heads: number of heads.
        scale: factor of the scores, 1 / √dim_head.
    """

    def __init__(
        self, query_dim: int, context_dim: int | None = None, heads: int = 8, dim_head: int = 64, dropout: float = 0.0
    ) -> None:
        super().__init__()
        inner_dim = dim_head * heads
        context_dim = context_dim or query_dim
        self.heads = heads
        self.scale = dim_head**-0.5
        self.to_q = nn.Linear(query_dim, inner_dim, bias=False)
        self.to_k = nn.Linear(context_dim, inner_dim, bias=False)
        self.to_v = nn.Linear(context_dim, inner_dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner_dim, query_dim), nn.Dropout(dropout))
        self.cache: ResultCache[tuple[Tensor, Tensor]] | None = None

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Compute the attention output.

        Args:
            x: (B, N, query_dim).
            context: (B, M, context_dim), or None for self-attention.
            mask: boolean (B, M), False for context tokens to ignore.

        Returns:
            (B, N, query_dim).
        """
        q = self._split_heads(self.to_q(x))
        if context is None:
            k, v = self._keys_and_values(x)
        elif self.cache is None or torch.is_grad_enabled():
            k, v = self._keys_and_values(context)
        else:
            k, v = self.cache(lambda: self._keys_and_values(context), context)
        if mask is not None:
            mask = rearrange(mask, "b ... -> b 1 1 (...)")
        scale = None if self.scale == q.shape[-1] ** -0.5 else self.scale
        out = attend(q, k, v, attn_mask=mask, scale=scale)
        return self.to_out(rearrange(out, "b h n d -> b n (h d)"))

    def _split_heads(self, tokens: Tensor) -> Tensor:
        return rearrange(tokens, "b n (h d) -> b h n d", h=self.heads)

    def _keys_and_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        return self._split_heads(self.to_k(context)), self._split_heads(self.to_v(context))


@contextmanager
def cached_contexts(module: nn.Module) -> Iterator[None]:
    """Cache the keys and values of every `CrossAttention` in `module` while the context manager is active.

    A sampling run uses one context at every step. The cache is valid for the same unmodified tensor, and the results
    are bitwise equal. The weights of the layers must not change inside. With gradients enabled nothing is cached.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, CrossAttention) and layer.cache is None]
    for layer in layers:
        layer.cache = ResultCache()
    try:
        yield
    finally:
        for layer in layers:
            layer.cache = None


def has_cached_contexts(module: nn.Module) -> bool:
    """Return whether `cached_contexts` is active for a layer of `module`."""
    return any(isinstance(layer, CrossAttention) and layer.cache is not None for layer in module.modules())


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention and a perceptron, each with a layer norm before it and a residual connection.

    Args:
        disable_self_attn: attend to the context in both attention layers.
    """

    def __init__(
        self,
        dim: int,
        n_heads: int,
        d_head: int,
        dropout: float = 0.0,
        context_dim: int | None = None,
        gated_ff: bool = True,
        checkpoint: bool = True,
        disable_self_attn: bool = False,
    ) -> None:
        super().__init__()
        self.disable_self_attn = disable_self_attn
        first_dim = context_dim if disable_self_attn else None
        self.attn1 = CrossAttention(dim, first_dim, heads=n_heads, dim_head=d_head, dropout=dropout)
        self.ff = FeedForward(dim, dropout=dropout, glu=gated_ff)
        self.attn2 = CrossAttention(dim, context_dim, heads=n_heads, dim_head=d_head, dropout=dropout)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)
        self.checkpoint = checkpoint

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return (B, N, dim) from `x` (B, N, dim) and `context` (B, M, context_dim).

        Without a context both attention layers attend to `x`.
        """
        return run_checkpointed(self._forward, (x, context), self.parameters(), self.checkpoint)

    def _forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        x = x + self.attn1(self.norm1(x), context if self.disable_self_attn else None)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of a feature map, with a residual connection.

    The last projection is initialised to zero, so a new module is the identity.

    Args:
        context_dim: channels of the context: one number, or one for each of the `depth` blocks.
        disable_self_attn: attend to the context instead of the feature map.
        use_linear: project tokens with linear layers instead of the feature map with 1-wide convolutions.
        use_checkpoint: recompute the blocks in the backward pass (as published): less memory, slower training.
    """

    def __init__(
        self,
        in_channels: int,
        n_heads: int,
        d_head: int,
        depth: int = 1,
        dropout: float = 0.0,
        context_dim: int | Sequence[int] | None = None,
        disable_self_attn: bool = False,
        use_linear: bool = False,
        use_checkpoint: bool = True,
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
        self.use_linear = use_linear
        self.proj_in = _projection(in_channels, inner_dim, use_linear)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(
                inner_dim,
                n_heads,
                d_head,
                dropout,
                context_dim=dim,
                checkpoint=use_checkpoint,
                disable_self_attn=disable_self_attn,
            )
            for dim in context_dims
        )
        self.proj_out = zero_module(_projection(inner_dim, in_channels, use_linear))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return (B, C, H, W) from `x` (B, C, H, W) and `context` (B, M, D)."""
        height, width = x.shape[-2:]
        h = self.norm(x)
        if not self.use_linear:
            h = self.proj_in(h)
        h = rearrange(h, "b c h w -> b (h w) c")
        if self.use_linear:
            h = self.proj_in(h)
        for block in self.transformer_blocks:
            h = block(h, context)
        if self.use_linear:
            h = self.proj_out(h)
        h = rearrange(h, "b (h w) c -> b c h w", h=height, w=width)
        return x + (h if self.use_linear else self.proj_out(h))


def _projection(channels: int, out_channels: int, linear: bool) -> nn.Module:
    return nn.Linear(channels, out_channels) if linear else nn.Conv2d(channels, out_channels, kernel_size=1)


class LinearAttention(nn.Module):
    """Attention with a cost linear in the number of pixels (arXiv:1812.01243, softmax over keys only)."""

    def __init__(self, dim: int, heads: int = 4, dim_head: int = 32) -> None:
        super().__init__()
        self.heads = heads
        hidden = dim_head * heads
        self.to_qkv = nn.Conv2d(dim, 3 * hidden, kernel_size=1, bias=False)
        self.to_out = nn.Conv2d(hidden, dim, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        height, width = x.shape[-2:]
        qkv = rearrange(self.to_qkv(x), "b (three heads c) h w -> b three heads c (h w)", three=3, heads=self.heads)
        q, k, v = qkv.unbind(dim=1)
        summary = k.softmax(dim=-1) @ v.transpose(-1, -2)
        out = summary.transpose(-1, -2) @ q
        return self.to_out(rearrange(out, "b heads c (h w) -> b (heads c) h w", h=height, w=width))


class SpatialSelfAttention(nn.Module):
    """Single-head self-attention over the positions of a feature map, with a residual connection."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.norm = Normalize(in_channels)
        self.q = nn.Conv2d(in_channels, in_channels, kernel_size=1)
        self.k = nn.Conv2d(in_channels, in_channels, kernel_size=1)
        self.v = nn.Conv2d(in_channels, in_channels, kernel_size=1)
        self.proj_out = nn.Conv2d(in_channels, in_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        height, width = x.shape[-2:]
        h = self.norm(x)
        q, k, v = (rearrange(layer(h), "b c h w -> b 1 (h w) c") for layer in (self.q, self.k, self.v))
        out = attend(q, k, v)
        return x + self.proj_out(rearrange(out, "b 1 (h w) c -> b c h w", h=height, w=width))
