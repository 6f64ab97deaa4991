"""Text transformer of OpenCLIP (arXiv:2212.07143), under OpenCLIP's own names of weights.

Shapes: B batch, L tokens, D channels.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn


class ResidualAttentionBlock(nn.Module):
    """Causal self-attention and a perceptron, each with a layer norm before it and a residual connection."""

    def __init__(self, width: int, heads: int, mlp_width: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(width)
        perceptron = OrderedDict(c_fc=nn.Linear(width, mlp_width), gelu=nn.GELU(), c_proj=nn.Linear(mlp_width, width))
        self.mlp = nn.Sequential(perceptron)

    def forward(self, x: Tensor, attn_mask: Tensor) -> Tensor:
        """Map (B, L, D) to the same shape; `attn_mask` (L, L) is True for positions to ignore."""
        h = self.ln_1(x)
        x = x + self.attn(h, h, h, attn_mask=attn_mask, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """Sequence of attention blocks."""

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(ResidualAttentionBlock(width, heads, 4 * width) for _ in range(layers))

    def forward(self, x: Tensor, attn_mask: Tensor, layers: int) -> Tensor:
        """Apply the first `layers` blocks to `x` (B, L, D)."""
        for block in self.resblocks[:layers]:
            x = block(x, attn_mask)
        return x


class OpenCLIPText(nn.Module):
    """Text part of an OpenCLIP model.

    Args:
        vocab_size: number of tokens.
        context_length: L.
        width: D.
        heads: number of attention heads.
        layers: number of blocks.
        embed_dim: channels of the joint space of texts and images, used by `text_projection` only; None for a model
            without that space, as in files of diffusers.
    """

    def __init__(
        self,
        vocab_size: int = 49408,
        context_length: int = 77,
        width: int = 1024,
        heads: int = 16,
        layers: int = 24,
        embed_dim: int | None = 1024,
    ) -> None:
        super().__init__()
        self.context_length = context_length
        self.layers = layers
        self.transformer = Transformer(width, layers, heads)
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, width))
        self.ln_final = nn.LayerNorm(width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        if embed_dim is not None:
            # Published checkpoints hold these two; the conditioning of a diffusion model does not use them.
            self.text_projection = nn.Parameter(torch.empty(width, embed_dim))
            self.logit_scale = nn.Parameter(torch.tensor(100.0).log())
            nn.init.normal_(self.text_projection, std=width**-0.5)

    def forward(self, tokens: Tensor, skip_last: int = 0) -> Tensor:
        """Map token ids (B, L) to the features (B, L, D) after the final layer norm, without the last blocks.

        Args:
            tokens: int64.
            skip_last: number of blocks to leave out at the end.
        """
        length = tokens.shape[1]
        x = self.token_embedding(tokens) + self.positional_embedding[:length]
        causal = torch.ones(length, length, dtype=torch.bool, device=tokens.device).triu(1)
        return self.ln_final(self.transformer(x, causal, self.layers - skip_last))
