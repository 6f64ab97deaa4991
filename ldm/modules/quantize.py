"""Vector quantization, which replaces every position of a feature map by the nearest entry of a learned codebook."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from ldm.errors import UserError

# Largest number of distances computed at once; more positions are processed in chunks.
MAX_DISTANCES = 2**24


class Remapping(nn.Module):
    """Mixin of quantizers: the indices of a codebook as positions in the list of the used ones.

    Attributes:
        remap: NumPy file with the used indices; None returns the indices of the codebook.
        re_embed: number of distinct indices that are returned.
        used: the used indices, with `remap`.
        unknown_index: see `VectorQuantizer2`, with `remap`.
    """

    used: Tensor  # only with `remap`

    def init_remap(self, n_e: int, remap: str | Path | None, unknown_index: str | int) -> None:
        """Read the used indices of a codebook of `n_e` entries, if `remap` names them."""
        self.codebook_size = n_e
        self.remap = remap
        self.re_embed = n_e
        if remap is None:
            return
        self.register_buffer("used", _read_used(remap, n_e))
        self.re_embed = len(self.used)
        if unknown_index == "extra":
            unknown_index = self.re_embed
            self.re_embed += 1
        elif isinstance(unknown_index, str) and unknown_index != "random":
            raise UserError(f'unknown_index "{unknown_index}" is neither "random", "extra" nor a number')
        self.unknown_index: str | int = unknown_index

    def remap_to_used(self, inds: Tensor) -> Tensor:
        """Map codebook indices of any shape to positions in the list of used indices."""
        positions = self.used.new_full((self.codebook_size,), -1)
        positions[self.used] = torch.arange(len(self.used), device=inds.device)
        new = positions[inds]
        unknown = new < 0
        if isinstance(self.unknown_index, int):
            new[unknown] = self.unknown_index
        else:
            random_positions = torch.randint(0, self.re_embed, size=(int(unknown.sum()),))
            new[unknown] = random_positions.to(new)
        return new

    def unmap_to_all(self, inds: Tensor) -> Tensor:
        """Map positions in the list of used indices to codebook indices; the extra index maps to the first entry."""
        return self.used[inds.where(inds < len(self.used), 0)]


class VectorQuantizer2(Remapping):
    """Nearest-entry quantizer with straight-through gradients (VQ-VAE, arXiv:1711.00937).

    Args:
        n_e: number of codebook entries.
        e_dim: length of an entry, equal to the channels of the feature map.
        beta: weight of the commitment term, or of the codebook term with `legacy`.
        remap: NumPy file with the used indices; returned indices are then positions in that list.
        unknown_index: replacement of an index outside that list: "random" (a random position), "extra" (one
            additional index after the list) or a number.
        sane_index_shape: return indices as (B, H, W) instead of flat.
        legacy: apply `beta` to the codebook term, as in the training of the published models.

    Raises:
        UserError: `remap` cannot be read, its indices are invalid, or `unknown_index` is unknown.
    """

    def __init__(
        self,
        n_e: int,
        e_dim: int,
        beta: float,
        remap: str | Path | None = None,
        unknown_index: str | int = "random",
        sane_index_shape: bool = False,
        legacy: bool = True,
    ) -> None:
        super().__init__()
        self.n_e = n_e
        self.e_dim = e_dim
        self.beta = beta
        self.legacy = legacy
        self.sane_index_shape = sane_index_shape
        self.embedding = nn.Embedding(n_e, e_dim)
        nn.init.uniform_(self.embedding.weight, -1.0 / n_e, 1.0 / n_e)
        self.init_remap(n_e, remap, unknown_index)

    def nearest(self, z: Tensor) -> Tensor:
        """Return the indices (N,) of the entries nearest to the rows of `z` (N, e_dim)."""
        # Distances rounded to half precision would select other entries.
        dtype = torch.promote_types(z.dtype, torch.float32)
        z, codebook = z.to(dtype), self.embedding.weight.to(dtype)
        # |z - e|^2 without |z|^2, which is the same for every entry.
        squares = codebook.square().sum(dim=1)
        chunks = z.split(max(1, MAX_DISTANCES // self.n_e))
        return torch.cat([torch.addmm(squares, rows, codebook.t(), alpha=-2.0).argmin(dim=1) for rows in chunks])

    def forward(
        self, z: Tensor, temp: float | None = None, rescale_logits: bool = False, return_logits: bool = False
    ) -> tuple[Tensor, Tensor, tuple[None, None, Tensor]]:
        """Quantize a feature map.

        Args:
            z: (B, e_dim, H, W).
            temp, rescale_logits, return_logits: options of sampling quantizers; only the defaults are accepted.

        Returns:
            The quantized map (B, e_dim, H, W), the codebook and commitment loss, and `(None, None, indices)`.
            Perplexity and one-hot codes are not computed. The indices are flat unless `sane_index_shape` is set.
        """
        if temp not in (None, 1.0) or rescale_logits or return_logits:
            raise ValueError("a nearest-entry quantizer has neither a temperature nor logits")
        with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
            indices = self.nearest(rearrange(z, "b c h w -> (b h w) c"))
        indices = indices.view(z.shape[0], *z.shape[2:])
        z_q = rearrange(self.embedding(indices), "b h w c -> b c h w")

        codebook_term = (z_q - z.detach()).square().mean()
        commitment_term = (z_q.detach() - z).square().mean()
        if self.legacy:
            loss = commitment_term + self.beta * codebook_term
        else:
            loss = self.beta * commitment_term + codebook_term

        z_q = z + (z_q - z).detach()  # straight-through gradient
        if self.remap is not None:
            indices = self.remap_to_used(indices)
        if not self.sane_index_shape:
            indices = indices.flatten()
        return z_q, loss, (None, None, indices)

    def get_codebook_entry(self, indices: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """Return the codebook entries at `indices`.

        Args:
            indices: indices of any shape.
            shape: (B, H, W, e_dim), to return a feature map.

        Returns:
            (B, e_dim, H, W), or one row for each index without `shape`.
        """
        if self.remap is not None:
            indices = self.unmap_to_all(indices)
        z_q = self.embedding(indices)
        return z_q if shape is None else rearrange(z_q.view(*shape), "b h w c -> b c h w").contiguous()


def _read_used(path: str | Path, n_e: int) -> Tensor:
    try:
        used = torch.from_numpy(np.load(path, allow_pickle=False)).long().flatten()
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f'remap: cannot read indices from "{path}" ({error}); write them with numpy.save') from error
    if used.numel() == 0 or used.min() < 0 or used.max() >= n_e or used.unique().numel() != used.numel():
        raise UserError(f'remap: "{path}" must hold distinct indices between 0 and {n_e - 1}')
    return used
