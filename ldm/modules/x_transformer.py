"""A transformer over token ids, with the state-dict names of the x-transformers package.

Shapes: B batch, N tokens, D channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.modules.attend import attend
from ldm.modules.attention import FeedForward


class AbsolutePositionalEmbedding(nn.Module):
    """One learned vector for each position."""

    def __init__(self, dim: int, max_seq_len: int) -> None:
        super().__init__()
        self.emb = nn.Embedding(max_seq_len, dim)
        nn.init.normal_(self.emb.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """The embeddings (1, N, D) of the positions of `x: (B, N, ...)`."""
        return self.emb.weight[None, : x.shape[1]]


class Attention(nn.Module):
    """Multi-head self-attention; `causal` hides later tokens, `dropout` acts on the attention weights."""

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
        """`x: (B, N, D)` to the same shape; `mask` is boolean (B, N), False where a token must not be seen."""
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.to_q, self.to_k, self.to_v)
        )
        causal = self.causal
        if mask is not None:
            mask = mask[:, None, None, :]
            if causal:
                length = x.shape[1]
                mask = mask & torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
                causal = False
        out = attend(q, k, v, attn_mask=mask, dropout_p=self.dropout if self.training else 0.0, is_causal=causal)
        return self.to_out(out.transpose(1, 2).flatten(2))


class AttentionLayers(nn.Module):
    """`depth` pairs of self-attention and perceptron, each residual with a layer norm before it.

    Arguments that start with `attn_` and `ff_` go to `Attention` and `FeedForward` without that prefix.
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
        """`x: (B, N, D)` to the same shape, not normalised."""
        for norm, block in self.layers:
            h = norm(x)
            x = x + (block(h, mask) if isinstance(block, Attention) else block(h))
        return x


class Encoder(AttentionLayers):
    """Layers in which every token sees all tokens."""

    def __init__(self, dim: int, depth: int, **kwargs: Any) -> None:
        super().__init__(dim, depth, causal=False, **kwargs)


class Decoder(AttentionLayers):
    """Layers in which every token sees itself and the tokens before it."""

    def __init__(self, dim: int, depth: int, **kwargs: Any) -> None:
        super().__init__(dim, depth, causal=True, **kwargs)


class TransformerWrapper(nn.Module):
    """Token ids to embeddings or to logits over the vocabulary.

    Args:
        num_tokens: size of the vocabulary.
        max_seq_len: number of positions.
        attn_layers: an `Encoder` or a `Decoder`.
        emb_dim: channels of the embeddings; another number than the layers' adds a projection.
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
        """Encode.

        Args:
            x: (B, N) token ids, N at most `max_seq_len`.
            return_embeddings: skip the logits.
            mask: boolean (B, N), False where a token must not be seen.

        Returns:
            (B, N, D) embeddings or (B, N, num_tokens) logits.

        Raises:
            UserError: more tokens than positions.
        """
        if x.shape[1] > self.max_seq_len:
            raise UserError(f"{x.shape[1]} tokens for a transformer of {self.max_seq_len} positions; shorten the input")
        h = self.token_emb(x)
        h = self.project_emb(self.emb_dropout(h + self.pos_emb(x)))
        h = self.norm(self.attn_layers(h, mask))
        return h if return_embeddings else self.to_logits(h)
