"""Time-conditional U-Net (arXiv:2105.05233, arXiv:2112.10752) and its encoder as a classifier.

Shapes: B batch, C channels, `...` one to three spatial dimensions (`dims`), M context tokens, D context channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ldm.compat import published_names
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

__getattr__ = published_names(__name__)


@dataclass(frozen=True)
class _Transformers:
    """Options of the transformers with cross-attention that replace the self-attention layers."""

    depth: int
    context_dim: int | Sequence[int]
    checkpoint: bool
    use_linear: bool


@dataclass(frozen=True)
class _Level:
    """Blocks of one resolution: residual blocks, the first of which are followed by attention."""

    channels: int
    res_blocks: int
    attention_blocks: int
    disable_self_attn: bool


def _make_levels(
    model_channels: int,
    channel_mult: Sequence[int],
    num_res_blocks: int | Sequence[int],
    attention_resolutions: Sequence[int],
    num_attention_blocks: Sequence[int] | None = None,
    disable_self_attentions: Sequence[bool] | None = None,
) -> list[_Level]:
    """Return the levels of a U-Net, from the highest resolution to the lowest.

    Raises:
        UserError: A list has another number of values than `channel_mult`.
    """
    count = len(channel_mult)
    res_blocks = [num_res_blocks] * count if isinstance(num_res_blocks, int) else list(num_res_blocks)
    attention_blocks = [n + 1 for n in res_blocks] if num_attention_blocks is None else list(num_attention_blocks)
    disabled = [False] * count if disable_self_attentions is None else list(disable_self_attentions)
    lists: dict[str, Sequence[object]] = {
        "num_res_blocks": res_blocks,
        "num_attention_blocks": attention_blocks,
        "disable_self_attentions": disabled,
    }
    for name, values in lists.items():
        if len(values) != count:
            raise UserError(f"UNetModel: {name} has {len(values)} values for {count} levels of channel_mult")
    return [
        _Level(
            channels=mult * model_channels,
            res_blocks=res_blocks[i],
            attention_blocks=attention_blocks[i] if 2**i in attention_resolutions else 0,
            disable_self_attn=disabled[i],
        )
        for i, mult in enumerate(channel_mult)
    ]


@dataclass
class _Layers:
    """Factory of the layers of one U-Net that tracks the channels of the layers created so far."""

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

    def attention(self, num_heads: int | None = None, disable_self_attn: bool = False) -> nn.Module:
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
            disable_self_attn=disable_self_attn,
            use_linear=self.transformers.use_linear,
            use_checkpoint=self.transformers.checkpoint,
        )

    def _transformer_heads(self, num_heads: int) -> tuple[int, int]:
        """Return the number of heads and the channels per head.

        The option `legacy` matters only if `num_head_channels` does not divide the channels.
        """
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
    """Base class of both networks: timestep embedding, encoder, middle block and half precision."""

    image_size: int
    in_channels: int
    model_channels: int
    out_channels: int

    def _build_encoder(self, layers: _Layers, levels: Sequence[_Level], disable_middle_self_attn: bool = False) -> None:
        """Create the modules up to and including the middle block, and record the options of the layers."""
        self.dropout, self.conv_resample = layers.dropout, layers.conv_resample
        self.num_heads, self.num_head_channels = layers.num_heads, layers.num_head_channels
        self.use_checkpoint = layers.use_checkpoint
        self.time_embed = nn.Sequential(
            nn.Linear(self.model_channels, layers.emb_channels),
            nn.SiLU(),
            nn.Linear(layers.emb_channels, layers.emb_channels),
        )
        first = conv_nd(layers.dims, self.in_channels, self.model_channels, 3, padding=1)
        blocks = [TimestepEmbedSequential(first)]
        layers.skip_channels.append(layers.channels)
        for level in levels:
            for i in range(level.res_blocks):
                block: list[nn.Module] = [layers.res_block(level.channels)]
                if i < level.attention_blocks:
                    block.append(layers.attention(disable_self_attn=level.disable_self_attn))
                blocks.append(TimestepEmbedSequential(*block))
                layers.skip_channels.append(layers.channels)
            if level is not levels[-1]:
                blocks.append(TimestepEmbedSequential(layers.downsample()))
                layers.skip_channels.append(layers.channels)
        self.input_blocks = nn.ModuleList(blocks)
        self.middle_block = TimestepEmbedSequential(
            layers.res_block(layers.channels),
            layers.attention(disable_self_attn=disable_middle_self_attn),
            layers.res_block(layers.channels),
        )

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the blocks' weights."""
        return next(self.input_blocks.parameters()).dtype

    def _embed(self, timesteps: Tensor) -> Tensor:
        embedding = timestep_embedding(timesteps, self.model_channels)
        return self.time_embed(embedding.to(next(self.time_embed.parameters()).dtype))

    def _block_lists(self) -> list[nn.Module]:
        return [self.input_blocks, self.middle_block]

    def convert_to_fp16(self) -> None:
        """Convert the blocks to float16; the timestep embedding and the output layers stay in float32."""
        for blocks in self._block_lists():
            blocks.half()

    def convert_to_fp32(self) -> None:
        """Convert the blocks to float32."""
        for blocks in self._block_lists():
            blocks.float()


class UNetModel(_TimestepNetwork):
    """U-Net with attention and timestep embedding that predicts the noise, x_0 or v of a noisy latent.

    Args:
        image_size: nominal height and width; other multiples of the downsampling factor are accepted.
        model_channels: base number of channels; level `i` has `model_channels * channel_mult[i]`.
        num_res_blocks: number of residual blocks per resolution: one number, or one for each level.
        attention_resolutions: downsampling factors (1, 2, 4, ...) at which attention follows each residual block.
        conv_resample: resample with convolutions instead of average pooling and nearest-neighbour interpolation.
        dims: number of spatial dimensions.
        num_classes: number of classes; adds an embedding of the class labels `y` to the timestep embedding. With
            "continuous" `y` is (B, 1) and embedded by a linear layer; with "sequential" it is (B, adm_in_channels) and
            embedded by a perceptron.
        use_checkpoint: recompute the blocks in the backward pass instead of storing their activations.
        use_fp16: convert the blocks to float16.
        num_heads, num_head_channels: number of attention heads or channels per head; the latter takes precedence.
        num_heads_upsample: number of heads in the decoder, for legacy self-attention.
        use_scale_shift_norm: see `ResBlock`.
        resblock_updown: resample inside residual blocks.
        use_new_attention_order: see `AttentionBlock`.
        use_spatial_transformer: use transformers of `transformer_depth` blocks as attention layers. They also attend
            to a context of `context_dim` channels (one number, or one for each block).
        n_embed: number of codebook ids; predict their logits instead of `out_channels` channels.
        legacy: use the published rule for the head size: transformer heads are widened to divide the channels if
            `num_head_channels` does not.
        disable_self_attentions: for each level, attend to the context instead of the feature map.
        num_attention_blocks: for each level, number of residual blocks that attention follows; by default all.
        disable_middle_self_attn: the same as `disable_self_attentions` for the middle block.
        use_linear_in_transformer: see `use_linear` of `SpatialTransformer`.
        adm_in_channels: channels of `y` for `num_classes: sequential`.
        checkpoint_transformer: recompute the transformer blocks in the backward pass, as published. False is faster in
            training and needs more memory. There is no effect without gradients.

    Raises:
        UserError: the options contradict each other.
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int | Sequence[int],
        attention_resolutions: Sequence[int],
        dropout: float = 0,
        channel_mult: Sequence[int] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        num_classes: int | str | None = None,
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
        disable_self_attentions: Sequence[bool] | None = None,
        num_attention_blocks: Sequence[int] | None = None,
        disable_middle_self_attn: bool = False,
        use_linear_in_transformer: bool = False,
        adm_in_channels: int | None = None,
        checkpoint_transformer: bool = True,
    ) -> None:
        super().__init__()
        if use_spatial_transformer != (context_dim is not None):
            raise UserError("UNetModel: use_spatial_transformer and context_dim go together; set both or neither")
        if num_heads == -1 and num_head_channels == -1:
            raise UserError("UNetModel: the number of attention heads is missing; set num_heads or num_head_channels")
        self.image_size = image_size
        self.in_channels = in_channels
        self.model_channels = model_channels
        self.out_channels = out_channels
        self.num_res_blocks = num_res_blocks
        self.attention_resolutions = attention_resolutions
        self.channel_mult = channel_mult
        self.num_heads_upsample = num_heads if num_heads_upsample == -1 else num_heads_upsample
        self.downsampling = 2 ** (len(channel_mult) - 1)  # height and width must be multiples of it
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
        if context_dim is not None:
            layers.transformers = _Transformers(
                transformer_depth, context_dim, checkpoint_transformer, use_linear_in_transformer
            )
        levels = _make_levels(
            model_channels,
            channel_mult,
            num_res_blocks,
            attention_resolutions,
            num_attention_blocks,
            disable_self_attentions,
        )
        self._build_encoder(layers, levels, disable_middle_self_attn)
        if num_classes is not None:
            self.label_emb = _label_embedding(num_classes, adm_in_channels, layers.emb_channels)
        # As published, only legacy self-attention may have another number of heads in the decoder.
        decoder_heads = num_heads_upsample if legacy and not use_spatial_transformer else -1
        self._build_decoder(layers, levels, None if decoder_heads == -1 else decoder_heads)
        self.out = nn.Sequential(
            normalization(layers.channels),
            nn.SiLU(),
            zero_module(conv_nd(dims, model_channels, out_channels, 3, padding=1)),
        )
        if n_embed is not None:
            self.id_predictor = nn.Sequential(normalization(layers.channels), conv_nd(dims, model_channels, n_embed, 1))
        if use_fp16:
            self.convert_to_fp16()

    def _build_decoder(self, layers: _Layers, levels: Sequence[_Level], num_heads: int | None) -> None:
        blocks = []
        for level in reversed(levels):
            for i in range(level.res_blocks + 1):
                skip = layers.skip_channels.pop()
                block: list[nn.Module] = [layers.res_block(level.channels, extra_channels=skip)]
                if i < level.attention_blocks:
                    block.append(layers.attention(num_heads, level.disable_self_attn))
                if level is not levels[0] and i == level.res_blocks:
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
        """Return the prediction of the network.

        Args:
            x: noisy latents (B, in_channels, ...).
            timesteps: (B,), integers or fractions.
            context: (B, M, D) for cross-attention, used by models with transformers.
            y: class labels, required if and only if the model has `num_classes`: (B,), or as `num_classes` says.
            kwargs: ignored.

        Returns:
            (B, out_channels or n_embed, ...) in the dtype of `x`.
        """
        if timesteps is None:
            raise ValueError("timesteps are required")
        if (y is not None) != (self.num_classes is not None):
            raise ValueError("class labels y are required if and only if the model has num_classes")
        emb = self._embed(timesteps)
        if y is not None:
            labels = y if isinstance(self.num_classes, int) else y.to(emb.dtype)
            emb = emb + self.label_emb(labels)
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


def _label_embedding(num_classes: int | str, channels: int | None, emb_channels: int) -> nn.Module:
    """Return the embedding of the labels `y`; see `num_classes` of `UNetModel`."""
    if isinstance(num_classes, int):
        return nn.Embedding(num_classes, emb_channels)
    if num_classes == "continuous":
        return nn.Linear(1, emb_channels)
    if num_classes != "sequential":
        raise UserError(f'UNetModel: num_classes "{num_classes}" is neither a number, "continuous" nor "sequential"')
    if channels is None:
        raise UserError('UNetModel: num_classes "sequential" needs adm_in_channels')
    perceptron = nn.Sequential(nn.Linear(channels, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels))
    return nn.Sequential(perceptron)  # the published name is label_emb.0


class AttentionPool2d(nn.Module):
    """Attention pooling of a feature map, with its mean as the query, as in CLIP (arXiv:2103.00020).

    Args:
        spacial_dim: height and width of the feature map.
        embed_dim: channels of the feature map.
        output_dim: channels of the output; `embed_dim` by default.
    """

    def __init__(
        self, spacial_dim: int, embed_dim: int, num_heads_channels: int, output_dim: int | None = None
    ) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(embed_dim, spacial_dim**2 + 1) / embed_dim**0.5)
        self.qkv_proj = nn.Conv1d(embed_dim, 3 * embed_dim, 1)
        self.c_proj = nn.Conv1d(embed_dim, output_dim or embed_dim, 1)
        self.num_heads = embed_dim // num_heads_channels
        self.attention = QKVAttention(self.num_heads)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, embed_dim, H, W) to (B, output_dim).

        Raises:
            UserError: the feature map has another number of positions than the positional embedding.
        """
        height, width = x.shape[2:]
        if height * width + 1 != self.positional_embedding.shape[1]:
            side = math.isqrt(self.positional_embedding.shape[1] - 1)
            raise UserError(
                f"attention pooling takes feature maps of {side} x {side} and gets {height} x {width}; "
                "use images of the size that the network is built for, or pool: adaptive"
            )
        x = x.flatten(2)
        x = torch.cat([x.mean(dim=-1, keepdim=True), x], dim=-1) + self.positional_embedding.to(x.dtype)
        x = self.attention(pointwise(self.qkv_proj, x))
        return pointwise(self.c_proj, x[:, :, :1])[:, :, 0]


class EncoderUNetModel(_TimestepNetwork):
    """Encoder of the U-Net with a pooling head, for the classification of noisy latents.

    Args:
        out_channels: size of the output, such as the number of classes.
        pool: "adaptive" (mean), "attention" (`AttentionPool2d`), or "spatial" and "spatial_v2", two perceptrons on
            the means of every block's feature map.
        num_heads_upsample: not used, part of the published signature.

    The other arguments are those of `UNetModel`.

    Raises:
        UserError: `pool` is unknown, or attention pooling lacks `num_head_channels`.
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
        self.num_res_blocks = num_res_blocks
        self.attention_resolutions = attention_resolutions
        self.channel_mult = channel_mult
        self.num_heads_upsample = num_heads if num_heads_upsample == -1 else num_heads_upsample
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
        self._build_encoder(layers, _make_levels(model_channels, channel_mult, num_res_blocks, attention_resolutions))
        self.out = self._pooling_head(layers, image_size // 2 ** (len(channel_mult) - 1))
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
        """Map `x` (B, in_channels, ...) and `timesteps` (B,) to (B, out_channels) in the dtype of `x`."""
        h, emb = x.to(self.dtype), self._embed(timesteps).to(self.dtype)
        means = []
        for module in [*self.input_blocks, self.middle_block]:
            h = module(h, emb)
            if self.pool.startswith("spatial"):
                means.append(h.flatten(2).mean(dim=2))
        features = torch.cat(means, dim=1) if means else h
        dtype = next(self.out.parameters()).dtype
        return self.out(features.to(dtype)).to(x.dtype)
