"""Published networks that no published configuration uses: a U-Net of images, small decoders, rescalers of latents.

Shapes: B batch, C channels, H and W height and width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.config.instantiate import instantiate_from_config
from ldm.modules.attention import Normalize
from ldm.modules.attention import SpatialSelfAttention as AttnBlock
from ldm.modules.diffusionmodules.model import (
    Decoder,
    Downsample,
    Encoder,
    ResnetBlock,
    Upsample,
    make_attn,
    nonlinearity,
)
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.frozen import freeze


def get_timestep_embedding(timesteps: Tensor, embedding_dim: int) -> Tensor:
    """Return the sinusoidal embedding of timesteps (B,), sines first: (B, embedding_dim) in float32.

    The frequencies go from 1 down to 1 / 10000. The last entry of an odd `embedding_dim` is zero.
    """
    half = embedding_dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / (half - 1)
    angles = timesteps.float()[:, None] * torch.exp(-math.log(10000) * exponents)
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, embedding_dim % 2))


class _TimestepEmbedding(nn.Module):
    """Two linear layers on the sinusoidal embedding of timesteps."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.dense = nn.ModuleList([nn.Linear(channels, out_channels), nn.Linear(out_channels, out_channels)])

    def forward(self, t: Tensor) -> Tensor:
        first, second = cast(Iterable[nn.Linear], self.dense)
        return second(nonlinearity(first(get_timestep_embedding(t, self.channels).to(first.weight.dtype))))


class _Level(nn.Module):
    """Layers of one resolution: residual blocks, each followed by attention if there is a type of attention."""

    downsample: Downsample  # all but the last level on the way down
    upsample: Upsample  # all but the last level on the way up

    def __init__(self, blocks: Sequence[nn.Module], channels: int, attn_type: str | None) -> None:
        super().__init__()
        self.block = nn.ModuleList(blocks)
        self.attn = nn.ModuleList(make_attn(channels, attn_type) for _ in blocks if attn_type is not None)

    def forward(self, n: int, h: Tensor, temb: Tensor | None) -> Tensor:
        """Run the n-th residual block, and its attention."""
        h = self.block[n](h, temb)
        return self.attn[n](h) if self.attn else h


class _Middle(nn.Module):
    """Layers at the lowest resolution: residual block, attention, residual block."""

    def __init__(self, block_1: nn.Module, attn_1: nn.Module, block_2: nn.Module) -> None:
        super().__init__()
        self.block_1 = block_1
        self.attn_1 = attn_1
        self.block_2 = block_2

    def forward(self, h: Tensor, temb: Tensor | None) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(h, temb)), temb)


class Model(nn.Module):
    """U-Net of DDPM (arXiv:2006.11239, appendix B), with an optional embedding of the timestep.

    Args:
        use_timestep: embed the timestep.
        ch, out_ch, ch_mult, num_res_blocks, attn_resolutions, dropout: see `Encoder` and `Decoder`.
        resamp_with_conv, in_channels, resolution, use_linear_attn, attn_type: see `Encoder` and `Decoder`.
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
        in_channels: int,
        resolution: int,
        use_timestep: bool = True,
        use_linear_attn: bool = False,
        attn_type: str = "vanilla",
    ) -> None:
        super().__init__()
        attn_type = "linear" if use_linear_attn else attn_type
        self.ch, self.temb_ch = ch, 4 * ch
        self.num_resolutions, self.num_res_blocks = len(ch_mult), num_res_blocks
        self.resolution, self.in_channels = resolution, in_channels
        self.use_timestep = use_timestep
        if use_timestep:
            self.temb = _TimestepEmbedding(ch, self.temb_ch)

        def res_block(c_in: int, c_out: int) -> ResnetBlock:
            return ResnetBlock(in_channels=c_in, out_channels=c_out, dropout=dropout, temb_channels=self.temb_ch)

        widths = [ch * factor for factor in ch_mult]
        attended = [resolution // 2**i in attn_resolutions for i in range(len(widths))]
        self.conv_in = nn.Conv2d(in_channels, ch, kernel_size=3, padding=1)
        self.down = nn.ModuleList()
        width, skips = ch, [ch]
        for i, out_width in enumerate(widths):
            pairs = [(out_width if n else width, out_width) for n in range(num_res_blocks)]
            level = _Level([res_block(*pair) for pair in pairs], out_width, attn_type if attended[i] else None)
            skips += [out_width] * num_res_blocks
            if i != len(widths) - 1:
                level.downsample = Downsample(out_width, resamp_with_conv)
                skips.append(out_width)
            self.down.append(level)
            width = out_width
        self.mid = _Middle(res_block(width, width), make_attn(width, attn_type), res_block(width, width))
        levels = []
        for i, out_width in reversed(list(enumerate(widths))):
            blocks = []
            for _ in range(num_res_blocks + 1):
                blocks.append(res_block(width + skips.pop(), out_width))
                width = out_width
            level = _Level(blocks, out_width, attn_type if attended[i] else None)
            if i != 0:
                level.upsample = Upsample(out_width, resamp_with_conv)
            levels.append(level)
        self.up = nn.ModuleList(reversed(levels))  # up[i] has the resolution of down[i]
        self.norm_out = Normalize(width)
        self.conv_out = nn.Conv2d(width, out_ch, kernel_size=3, padding=1)

    def forward(self, x: Tensor, t: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        """Map (B, C, H, W) to (B, out_ch, H, W).

        Args:
            x: images.
            t: timesteps (B,), needed with `use_timestep`.
            context: maps of the same size to join to the channels of x; `in_channels` is their total.

        Raises:
            ValueError: the timesteps are missing.
        """
        x = x if context is None else torch.cat([x, context], dim=1)
        temb = self._embed(t) if self.use_timestep else None
        h = self.conv_in(x)
        skips = [h]
        for i, level in enumerate(cast(Iterable[_Level], self.down)):
            for n in range(self.num_res_blocks):
                h = level(n, h, temb)
                skips.append(h)
            if i != self.num_resolutions - 1:
                h = level.downsample(h)
                skips.append(h)
        h = self.mid(h, temb)
        for i, level in reversed(list(enumerate(cast(Iterable[_Level], self.up)))):
            for n in range(self.num_res_blocks + 1):
                h = level(n, torch.cat([h, skips.pop()], dim=1), temb)
            if i != 0:
                h = level.upsample(h)
        return self.conv_out(nonlinearity(self.norm_out(h)))

    def _embed(self, t: Tensor | None) -> Tensor:
        if t is None:
            raise ValueError("this model has use_timestep and needs the timesteps t")
        return self.temb(t)

    def get_last_layer(self) -> Tensor:
        """Return the weight of the last layer."""
        return self.conv_out.weight


class SimpleDecoder(nn.Module):
    """Decoder of three residual blocks that doubles the resolution once.

    Args:
        in_channels, out_channels: channels of the feature map and of the image.
        *args, **kwargs: ignored, so that it can replace another decoder.
    """

    def __init__(self, in_channels: int, out_channels: int, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        c = in_channels
        self.model = nn.ModuleList(
            [
                nn.Conv2d(c, c, kernel_size=1),
                *(_plain_block(c * before, c * after) for before, after in ((1, 2), (2, 4), (4, 2))),
                nn.Conv2d(2 * c, c, kernel_size=1),
                Upsample(c, with_conv=True),
            ]
        )
        self.norm_out = Normalize(c)
        self.conv_out = nn.Conv2d(c, out_channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, out_channels, 2H, 2W)."""
        for layer in self.model:
            x = layer(x)
        return self.conv_out(nonlinearity(self.norm_out(x)))


class UpsampleDecoder(nn.Module):
    """Decoder of residual blocks that doubles the resolution at every level except the last.

    Args:
        in_channels, out_channels: channels of the feature map and of the image.
        ch, ch_mult: level `i` has `ch * ch_mult[i]` channels, in the order of the forward pass.
        num_res_blocks: number of residual blocks per level, minus one.
        resolution: size of the image; not used.
        dropout: dropout probability in the residual blocks.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        ch: int,
        num_res_blocks: int,
        resolution: int,
        ch_mult: Sequence[int] = (2, 2),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.temb_ch = 0
        self.num_resolutions, self.num_res_blocks = len(ch_mult), num_res_blocks
        self.res_blocks, self.upsample_blocks = nn.ModuleList(), nn.ModuleList()
        width = in_channels
        for i, factor in enumerate(ch_mult):
            blocks = nn.ModuleList()
            for _ in range(num_res_blocks + 1):
                blocks.append(_plain_block(width, ch * factor, dropout))
                width = ch * factor
            self.res_blocks.append(blocks)
            if i != self.num_resolutions - 1:
                self.upsample_blocks.append(Upsample(width, with_conv=True))
        self.norm_out = Normalize(width)
        self.conv_out = nn.Conv2d(width, out_channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, out_channels, H · f, W · f), with f = 2^(levels - 1)."""
        for i, blocks in enumerate(cast(Iterable[nn.ModuleList], self.res_blocks)):
            for block in blocks:
                x = block(x)
            if i != self.num_resolutions - 1:
                x = self.upsample_blocks[i](x)
        return self.conv_out(nonlinearity(self.norm_out(x)))


class LatentRescaler(nn.Module):
    """Learned rescaling of a feature map by `factor`: residual blocks before it, attention and residual blocks after.

    Args:
        factor: size of the result divided by the size of the input.
        in_channels, mid_channels, out_channels: channels of the input, of the blocks and of the result.
        depth: number of residual blocks before, and after, the rescaling.
    """

    def __init__(self, factor: float, in_channels: int, mid_channels: int, out_channels: int, depth: int = 2) -> None:
        super().__init__()
        self.factor = factor
        self.conv_in = nn.Conv2d(in_channels, mid_channels, kernel_size=3, padding=1)
        self.res_block1 = nn.ModuleList(_plain_block(mid_channels, mid_channels) for _ in range(depth))
        self.attn = AttnBlock(mid_channels)
        self.res_block2 = nn.ModuleList(_plain_block(mid_channels, mid_channels) for _ in range(depth))
        self.conv_out = nn.Conv2d(mid_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, out_channels, H · factor, W · factor), rounded."""
        x = self.conv_in(x)
        for block in self.res_block1:
            x = block(x)
        x = F.interpolate(x, size=tuple(round(side * self.factor) for side in x.shape[2:]))
        x = self.attn(x)
        for block in self.res_block2:
            x = block(x)
        return self.conv_out(x)


class MergedRescaleEncoder(nn.Module):
    """`Encoder` followed by a `LatentRescaler`.

    Args:
        out_ch: channels of the result.
        rescale_factor, rescale_module_depth: `factor` and `depth` of the `LatentRescaler`.
        in_channels, ch, resolution, num_res_blocks, attn_resolutions: see `Encoder`.
        dropout, resamp_with_conv, ch_mult: see `Encoder`.
    """

    def __init__(
        self,
        in_channels: int,
        ch: int,
        resolution: int,
        out_ch: int,
        num_res_blocks: int,
        attn_resolutions: Iterable[int],
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        ch_mult: Sequence[int] = (1, 2, 4, 8),
        rescale_factor: float = 1.0,
        rescale_module_depth: int = 1,
    ) -> None:
        super().__init__()
        width = ch * ch_mult[-1]
        self.encoder = Encoder(
            in_channels=in_channels,
            ch=ch,
            ch_mult=ch_mult,
            num_res_blocks=num_res_blocks,
            attn_resolutions=attn_resolutions,
            dropout=dropout,
            resamp_with_conv=resamp_with_conv,
            resolution=resolution,
            z_channels=width,
            double_z=False,
        )
        self.rescaler = LatentRescaler(rescale_factor, width, width, out_ch, rescale_module_depth)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, out_ch, h, w)."""
        return self.rescaler(self.encoder(x))


class MergedRescaleDecoder(nn.Module):
    """`LatentRescaler` followed by a `Decoder`.

    Args:
        z_channels: channels of the feature map.
        rescale_factor, rescale_module_depth: `factor` and `depth` of the `LatentRescaler`.
        out_ch, resolution, num_res_blocks, attn_resolutions, ch, ch_mult, dropout, resamp_with_conv: see `Decoder`.
    """

    def __init__(
        self,
        z_channels: int,
        out_ch: int,
        resolution: int,
        num_res_blocks: int,
        attn_resolutions: Iterable[int],
        ch: int,
        ch_mult: Sequence[int] = (1, 2, 4, 8),
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        rescale_factor: float = 1.0,
        rescale_module_depth: int = 1,
    ) -> None:
        super().__init__()
        width = z_channels * ch_mult[-1]
        self.decoder = Decoder(
            out_ch=out_ch,
            ch=ch,
            ch_mult=ch_mult,
            num_res_blocks=num_res_blocks,
            attn_resolutions=attn_resolutions,
            dropout=dropout,
            resamp_with_conv=resamp_with_conv,
            resolution=resolution,
            z_channels=width,
        )
        self.rescaler = LatentRescaler(rescale_factor, z_channels, width, width, rescale_module_depth)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, z_channels, h, w) to (B, out_ch, H, W)."""
        return self.decoder(self.rescaler(x))


class Upsampler(nn.Module):
    """Upsampling of a feature map from `in_size` to `out_size` by a `LatentRescaler` and a `Decoder`.

    Args:
        in_size, out_size: sides of the input and of the result; `out_size` is the larger.
        in_channels, out_channels: their channels.
        ch_mult: multiple of `in_channels` in the levels of the decoder.

    Raises:
        ValueError: `out_size` is smaller than `in_size`.
    """

    def __init__(self, in_size: int, out_size: int, in_channels: int, out_channels: int, ch_mult: int = 2) -> None:
        super().__init__()
        if out_size < in_size:
            raise ValueError(f"an Upsampler cannot reduce {in_size} to {out_size}")
        levels = int(math.log2(out_size // in_size)) + 1
        self.rescaler = LatentRescaler(1.0 + out_size % in_size, in_channels, 2 * in_channels, in_channels)
        self.decoder = Decoder(
            out_ch=out_channels,
            ch=in_channels,
            ch_mult=[ch_mult] * levels,
            num_res_blocks=2,
            attn_resolutions=[],
            resolution=out_size,
            z_channels=in_channels,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, out_channels, H', W')."""
        return self.decoder(self.rescaler(x))


class Resize(nn.Module):
    """Resizing by interpolation, or with `learned` halving by a convolution.

    Args:
        in_channels: channels of the map, needed with `learned`.
        learned: halve the size with a strided convolution; `mode` and the scale factor have no effect then.
        mode: interpolation mode.
    """

    def __init__(self, in_channels: int | None = None, learned: bool = False, mode: str = "bilinear") -> None:
        super().__init__()
        self.with_conv = learned
        self.mode = mode
        if learned:
            if in_channels is None:
                raise ValueError("learned resizing needs in_channels")
            self.conv = nn.Conv2d(in_channels, in_channels, kernel_size=4, stride=2, padding=1)

    def forward(self, x: Tensor, scale_factor: float = 1.0) -> Tensor:
        """Map (B, C, H, W) to (B, C, H · scale_factor, W · scale_factor)."""
        if self.with_conv:
            return self.conv(x)
        if scale_factor == 1.0:
            return x
        aligned = None if self.mode in ("nearest", "area", "nearest-exact") else False
        return F.interpolate(x, mode=self.mode, align_corners=aligned, scale_factor=scale_factor)


class FirstStagePostProcessor(nn.Module):
    """Encoder of images on top of a frozen first stage: a residual block and downsampling at each level.

    Args:
        ch_mult: level `i` has `n_channels * ch_mult[i]` channels.
        in_channels: channels of the latent of the first stage.
        pretrained_model: the first stage, unless there is a `pretrained_config`.
        reshape: return the positions as tokens.
        n_channels: base number of channels; by default that of the first stage's encoder.
        dropout: dropout probability in the residual blocks.
        pretrained_config: target and parameters of the first stage.

    Raises:
        ValueError: there is neither a model nor a configuration.
    """

    def __init__(
        self,
        ch_mult: Sequence[int],
        in_channels: int,
        pretrained_model: nn.Module | None = None,
        reshape: bool = False,
        n_channels: int | None = None,
        dropout: float = 0.0,
        pretrained_config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if pretrained_config is not None:
            self.instantiate_pretrained(pretrained_config)
        elif pretrained_model is not None:
            self.pretrained_model: Any = pretrained_model
        else:
            raise ValueError("FirstStagePostProcessor needs a pretrained_model or a pretrained_config")
        self.do_reshape = reshape
        n_channels = self.pretrained_model.encoder.ch if n_channels is None else n_channels
        self.proj_norm = Normalize(in_channels, num_groups=max(1, in_channels // 2))
        self.proj = nn.Conv2d(in_channels, n_channels, kernel_size=3, padding=1)
        self.model, self.downsampler = nn.ModuleList(), nn.ModuleList()
        width = n_channels
        for factor in ch_mult:
            self.model.append(ResnetBlock(in_channels=width, out_channels=factor * n_channels, dropout=dropout))
            width = factor * n_channels
            self.downsampler.append(Downsample(width, with_conv=False))

    def instantiate_pretrained(self, config: Mapping[str, Any]) -> None:
        """Build the first stage and freeze it."""
        self.pretrained_model = freeze(instantiate_from_config(config))

    @torch.no_grad()
    def encode_with_pretrained(self, x: Tensor) -> Tensor:
        """Return the latent of the first stage; of a posterior its mode."""
        encode: Callable[[Tensor], Any] = self.pretrained_model.encode
        encoded = encode(x)
        return encoded.mode() if isinstance(encoded, DiagonalGaussianDistribution) else encoded

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, 3, H, W) to (B, C, h, w), or with `reshape` to (B, h · w, C)."""
        h = nonlinearity(self.proj(self.proj_norm(self.encode_with_pretrained(x))))
        for block, downsample in zip(self.model, self.downsampler, strict=True):
            h = downsample(block(h))
        return rearrange(h, "b c h w -> b (h w) c") if self.do_reshape else h


def _plain_block(in_channels: int, out_channels: int, dropout: float = 0.0) -> ResnetBlock:
    """Return a residual block without an embedding."""
    return ResnetBlock(in_channels=in_channels, out_channels=out_channels, dropout=dropout, temb_channels=0)
