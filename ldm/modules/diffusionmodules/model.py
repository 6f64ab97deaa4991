"""Convolutional encoder and decoder of the first stage.

Shapes: B batch, C channels, H and W height and width.
Every module preserves the dtype, the device and the memory format of its input.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.compat import published_names
from ldm.errors import UserError
from ldm.modules.attention import LinearAttention, Normalize
from ldm.modules.attention import SpatialSelfAttention as AttnBlock  # published name in this module

__getattr__ = published_names(__name__)

ATTENTION_TYPES = ("vanilla", "linear", "none")


def nonlinearity(x: Tensor) -> Tensor:
    """Return the swish activation, `x * sigmoid(x)` (arXiv:1710.05941)."""
    return F.silu(x)


class Upsample(nn.Module):
    """Nearest-neighbour upsampling by two, followed by a 3 x 3 convolution if `with_conv`."""

    def __init__(self, in_channels: int, with_conv: bool) -> None:
        super().__init__()
        self.with_conv = with_conv
        if with_conv:
            self.conv = nn.Conv2d(in_channels, in_channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, 2H, 2W)."""
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv(x) if self.with_conv else x


class Downsample(nn.Module):
    """Downsampling by two with a strided 3 x 3 convolution if `with_conv`, else with average pooling."""

    def __init__(self, in_channels: int, with_conv: bool) -> None:
        super().__init__()
        self.with_conv = with_conv
        if with_conv:
            self.conv = nn.Conv2d(in_channels, in_channels, kernel_size=3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H // 2, W // 2)."""
        if not self.with_conv:
            return F.avg_pool2d(x, kernel_size=2, stride=2)
        # Pad one row below and one column on the right; symmetric padding would shift the image.
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class ResnetBlock(nn.Module):
    """Residual block of two normalized convolutions (arXiv:1512.03385) that optionally adds an embedding.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output; `in_channels` by default.
        conv_shortcut: project the shortcut with a 3 x 3 instead of a 1 x 1 convolution if the channels differ.
        dropout: dropout probability between the convolutions.
        temb_channels: channels of the embedding passed to `forward`; 0 for none.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int | None = None,
        conv_shortcut: bool = False,
        dropout: float,
        temb_channels: int = 512,
    ) -> None:
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        self.in_channels, self.out_channels = in_channels, out_channels
        self.use_conv_shortcut = conv_shortcut

        self.norm1 = Normalize(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        if temb_channels > 0:
            self.temb_proj = nn.Linear(temb_channels, out_channels)
        self.norm2 = Normalize(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1)
        if in_channels != out_channels:
            if conv_shortcut:
                self.conv_shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
            else:
                self.nin_shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        """Map `x` (B, C, H, W) and `temb` (B, temb_channels) to (B, out_channels, H, W)."""
        h = self.conv1(nonlinearity(self.norm1(x)))
        if temb is not None:
            h = h + self.temb_proj(nonlinearity(temb))[:, :, None, None]
        h = self.conv2(self.dropout(nonlinearity(self.norm2(h))))
        return self._shortcut(x) + h

    def _shortcut(self, x: Tensor) -> Tensor:
        if self.in_channels == self.out_channels:
            return x
        return self.conv_shortcut(x) if self.use_conv_shortcut else self.nin_shortcut(x)


class LinAttnBlock(LinearAttention):
    """Linear attention with one head of `in_channels` channels and no residual connection."""

    def __init__(self, in_channels: int) -> None:
        super().__init__(dim=in_channels, heads=1, dim_head=in_channels)


def make_attn(in_channels: int, attn_type: str = "vanilla") -> nn.Module:
    """Return the attention block of a level: "vanilla" (softmax), "linear" or "none" (identity).

    Raises:
        UserError: `attn_type` is unknown.
    """
    if attn_type == "vanilla":
        return AttnBlock(in_channels)
    if attn_type == "linear":
        return LinAttnBlock(in_channels)
    if attn_type == "none":
        return nn.Identity()
    raise UserError(f'attn_type "{attn_type}" is unknown; choose one of {", ".join(ATTENTION_TYPES)}')


class _Level(nn.Module):
    """Residual blocks `channels[0] -> channels[1] -> ...`, each followed by attention if `attention` is set."""

    upsample: Upsample  # all but the last level of a decoder
    downsample: Downsample  # all but the last level of an encoder

    def __init__(self, channels: Sequence[int], attention: bool, attn_type: str, dropout: float) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResnetBlock(in_channels=c_in, out_channels=c_out, dropout=dropout, temb_channels=0)
            for c_in, c_out in pairwise(channels)
        )
        self.attn = nn.ModuleList(make_attn(c_out, attn_type) for c_out in channels[1:] if attention)

    def forward(self, h: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            h = block(h)
            if self.attn:
                h = self.attn[i](h)
        return h


class _Middle(nn.Module):
    """Layers at the lowest resolution: residual block, attention, residual block."""

    def __init__(self, channels: int, attn_type: str, dropout: float) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(in_channels=channels, dropout=dropout, temb_channels=0)
        self.attn_1 = make_attn(channels, attn_type)
        self.block_2 = ResnetBlock(in_channels=channels, dropout=dropout, temb_channels=0)

    def forward(self, h: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(h)))


class Encoder(nn.Module):
    """Encoder from images to feature maps that halves the resolution at every level except the last.

    Args:
        ch: base number of channels; level `i` has `ch * ch_mult[i]`.
        num_res_blocks: number of residual blocks per level.
        attn_resolutions: resolutions with attention, for inputs of the nominal `resolution`.
        dropout: dropout probability in the residual blocks.
        resamp_with_conv: downsample with a strided convolution instead of average pooling.
        in_channels: channels of the image.
        resolution: nominal height and width of the image; other sizes are accepted.
        z_channels: channels of the feature map, doubled by `double_z` (mean and log-variance).
        use_linear_attn: same as `attn_type="linear"`.
        attn_type: see `make_attn`.
        out_ch, **ignored: parameters of `Decoder`, which shares the configuration.
    """

    def __init__(
        self,
        *,
        ch: int,
        out_ch: int | None = None,
        ch_mult: Sequence[int] = (1, 2, 4, 8),
        num_res_blocks: int,
        attn_resolutions: Iterable[int],
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        in_channels: int,
        resolution: int,
        z_channels: int,
        double_z: bool = True,
        use_linear_attn: bool = False,
        attn_type: str = "vanilla",
        **ignored: Any,
    ) -> None:
        super().__init__()
        attn_type = "linear" if use_linear_attn else attn_type
        widths = [ch * multiplier for multiplier in ch_mult]
        self.ch, self.temb_ch, self.in_ch_mult = ch, 0, (1, *ch_mult)
        self.num_resolutions, self.num_res_blocks = len(widths), num_res_blocks
        self.resolution, self.in_channels = resolution, in_channels
        self.conv_in = nn.Conv2d(in_channels, ch, kernel_size=3, padding=1)
        self.down = nn.ModuleList()
        for i, width in enumerate(widths):
            previous = widths[i - 1] if i else ch
            attention = resolution // 2**i in attn_resolutions
            level = _Level([previous] + [width] * num_res_blocks, attention, attn_type, dropout)
            if i != len(widths) - 1:
                level.downsample = Downsample(width, resamp_with_conv)
            self.down.append(level)
        self.mid = _Middle(widths[-1], attn_type, dropout)
        self.norm_out = Normalize(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * z_channels if double_z else z_channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, z_channels or 2 * z_channels, H / f, W / f), with f = 2^(levels - 1)."""
        h = self.conv_in(x)
        for i, level in enumerate(cast(Iterable[_Level], self.down)):
            h = level(h)
            if i != len(self.down) - 1:
                h = level.downsample(h)
        h = self.mid(h)
        return self.conv_out(nonlinearity(self.norm_out(h)))


class Decoder(nn.Module):
    """Decoder from feature maps to images that doubles the resolution at every level except the last.

    The structure mirrors `Encoder`, which documents the shared arguments.

    Args:
        out_ch: channels of the image.
        give_pre_end: return the last features instead of the image.
        tanh_out: apply tanh to the image.
        in_channels, **ignored: parameters of `Encoder`.
    """

    def __init__(
        self,
        *,
        ch: int,
        out_ch: int,
        ch_mult: Sequence[int] = (1, 2, 4, 8),
        num_res_blocks: int,
        attn_resolutions: Iterable[int],
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        in_channels: int | None = None,
        resolution: int,
        z_channels: int,
        give_pre_end: bool = False,
        tanh_out: bool = False,
        use_linear_attn: bool = False,
        attn_type: str = "vanilla",
        **ignored: Any,
    ) -> None:
        super().__init__()
        attn_type = "linear" if use_linear_attn else attn_type
        widths = [ch * multiplier for multiplier in ch_mult]
        self.ch, self.temb_ch = ch, 0
        self.num_resolutions, self.num_res_blocks = len(widths), num_res_blocks
        self.resolution, self.in_channels = resolution, in_channels
        side = resolution // 2 ** (len(widths) - 1)
        self.z_shape = (1, z_channels, side, side)  # of the nominal resolution
        self.last_z_shape: torch.Size | None = None
        self.give_pre_end = give_pre_end
        self.tanh_out = tanh_out
        self.conv_in = nn.Conv2d(z_channels, widths[-1], kernel_size=3, padding=1)
        self.mid = _Middle(widths[-1], attn_type, dropout)
        # up[i] has the resolution of the encoder's down[i]; the forward pass runs from the last to the first.
        self.up = nn.ModuleList()
        for i, width in enumerate(widths):
            previous = widths[min(i + 1, len(widths) - 1)]
            attention = resolution // 2**i in attn_resolutions
            level = _Level([previous] + [width] * (num_res_blocks + 1), attention, attn_type, dropout)
            if i != 0:
                level.upsample = Upsample(width, resamp_with_conv)
            self.up.append(level)
        self.norm_out = Normalize(widths[0])
        self.conv_out = nn.Conv2d(widths[0], out_ch, kernel_size=3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """Map (B, z_channels, h, w) to (B, out_ch, h * f, w * f) or to the last features, with f = 2^(levels - 1)."""
        self.last_z_shape = z.shape
        h = self.mid(self.conv_in(z))
        for i, level in reversed(list(enumerate(cast(Iterable[_Level], self.up)))):
            h = level(h)
            if i != 0:
                h = level.upsample(h)
        if self.give_pre_end:
            return h
        h = self.conv_out(nonlinearity(self.norm_out(h)))
        return torch.tanh(h) if self.tanh_out else h
