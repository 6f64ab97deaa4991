from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.modules.quantize import Remapping, VectorQuantizer2

# VectorQuantizer computes the same result as VectorQuantizer2.
VectorQuantizer = VectorQuantizer2

__all__ = ["EMAVectorQuantizer", "EmbeddingEMA", "GumbelQuantize", "VectorQuantizer", "VectorQuantizer2"]


class GumbelQuantize(Remapping):
    """Quantizer that samples an entry of the codebook with the Gumbel softmax (arXiv:1611.01144).

    Args:
        num_hiddens: channels of the feature map.
        embedding_dim: length of an entry.
        n_embed: number of entries.
        straight_through: in training, return one entry instead of a mixture; its gradient is that of the mixture.
        kl_weight: weight of the KL divergence of the entries' probabilities from equal ones.
        temp_init: temperature of the softmax.
        use_vqinterface: return the indices in the form of the other quantizers.
        remap, unknown_index: see `VectorQuantizer2`.
    """

    def __init__(
        self,
        num_hiddens: int,
        embedding_dim: int,
        n_embed: int,
        straight_through: bool = True,
        kl_weight: float = 5e-4,
        temp_init: float = 1.0,
        use_vqinterface: bool = True,
        remap: str | None = None,
        unknown_index: str | int = "random",
    ) -> None:
        super().__init__()
        self.embedding_dim = embedding_dim
        self.n_embed = n_embed
        self.straight_through = straight_through
        self.temperature = temp_init
        self.kl_weight = kl_weight
        self.proj = nn.Conv2d(num_hiddens, n_embed, 1)
        self.embed = nn.Embedding(n_embed, embedding_dim)
        self.use_vqinterface = use_vqinterface
        self.init_remap(n_embed, remap, unknown_index)

    def forward(self, z: Tensor, temp: float | None = None, return_logits: bool = False) -> tuple[Any, ...]:
        """Quantize a feature map (B, num_hiddens, H, W).

        Args:
            z: the feature map.
            temp: temperature; by default `temperature`.
            return_logits: append the logits (B, n_embed, H, W).

        Returns:
            The quantized map (B, embedding_dim, H, W), the KL divergence and `(None, None, indices)`.
        """
        hard = self.straight_through if self.training else True
        logits = self.proj(z)
        allowed = logits if self.remap is None else logits[:, self.used]
        weights = F.gumbel_softmax(allowed, tau=self.temperature if temp is None else temp, dim=1, hard=hard)
        if self.remap is not None:  # the other entries have no weight
            weights = torch.zeros_like(logits).index_copy(1, self.used, weights)
        z_q = torch.einsum("bnhw,nd->bdhw", weights, self.embed.weight)
        probabilities = allowed.softmax(dim=1)
        divergence = (probabilities * torch.log(probabilities * self.n_embed + 1e-10)).sum(dim=1).mean()
        indices = weights.argmax(dim=1)
        indices = indices if self.remap is None else self.remap_to_used(indices)
        result = (z_q, self.kl_weight * divergence, (None, None, indices) if self.use_vqinterface else indices)
        return (*result, logits) if return_logits else result

    def get_codebook_entry(self, indices: Tensor, shape: Sequence[int]) -> Tensor:
        """Return the entries at flat `indices` as a feature map; `shape` is (B, H, W, C)."""
        indices = indices.reshape(*shape[:3])
        indices = indices if self.remap is None else self.unmap_to_all(indices)
        return self.embed(indices).permute(0, 3, 1, 2)


class EmbeddingEMA(nn.Module):
    """Codebook whose entries are moving averages of the vectors that they replaced (arXiv:1711.00937, appendix A).

    Args:
        num_tokens: number of entries.
        codebook_dim: length of an entry.
        decay: decay of the averages.
        eps: count that is added to every entry, against a division by zero.
    """

    def __init__(self, num_tokens: int, codebook_dim: int, decay: float = 0.99, eps: float = 1e-5) -> None:
        super().__init__()
        self.decay = decay
        self.eps = eps
        weight = torch.randn(num_tokens, codebook_dim)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.cluster_size = nn.Parameter(torch.zeros(num_tokens), requires_grad=False)
        self.embed_avg = nn.Parameter(weight.clone(), requires_grad=False)
        self.update = True

    def forward(self, embed_id: Tensor) -> Tensor:
        """Return the entries at indices of any shape."""
        return F.embedding(embed_id, self.weight)

    def cluster_size_ema_update(self, new_cluster_size: Tensor) -> None:
        """Update the average number of vectors (num_tokens,) that each entry replaces."""
        self.cluster_size.data.mul_(self.decay).add_(new_cluster_size, alpha=1 - self.decay)

    def embed_avg_ema_update(self, new_embed_avg: Tensor) -> None:
        """Update the average sum (num_tokens, codebook_dim) of these vectors."""
        self.embed_avg.data.mul_(self.decay).add_(new_embed_avg, alpha=1 - self.decay)

    def weight_update(self, num_tokens: int) -> None:
        """Set the entries to the averages of these vectors."""
        total = self.cluster_size.sum()
        counts = (self.cluster_size + self.eps) / (total + num_tokens * self.eps) * total
        self.weight.data.copy_(self.embed_avg / counts[:, None])


class EMAVectorQuantizer(Remapping):
    """Nearest-entry quantizer with an `EmbeddingEMA`.

    Args:
        n_embed: number of entries.
        embedding_dim: length of an entry.
        beta: weight of the commitment loss.
        decay, eps: see `EmbeddingEMA`.
        remap, unknown_index: see `VectorQuantizer2`.
    """

    def __init__(
        self,
        n_embed: int,
        embedding_dim: int,
        beta: float,
        decay: float = 0.99,
        eps: float = 1e-5,
        remap: str | None = None,
        unknown_index: str | int = "random",
    ) -> None:
        super().__init__()
        self.codebook_dim = embedding_dim
        self.num_tokens = n_embed
        self.beta = beta
        self.embedding = EmbeddingEMA(n_embed, embedding_dim, decay, eps)
        self.init_remap(n_embed, remap, unknown_index)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Quantize a feature map (B, embedding_dim, H, W), and in training update the codebook.

        Returns:
            The quantized map, the commitment loss, and `(perplexity, one-hot codes (N, n_embed), indices (N,))`.
        """
        rows = z.permute(0, 2, 3, 1).reshape(-1, self.codebook_dim)
        indices = torch.cdist(rows.detach(), self.embedding.weight).argmin(dim=1)
        z_q = self.embedding(indices).view(z.shape[0], *z.shape[2:], -1).permute(0, 3, 1, 2)
        codes = F.one_hot(indices, self.num_tokens).to(z.dtype)
        frequencies = codes.mean(dim=0)
        perplexity = torch.exp(-(frequencies * torch.log(frequencies + 1e-10)).sum())
        if self.training and self.embedding.update:
            self.embedding.cluster_size_ema_update(codes.sum(dim=0))
            self.embedding.embed_avg_ema_update(codes.t() @ rows.detach())
            self.embedding.weight_update(self.num_tokens)
        loss = self.beta * F.mse_loss(z_q.detach(), z)
        indices = indices if self.remap is None else self.remap_to_used(indices)
        return z + (z_q - z).detach(), loss, (perplexity, codes, indices)
