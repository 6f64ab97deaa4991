"""The time-conditional U-Net (arXiv:2105.05233, arXiv:2112.10752) and its encoder half as a classifier.

Shapes: B batch, C channels, `...` one to three spatial dimensions (`dims`), M context tokens, D context channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.modules.attention import SpatialTransformer
from ldm.modules.diffusionmodules.unet_blocks import (
    AttentionBlock,
    Downsample,
    QKVAttention,
    QKVAttentionLegacy,
    ResBlock,
    TimestepBlock,
    TimestepEmbedSequential,
    TransposedUpsample,
    Upsample,
    pointwise,
)
from ldm.modules.diffusionmodules.util import conv_nd, normalization, timestep_embedding, zero_module

__all__ = [
    "AttentionBlock",
    "AttentionPool2d",
    "Downsample",
    "EncoderUNetModel",
    "QKVAttention",
    "QKVAttentionLegacy",
    "ResBlock",
    "TimestepBlock",
    "TimestepEmbedSequential",
    "TransposedUpsample",
    "UNetModel",
    "Upsample",
]


@dataclass(frozen=True)
class _Transformers:
    """How the attention layers become transformers with cross-attention."""

    depth: int
    context_dim: int | Sequence[int]
    checkpoint: bool


@dataclass
class _Layers:
    """Makes the layers of one U-Net from its options, and remembers the channels of what it chained so far."""

    channels: int
    emb_channels: int
    dropout: float
    dims: int
    use_checkpoint: bool
    use_scale_shift_norm: bool
    resblock_updown: bool
    conv_resample: bool
    num_heads: int
    num_head_channels: int
    use_new_attention_order: bool
    legacy: bool = True
    transformers: _Transformers | None = None
    skip_channels: list[int] = field(default_factory=list)

    def res_block(self, out_channels: int, extra_channels: int = 0, up: bool = False, down: bool = False) -> ResBlock:
        block = ResBlock(
            self.channels + extra_channels,
            self.emb_channels,
            self.dropout,
            out_channels=out_channels,
            dims=self.dims,
            use_checkpoint=self.use_checkpoint,
            use_scale_shift_norm=self.use_scale_shift_norm,
            up=up,
            down=down,
        )
        self.channels = out_channels
        return block

    def attention(self, num_heads: int | None = None) -> nn.Module:
        num_heads = num_heads or self.num_heads
        if self.transformers is None:
            return AttentionBlock(
                self.channels,
                num_heads=num_heads,
                num_head_channels=self.num_head_channels,
                use_checkpoint=self.use_checkpoint,
                use_new_attention_order=self.use_new_attention_order,
            )
        return SpatialTransformer(
            self.channels,
            *self._transformer_heads(num_heads),
            depth=self.transformers.depth,
            context_dim=self.transformers.context_dim,
            checkpoint=self.transformers.checkpoint,
        )

    def _transformer_heads(self, num_heads: int) -> tuple[int, int]:
        """Number of heads and channels of each. They differ by `legacy` only where the heads do not fit evenly."""
        if self.num_head_channels == -1:
            return num_heads, self.channels // num_heads
        num_heads = self.channels // self.num_head_channels
        return num_heads, self.channels // num_heads if self.legacy else self.num_head_channels

    def downsample(self) -> nn.Module:
        if self.resblock_updown:
            return self.res_block(self.channels, down=True)
        return Downsample(self.channels, self.conv_resample, dims=self.dims)

    def upsample(self) -> nn.Module:
        if self.resblock_updown:
            return self.res_block(self.channels, up=True)
        return Upsample(self.channels, self.conv_resample, dims=self.dims)


class _TimestepNetwork(nn.Module):
    """What both networks share: the timestep embedding, the way down, the middle, and half precision."""

    image_size: int
    in_channels: int
    model_channels: int
    out_channels: int

    def _build_way_down(
        self,
        layers: _Layers,
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        channel_mult: Sequence[int],
    ) -> int:
        """Make the modules up to the middle block; returns the downsampling factor there."""
        self.time_embed = nn.Sequential(
            nn.Linear(self.model_channels, layers.emb_channels),
            nn.SiLU(),
            nn.Linear(layers.emb_channels, layers.emb_channels),
        )
        first = conv_nd(layers.dims, self.in_channels, self.model_channels, 3, padding=1)
        blocks = [TimestepEmbedSequential(first)]
        layers.skip_channels.append(layers.channels)
        factor = 1
        for level, mult in enumerate(channel_mult):
            for _ in range(num_res_blocks):
                block = [layers.res_block(mult * self.model_channels)]
                if factor in attention_resolutions:
                    block.append(layers.attention())
                blocks.append(TimestepEmbedSequential(*block))
                layers.skip_channels.append(layers.channels)
            if level != len(channel_mult) - 1:
                blocks.append(TimestepEmbedSequential(layers.downsample()))
                layers.skip_channels.append(layers.channels)
                factor *= 2
        self.input_blocks = nn.ModuleList(blocks)
        self.middle_block = TimestepEmbedSequential(
            layers.res_block(layers.channels), layers.attention(), layers.res_block(layers.channels)
        )
        return factor

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the blocks compute in (outside autocast)."""
        return next(self.input_blocks.parameters()).dtype

    def _embed(self, timesteps: Tensor) -> Tensor:
        embedding = timestep_embedding(timesteps, self.model_channels)
        return self.time_embed(embedding.to(self.time_embed[0].weight.dtype))

    def _block_lists(self) -> list[nn.Module]:
        return [self.input_blocks, self.middle_block]

    def convert_to_fp16(self) -> None:
        """Put the blocks in half precision; the timestep embedding and the output layers stay in float32."""
        for blocks in self._block_lists():
            blocks.half()

    def convert_to_fp32(self) -> None:
        """Put the blocks back in float32."""
        for blocks in self._block_lists():
            blocks.float()


class UNetModel(_TimestepNetwork):
    """The U-Net with attention and timestep embedding that predicts the noise (or x0) of a latent.

    Args:
        image_size: height and width that it is meant for; other sizes that downsampling divides work too.
        model_channels: channels at the first resolution; `channel_mult` multiplies them at each next one.
        num_res_blocks: residual blocks at each resolution.
        attention_resolutions: downsampling factors (1, 2, 4, ...) at which attention follows each residual block.
        conv_resample: resample with convolutions; otherwise with pooling and nearest neighbours.
        dims: number of spatial dimensions.
        num_classes: adds an embedding of class labels `y` to the timestep embedding.
        use_checkpoint: recompute the blocks in the backward pass instead of storing their activations.
        use_fp16: start with the blocks in half precision.
        num_heads, num_head_channels: attention heads, by number or by size; the size wins if both are given.
        num_heads_upsample: another number of heads on the way up, for legacy self-attention.
        use_scale_shift_norm: see `ResBlock`.
        resblock_updown: resample inside residual blocks.
        use_new_attention_order: see `AttentionBlock`.
        use_spatial_transformer: attention is a transformer of `transformer_depth` blocks that also attends to a
            context of `context_dim` channels (one number, or one for each block).
        n_embed: predict the logits of that many codebook ids instead of `out_channels` channels.
        legacy: the published head-size rule: with the transformer, heads of `num_head_channels` that do not fit
            the channels evenly are widened until they do.
        checkpoint_transformer: recompute transformer blocks in the backward pass, as published; False trains faster
            in more memory. Never matters without gradients.

    Raises:
        UserError: options that contradict each other.
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        dropout: float = 0,
        channel_mult: Sequence[int] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        num_classes: int | None = None,
        use_checkpoint: bool = False,
        use_fp16: bool = False,
        num_heads: int = -1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        use_spatial_transformer: bool = False,
        transformer_depth: int = 1,
        context_dim: int | Sequence[int] | None = None,
        n_embed: int | None = None,
        legacy: bool = True,
        checkpoint_transformer: bool = True,
    ) -> None:
        super().__init__()
        if use_spatial_transformer != (context_dim is not None):
            raise UserError("UNetModel: use_spatial_transformer and context_dim go together; set both or neither")
        if num_heads == -1 and num_head_channels == -1:
            raise UserError("UNetModel: the attention heads are not given; set num_heads or num_head_channels")
        self.image_size = image_size
        self.in_channels = in_channels
        self.model_channels = model_channels
        self.out_channels = out_channels
        self.downsampling = 2 ** (len(channel_mult) - 1)  # sides of maps must be multiples of it
        self.num_classes = num_classes
        self.predict_codebook_ids = n_embed is not None
        layers = _Layers(
            channels=model_channels,
            emb_channels=4 * model_channels,
            dropout=dropout,
            dims=dims,
            use_checkpoint=use_checkpoint,
            use_scale_shift_norm=use_scale_shift_norm,
            resblock_updown=resblock_updown,
            conv_resample=conv_resample,
            num_heads=num_heads,
            num_head_channels=num_head_channels,
            use_new_attention_order=use_new_attention_order,
            legacy=legacy,
        )
        if use_spatial_transformer:
            layers.transformers = _Transformers(transformer_depth, context_dim, checkpoint_transformer)
        self._build_way_down(layers, num_res_blocks, attention_resolutions, channel_mult)
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, layers.emb_channels)
        # As published, only legacy self-attention knows another number of heads on the way up.
        heads_up = num_heads_upsample if legacy and not use_spatial_transformer else -1
        self._build_way_up(layers, num_res_blocks, attention_resolutions, channel_mult, heads_up)
        self.out = nn.Sequential(
            normalization(layers.channels),
            nn.SiLU(),
            zero_module(conv_nd(dims, model_channels, out_channels, 3, padding=1)),
        )
        if n_embed is not None:
            self.id_predictor = nn.Sequential(normalization(layers.channels), conv_nd(dims, model_channels, n_embed, 1))
        if use_fp16:
            self.convert_to_fp16()

    def _build_way_up(
        self,
        layers: _Layers,
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        channel_mult: Sequence[int],
        num_heads: int,
    ) -> None:
        blocks = []
        for level, mult in reversed(list(enumerate(channel_mult))):
            for i in range(num_res_blocks + 1):
                block = [layers.res_block(mult * self.model_channels, extra_channels=layers.skip_channels.pop())]
                if 2**level in attention_resolutions:
                    block.append(layers.attention(None if num_heads == -1 else num_heads))
                if level > 0 and i == num_res_blocks:
                    block.append(layers.upsample())
                blocks.append(TimestepEmbedSequential(*block))
        self.output_blocks = nn.ModuleList(blocks)

    def _block_lists(self) -> list[nn.Module]:
        return [*super()._block_lists(), self.output_blocks]

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor | None = None,
        context: Tensor | None = None,
        y: Tensor | None = None,
        **kwargs: object,
    ) -> Tensor:
        """Predict.

        Args:
            x: (B, in_channels, ...), noisy latents.
            timesteps: (B,), integers or fractions.
            context: (B, M, D) for the transformers' cross-attention, if the model has transformers.
            y: (B,) class labels, exactly if the model has `num_classes`.
            kwargs: ignored.

        Returns:
            (B, out_channels or n_embed, ...) in the dtype of `x`.
        """
        if (y is not None) != (self.num_classes is not None):
            raise ValueError("class labels y must be given exactly if the model has num_classes")
        emb = self._embed(timesteps)
        if y is not None:
            emb = emb + self.label_emb(y)
        h, emb = x.to(self.dtype), emb.to(self.dtype)
        context = context if context is None else context.to(self.dtype)
        skips = []
        for module in self.input_blocks:
            h = module(h, emb, context)
            skips.append(h)
        h = self.middle_block(h, emb, context)
        for module in self.output_blocks:
            h = module(torch.cat([h, skips.pop()], dim=1), emb, context)
        head = self.id_predictor if self.predict_codebook_ids else self.out
        return head(h.to(head[0].weight.dtype)).to(x.dtype)


class AttentionPool2d(nn.Module):
    """Pools a feature map by attention from its mean to all positions, as in CLIP (arXiv:2103.00020).

    Args:
        spacial_dim: height and width of the feature map.
        embed_dim: its channels.
        output_dim: channels of the output; `embed_dim` by default.
    """

    def __init__(
        self, spacial_dim: int, embed_dim: int, num_heads_channels: int, output_dim: int | None = None
    ) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(embed_dim, spacial_dim**2 + 1) / embed_dim**0.5)
        self.qkv_proj = conv_nd(1, embed_dim, 3 * embed_dim, 1)
        self.c_proj = conv_nd(1, embed_dim, output_dim or embed_dim, 1)
        self.num_heads = embed_dim // num_heads_channels
        self.attention = QKVAttention(self.num_heads)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, embed_dim, H, W) -> (B, output_dim)`."""
        x = x.flatten(2)
        x = torch.cat([x.mean(dim=-1, keepdim=True), x], dim=-1) + self.positional_embedding.to(x.dtype)
        x = self.attention(pointwise(self.qkv_proj, x))
        return pointwise(self.c_proj, x[:, :, :1])[:, :, 0]


class EncoderUNetModel(_TimestepNetwork):
    """The way down of the U-Net and a pooling head, for classifying noisy latents.

    Args:
        out_channels: size of the output, such as the number of classes.
        pool: "adaptive" (mean), "attention" (`AttentionPool2d`), or "spatial" and "spatial_v2", two perceptrons on
            the means of every block's feature map.
        num_heads_upsample: belongs to the published signature; there is no way up.

    The other arguments are those of `UNetModel`.

    Raises:
        UserError: an unknown `pool`, or attention pooling without `num_head_channels`.
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        dropout: float = 0,
        channel_mult: Sequence[int] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        use_checkpoint: bool = False,
        use_fp16: bool = False,
        num_heads: int = 1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        pool: str = "adaptive",
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.in_channels = in_channels
        self.model_channels = model_channels
        self.out_channels = out_channels
        self.pool = pool
        layers = _Layers(
            channels=model_channels,
            emb_channels=4 * model_channels,
            dropout=dropout,
            dims=dims,
            use_checkpoint=use_checkpoint,
            use_scale_shift_norm=use_scale_shift_norm,
            resblock_updown=resblock_updown,
            conv_resample=conv_resample,
            num_heads=num_heads,
            num_head_channels=num_head_channels,
            use_new_attention_order=use_new_attention_order,
        )
        factor = self._build_way_down(layers, num_res_blocks, attention_resolutions, channel_mult)
        self.out = self._pooling_head(layers, image_size // factor)
        if use_fp16:
            self.convert_to_fp16()

    def _pooling_head(self, layers: _Layers, size: int) -> nn.Sequential:
        channels, features = layers.channels, layers.channels + sum(layers.skip_channels)
        if self.pool == "adaptive":
            pool = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}[layers.dims](1)
            last = zero_module(conv_nd(layers.dims, channels, self.out_channels, 1))
            return nn.Sequential(normalization(channels), nn.SiLU(), pool, last, nn.Flatten())
        if self.pool == "attention":
            if layers.num_head_channels == -1:
                raise UserError('EncoderUNetModel: pool "attention" needs num_head_channels')
            last = AttentionPool2d(size, channels, layers.num_head_channels, self.out_channels)
            return nn.Sequential(normalization(channels), nn.SiLU(), last)
        if self.pool == "spatial":
            return nn.Sequential(nn.Linear(features, 2048), nn.ReLU(), nn.Linear(2048, self.out_channels))
        if self.pool == "spatial_v2":
            first = nn.Linear(features, 2048)
            return nn.Sequential(first, normalization(2048), nn.SiLU(), nn.Linear(2048, self.out_channels))
        known = "adaptive, attention, spatial, spatial_v2"
        raise UserError(f'EncoderUNetModel: pool "{self.pool}" is unknown; choose one of {known}')

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """`x: (B, in_channels, ...)` and `timesteps: (B,)` to (B, out_channels) in the dtype of `x`."""
        h, emb = x.to(self.dtype), self._embed(timesteps).to(self.dtype)
        means = []
        for module in [*self.input_blocks, self.middle_block]:
            h = module(h, emb)
            if self.pool.startswith("spatial"):
                means.append(h.flatten(2).mean(dim=2))
        features = torch.cat(means, dim=1) if means else h
        dtype = next(self.out.parameters()).dtype
        return self.out(features.to(dtype)).to(x.dtype)
