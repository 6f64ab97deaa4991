"""Building blocks of the U-Nets; `openaimodel` re-exports them.

Shapes: B batch, C channels, `...` one to three spatial dimensions (`dims`), E embedding channels, N tokens.
"""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor, nn
from torch.nn.functional import interpolate, linear

from ldm.errors import UserError
from ldm.modules.attend import attend
from ldm.modules.attention import SpatialTransformer
from ldm.modules.diffusionmodules.util import avg_pool_nd, checkpoint, conv_nd, normalization, zero_module


class TimestepBlock(nn.Module):
    """A module that takes the timestep embedding as its second argument."""

    @abstractmethod
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """`x: (B, C, ...)`, `emb: (B, E)`."""


class TimestepEmbedSequential(nn.Sequential, TimestepBlock):
    """Layers in sequence, each given the timestep embedding or the context if it takes one."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None = None) -> Tensor:
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
        self.channels = channels
        self.factors = (1.0, 2.0, 2.0) if dims == 3 else (2.0,) * dims
        self.conv = conv_nd(dims, channels, out_channels or channels, 3, padding=padding) if use_conv else None

    def forward(self, x: Tensor) -> Tensor:
        x = interpolate(x, scale_factor=self.factors, mode="nearest")
        return x if self.conv is None else self.conv(x)


class TransposedUpsample(nn.Module):
    """Learned upsampling by two without padding: `(B, C, H, W) -> (B, C', 2H + ks - 2, 2W + ks - 2)`."""

    def __init__(self, channels: int, out_channels: int | None = None, ks: int = 5) -> None:
        super().__init__()
        self.channels = channels
        self.out_channels = out_channels or channels
        self.up = nn.ConvTranspose2d(channels, self.out_channels, kernel_size=ks, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x)


class Downsample(nn.Module):
    """Downsampling by two: a strided 3-wide convolution if `use_conv`, average pooling otherwise.

    Three-dimensional inputs keep the size of their first spatial dimension.
    """

    def __init__(
        self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None, padding: int = 1
    ) -> None:
        super().__init__()
        out_channels = out_channels or channels
        stride = (1, 2, 2) if dims == 3 else 2
        if not use_conv and out_channels != channels:
            raise ValueError(f"average pooling cannot turn {channels} channels into {out_channels}")
        self.channels = channels
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
        use_conv: a change of channels on the residual connection uses a 3-wide convolution instead of a 1-wide one.
        use_scale_shift_norm: the embedding scales and shifts the second normalisation instead of being added before it.
        up, down: resample both branches by two, the main one before its first convolution.
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
        self.out_channels = out_channels
        self.use_checkpoint = use_checkpoint
        self.use_scale_shift_norm = use_scale_shift_norm
        self.in_layers = nn.Sequential(
            normalization(channels), nn.SiLU(), conv_nd(dims, channels, out_channels, 3, padding=1)
        )
        resample = Upsample if up else Downsample if down else None
        self.resample = resample(channels, use_conv=False, dims=dims) if resample else None
        emb_out_channels = 2 * out_channels if use_scale_shift_norm else out_channels
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, emb_out_channels))
        self.out_layers = nn.Sequential(
            normalization(out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            zero_module(conv_nd(dims, out_channels, out_channels, 3, padding=1)),
        )
        if out_channels == channels:
            self.skip_connection = nn.Identity()
        elif use_conv:
            self.skip_connection = conv_nd(dims, channels, out_channels, 3, padding=1)
        else:
            self.skip_connection = conv_nd(dims, channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """`x: (B, C, ...)` and `emb: (B, E)` to (B, out_channels, ...)."""
        return checkpoint(self._forward, (x, emb), self.parameters(), self.use_checkpoint)

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm, activation, convolution = self.in_layers
        h = activation(norm(x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = convolution(h)
        modulation = self.emb_layers(emb).to(h.dtype).reshape(h.shape[0], -1, *[1] * (h.dim() - 2))
        if self.use_scale_shift_norm:
            scale, shift = modulation.chunk(2, dim=1)
            norm, activation, dropout, convolution = self.out_layers
            h = convolution(dropout(activation(norm(h) * (1 + scale) + shift)))
        else:
            h = self.out_layers(h + modulation)
        return self.skip_connection(x) + h


class QKVAttentionLegacy(nn.Module):
    """Multi-head attention on stacked channels: heads outermost, then query, key and value within each head."""

    def __init__(self, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads

    def forward(self, qkv: Tensor) -> Tensor:
        """`(B, 3C, N) -> (B, C, N)`."""
        q, k, v = qkv.transpose(1, 2).unflatten(-1, (self.n_heads, 3, -1)).unbind(dim=3)
        return _attend_to_all(q, k, v)


class QKVAttention(nn.Module):
    """Multi-head attention on stacked channels: query, key and value outermost, then the heads within each."""

    def __init__(self, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads

    def forward(self, qkv: Tensor) -> Tensor:
        """`(B, 3C, N) -> (B, C, N)`."""
        q, k, v = qkv.transpose(1, 2).unflatten(-1, (3, self.n_heads, -1)).unbind(dim=2)
        return _attend_to_all(q, k, v)


def _attend_to_all(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of (B, N, heads, channels) tensors, returned as (B, heads * channels, N)."""
    out = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2).flatten(2).transpose(1, 2)


class AttentionBlock(nn.Module):
    """Residual self-attention between all positions of a feature map; starts as the identity.

    Args:
        num_heads: number of heads, unless `num_head_channels` gives their size.
        num_head_channels: channels of each head; -1 to use `num_heads`.
        use_new_attention_order: split the channels as `QKVAttention` instead of `QKVAttentionLegacy`.

    Raises:
        UserError: the heads do not divide the channels.
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
        self.qkv = conv_nd(1, channels, 3 * channels, 1)
        self.attention = (QKVAttention if use_new_attention_order else QKVAttentionLegacy)(self.num_heads)
        self.proj_out = zero_module(conv_nd(1, channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, ...)` to the same shape."""
        return checkpoint(self._forward, (x,), self.parameters(), self.use_checkpoint)

    def _forward(self, x: Tensor) -> Tensor:
        h = pointwise(self.qkv, self.norm(x).flatten(2))
        h = pointwise(self.proj_out, self.attention(h))
        return x + h.reshape(x.shape)


def pointwise(layer: nn.Conv1d, x: Tensor) -> Tensor:
    """The 1-wide convolution `layer` of `x: (B, C, N)` as a matrix product, which keeps channels-last data in place."""
    return linear(x.transpose(1, 2), layer.weight[:, :, 0], layer.bias).transpose(1, 2)
