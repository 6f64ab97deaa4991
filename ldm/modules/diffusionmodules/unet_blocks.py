"""Building blocks of the U-Nets, re-exported by `openaimodel`.

Shapes: B batch, C channels, `...` one to three spatial dimensions (`dims`), E embedding channels, N tokens.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import interpolate, linear

from ldm.errors import UserError
from ldm.modules.attend import attend
from ldm.modules.attention import SpatialTransformer
from ldm.modules.diffusionmodules.util import avg_pool_nd, checkpoint, conv_nd, normalization, zero_module


class TimestepBlock(nn.Module):
    """Module that takes the timestep embedding as its second argument."""

    @abstractmethod
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Return features (B, C', ...) from `x` (B, C, ...) and `emb` (B, E)."""


class TimestepEmbedSequential(nn.Sequential, TimestepBlock):
    """Sequence of layers that passes the timestep embedding or the context to the layers that take one."""

    def forward(  # type: ignore[override] # nn.Sequential declares one input
        self, x: Tensor, emb: Tensor, context: Tensor | None = None
    ) -> Tensor:
        for layer in self:
            if isinstance(layer, TimestepBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return x


class Upsample(nn.Module):
    """Nearest-neighbour upsampling by two, followed by a 3-wide convolution if `use_conv`.

    Three-dimensional inputs keep the size of their first spatial dimension.
    """

    def __init__(
        self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None, padding: int = 1
    ) -> None:
        super().__init__()
        self.channels, self.out_channels = channels, out_channels or channels
        self.use_conv, self.dims = use_conv, dims
        self.factors = (1.0, 2.0, 2.0) if dims == 3 else (2.0,) * dims
        self.conv = conv_nd(dims, channels, self.out_channels, 3, padding=padding) if use_conv else None

    def forward(self, x: Tensor) -> Tensor:
        x = interpolate(x, scale_factor=self.factors, mode="nearest")
        return x if self.conv is None else self.conv(x)


class TransposedUpsample(nn.Module):
    """Learned upsampling by two without padding: (B, C, H, W) -> (B, C', 2H + ks - 2, 2W + ks - 2)."""

    def __init__(self, channels: int, out_channels: int | None = None, ks: int = 5) -> None:
        super().__init__()
        self.channels = channels
        self.out_channels = out_channels or channels
        self.up = nn.ConvTranspose2d(channels, self.out_channels, kernel_size=ks, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x)


class Downsample(nn.Module):
    """Downsampling by two with a strided 3-wide convolution if `use_conv`, else with average pooling.

    Three-dimensional inputs keep the size of their first spatial dimension.
    """

    def __init__(
        self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None, padding: int = 1
    ) -> None:
        super().__init__()
        out_channels = out_channels or channels
        stride = (1, 2, 2) if dims == 3 else 2
        if not use_conv and out_channels != channels:
            raise ValueError(f"average pooling cannot change {channels} channels to {out_channels}; set use_conv")
        self.channels, self.out_channels = channels, out_channels
        self.use_conv, self.dims = use_conv, dims
        self.op = (
            conv_nd(dims, channels, out_channels, 3, stride=stride, padding=padding)
            if use_conv
            else avg_pool_nd(dims, kernel_size=stride, stride=stride)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class ResBlock(TimestepBlock):
    """Two convolutions with a residual connection, modulated by the timestep embedding (arXiv:2105.05233).

    Args:
        emb_channels: E, channels of the timestep embedding.
        out_channels: channels of the output; `channels` by default.
        use_conv: change the channels of the residual connection with a 3-wide instead of a 1-wide convolution.
        use_scale_shift_norm: scale and shift the second normalisation by the embedding instead of adding it before.
        up, down: resample both branches by two, the main branch before its first convolution.
    """

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        dropout: float,
        out_channels: int | None = None,
        use_conv: bool = False,
        use_scale_shift_norm: bool = False,
        dims: int = 2,
        use_checkpoint: bool = False,
        up: bool = False,
        down: bool = False,
    ) -> None:
        super().__init__()
        out_channels = out_channels or channels
        self.channels = channels
        self.emb_channels = emb_channels
        self.dropout = dropout
        self.out_channels = out_channels
        self.use_conv = use_conv
        self.use_checkpoint = use_checkpoint
        self.use_scale_shift_norm = use_scale_shift_norm
        self.in_layers = nn.Sequential(
            normalization(channels), nn.SiLU(), conv_nd(dims, channels, out_channels, 3, padding=1)
        )
        # These layers have no weights.
        self.updown = up or down
        resample = Upsample if up else Downsample
        self.h_upd = resample(channels, use_conv=False, dims=dims) if self.updown else nn.Identity()
        self.x_upd = resample(channels, use_conv=False, dims=dims) if self.updown else nn.Identity()
        emb_out_channels = 2 * out_channels if use_scale_shift_norm else out_channels
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, emb_out_channels))
        self.out_layers = nn.Sequential(
            normalization(out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            zero_module(conv_nd(dims, out_channels, out_channels, 3, padding=1)),
        )
        self.skip_connection: nn.Module
        if out_channels == channels:
            self.skip_connection = nn.Identity()
        elif use_conv:
            self.skip_connection = conv_nd(dims, channels, out_channels, 3, padding=1)
        else:
            self.skip_connection = conv_nd(dims, channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Return (B, out_channels, ...) from `x` (B, C, ...) and `emb` (B, E)."""
        return checkpoint(self._forward, (x, emb), self.parameters(), self.use_checkpoint)

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm, activation, convolution = self.in_layers
        h = activation(norm(x))
        if self.updown:
            h, x = self.h_upd(h), self.x_upd(x)
        h = convolution(h)
        modulation = self.emb_layers(emb).to(h.dtype).reshape(h.shape[0], -1, *[1] * (h.dim() - 2))
        if self.use_scale_shift_norm:
            scale, shift = modulation.chunk(2, dim=1)
            norm, activation, dropout, convolution = self.out_layers
            h = convolution(dropout(activation(norm(h) * (1 + scale) + shift)))
        else:
            h = self.out_layers(h + modulation)
        return self.skip_connection(x) + h


def count_flops_attn(model: Any, _x: Any, y: Any) -> None:
    """Add the multiplications of an attention layer to `model.total_ops`, as a counter for the package thop.

    Args:
        model: the layer.
        _x: its inputs; not used.
        y: its outputs, of which the first has the shape (B, C, ...).
    """
    batch, channels, *sizes = y[0].shape
    positions = torch.Size(sizes).numel()
    # The product of queries and keys has as many multiplications as that of scores and values.
    model.total_ops += torch.DoubleTensor([2 * batch * positions**2 * channels])


class QKVAttentionLegacy(nn.Module):
    """Multi-head attention on stacked channels: heads outermost, then query, key and value within each head."""

    count_flops = staticmethod(count_flops_attn)

    def __init__(self, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads

    def forward(self, qkv: Tensor) -> Tensor:
        """Map (B, 3C, N) to (B, C, N)."""
        qkv = rearrange(qkv, "b (heads three c) n -> b n heads three c", heads=self.n_heads, three=3)
        return _attend_heads(*qkv.unbind(dim=3))


class QKVAttention(nn.Module):
    """Multi-head attention on stacked channels: query, key and value outermost, then the heads within each."""

    count_flops = staticmethod(count_flops_attn)

    def __init__(self, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads

    def forward(self, qkv: Tensor) -> Tensor:
        """Map (B, 3C, N) to (B, C, N)."""
        qkv = rearrange(qkv, "b (three heads c) n -> b n three heads c", heads=self.n_heads, three=3)
        return _attend_heads(*qkv.unbind(dim=2))


def _attend_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return the attention of (B, N, heads, channels) tensors as (B, heads * channels, N), channels-last in memory."""
    q, k, v = (rearrange(x, "b n heads c -> b heads n c") for x in (q, k, v))
    return rearrange(attend(q, k, v), "b heads n c -> b n (heads c)").transpose(1, 2)


class AttentionBlock(nn.Module):
    """Self-attention over all positions of a feature map, with a residual connection.

    The last projection is initialised to zero, so a new module is the identity.

    Args:
        num_heads: number of heads, used if `num_head_channels` is -1.
        num_head_channels: channels of each head; -1 to use `num_heads`.
        use_new_attention_order: split the channels as `QKVAttention` instead of `QKVAttentionLegacy`.

    Raises:
        UserError: the channels cannot be divided into these heads.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int = 1,
        num_head_channels: int = -1,
        use_checkpoint: bool = False,
        use_new_attention_order: bool = False,
    ) -> None:
        super().__init__()
        if channels % (num_heads if num_head_channels == -1 else num_head_channels):
            option = f"num_heads {num_heads}" if num_head_channels == -1 else f"num_head_channels {num_head_channels}"
            raise UserError(f"AttentionBlock: {option} does not divide {channels} channels; change it or the channels")
        self.channels = channels
        self.num_heads = num_heads if num_head_channels == -1 else channels // num_head_channels
        self.use_checkpoint = use_checkpoint
        self.norm = normalization(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.attention = (QKVAttention if use_new_attention_order else QKVAttentionLegacy)(self.num_heads)
        self.proj_out = zero_module(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, ...) to the same shape."""
        return checkpoint(self._forward, (x,), self.parameters(), self.use_checkpoint)

    def _forward(self, x: Tensor) -> Tensor:
        h = pointwise(self.qkv, self.norm(x).flatten(2))
        h = pointwise(self.proj_out, self.attention(h))
        return x + h.reshape(x.shape)


def pointwise(layer: nn.Conv1d, x: Tensor) -> Tensor:
    """Apply the 1-wide convolution `layer` to `x` (B, C, N) as a matrix product, without copying channels-last data."""
    return linear(x.transpose(1, 2), layer.weight[:, :, 0], layer.bias).transpose(1, 2)
