"""Transformer over token ids, with the state-dict names of the x-transformers package.

Shapes: B batch, N tokens, D channels.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.modules.attend import attend
from ldm.modules.attention import FeedForward


class AbsolutePositionalEmbedding(nn.Module):
    """Learned embedding of token positions."""

    def __init__(self, dim: int, max_seq_len: int) -> None:
        super().__init__()
        self.emb = nn.Embedding(max_seq_len, dim)
        nn.init.normal_(self.emb.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Return the embeddings (1, N, D) of the positions of `x` (B, N, ...)."""
        return self.emb.weight[None, : x.shape[1]]


class Attention(nn.Module):
    """Multi-head self-attention.

    Args:
        causal: mask later tokens.
        dropout: dropout of the attention weights.
    """

    def __init__(
        self, dim: int, heads: int = 8, dim_head: int = 64, causal: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__()
        inner_dim = heads * dim_head
        self.heads = heads
        self.causal = causal
        self.dropout = dropout
        self.to_q = nn.Linear(dim, inner_dim, bias=False)
        self.to_k = nn.Linear(dim, inner_dim, bias=False)
        self.to_v = nn.Linear(dim, inner_dim, bias=False)
        self.to_out = nn.Linear(inner_dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map `x` (B, N, D) to the same shape; `mask` is boolean (B, N), False for tokens to ignore."""
        q, k, v = (
            rearrange(layer(x), "b n (h d) -> b h n d", h=self.heads) for layer in (self.to_q, self.to_k, self.to_v)
        )
        causal = self.causal
        if mask is not None:
            mask = mask[:, None, None, :]
            if causal:
                length = x.shape[1]
                mask = mask & torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
                causal = False
        out = attend(q, k, v, attn_mask=mask, dropout_p=self.dropout if self.training else 0.0, is_causal=causal)
        return self.to_out(rearrange(out, "b h n d -> b n (h d)"))


class AttentionLayers(nn.Module):
    """Stack of self-attention and perceptron blocks, each with a layer norm before it and a residual connection.

    Args:
        depth: number of pairs of self-attention and perceptron.
        attn_dim_head, attn_dropout: `dim_head` and `dropout` of `Attention`.
        ff_mult, ff_glu, ff_dropout: `mult`, `glu` and `dropout` of `FeedForward`.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int = 8,
        causal: bool = False,
        attn_dim_head: int = 64,
        attn_dropout: float = 0.0,
        ff_mult: int = 4,
        ff_glu: bool = False,
        ff_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.dim = dim
        blocks: list[nn.Module] = []
        for _ in range(depth):
            blocks.append(Attention(dim, heads, attn_dim_head, causal, attn_dropout))
            blocks.append(FeedForward(dim, mult=ff_mult, glu=ff_glu, dropout=ff_dropout))
        self.layers = nn.ModuleList(nn.ModuleList([nn.LayerNorm(dim), block]) for block in blocks)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map `x` (B, N, D) to the same shape, without a final normalisation."""
        for norm, block in cast(Iterable[tuple[nn.LayerNorm, nn.Module]], self.layers):
            h = norm(x)
            x = x + (block(h, mask) if isinstance(block, Attention) else block(h))
        return x


class Encoder(AttentionLayers):
    """Attention layers in which every token attends to all tokens."""

    def __init__(self, dim: int, depth: int, **kwargs: Any) -> None:
        super().__init__(dim, depth, causal=False, **kwargs)


class Decoder(AttentionLayers):
    """Attention layers in which every token attends to itself and to earlier tokens."""

    def __init__(self, dim: int, depth: int, **kwargs: Any) -> None:
        super().__init__(dim, depth, causal=True, **kwargs)


class TransformerWrapper(nn.Module):
    """Transformer that maps token ids to embeddings or to logits over the vocabulary.

    Args:
        num_tokens: size of the vocabulary.
        max_seq_len: number of positions.
        attn_layers: an `Encoder` or a `Decoder`.
        emb_dim: channels of the embeddings; a projection follows if it differs from the width of the layers.
        emb_dropout: dropout after the embeddings.
    """

    def __init__(
        self,
        num_tokens: int,
        max_seq_len: int,
        attn_layers: AttentionLayers,
        emb_dim: int | None = None,
        emb_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        dim = attn_layers.dim
        emb_dim = emb_dim or dim
        self.max_seq_len = max_seq_len
        self.num_tokens = num_tokens
        self.token_emb = nn.Embedding(num_tokens, emb_dim)
        nn.init.normal_(self.token_emb.weight, std=0.02)
        self.pos_emb = AbsolutePositionalEmbedding(emb_dim, max_seq_len)
        self.emb_dropout = nn.Dropout(emb_dropout)
        self.project_emb = nn.Linear(emb_dim, dim) if emb_dim != dim else nn.Identity()
        self.attn_layers = attn_layers
        self.norm = nn.LayerNorm(dim)
        self.to_logits = nn.Linear(dim, num_tokens)

    def forward(self, x: Tensor, return_embeddings: bool = False, mask: Tensor | None = None) -> Tensor:
        """Encode token ids.

        Args:
            x: (B, N) token ids, N at most `max_seq_len`.
            return_embeddings: return the embeddings instead of the logits.
            mask: boolean (B, N), False for tokens to ignore.

        Returns:
            (B, N, D) embeddings or (B, N, num_tokens) logits.

        Raises:
            UserError: `x` has more than `max_seq_len` tokens.
        """
        if x.shape[1] > self.max_seq_len:
            raise UserError(
                f"the input has {x.shape[1]} tokens, but the transformer has {self.max_seq_len} positions; "
                "shorten the input"
            )
        h = self.token_emb(x)
        h = self.project_emb(self.emb_dropout(h + self.pos_emb(x)))
        h = self.norm(self.attn_layers(h, mask))
        return h if return_embeddings else self.to_logits(h)
