"""Nearest-neighbour search in a database, by inner product of unit vectors.

Shapes: N vectors of width D in the database, Q queries, k neighbours.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.errors import UserError
from ldm.retrieval.database import CHUNK_ROWS, Database, chunks, normalise, read_database
from ldm.retrieval.folders import find_database, find_index
from ldm.retrieval.scann_index import ScannIndex, import_scann

logger = logging.getLogger(__name__)

# Number of extra candidates. Rounding in float32 can change the order of scores, and depends on the device and the
# chunk size. Scores of all candidates in float64 have the same order everywhere.
EXTRA_CANDIDATES = 32
# Scores of an index of this database differ less than this, by rounding; those of another database differ more.
SCORE_TOLERANCE = 0.05


class Neighbours(NamedTuple):
    """Neighbours of queries on the CPU, the nearest first; equal scores are in the order of the database.

    Attributes:
        indices: (Q, k) int64.
        scores: (Q, k) float32 in [-1, 1].
        embeddings: (Q, k, D) float32 unit vectors.
    """

    indices: Tensor
    scores: Tensor
    embeddings: Tensor


class Searcher:
    """Nearest-neighbour searcher, exact or with an index.

    Args:
        database: the database to search.
        device: device of the exact search; the database stays in the memory of the CPU.
        index: an index that finds the candidates; their scores and order are computed exactly all the same.
        chunk_rows: maximum number of vectors to process at a time.

    Raises:
        UserError: the index belongs to another database.
    """

    def __init__(
        self,
        database: Database,
        device: torch.device | str = "cpu",
        index: ScannIndex | None = None,
        chunk_rows: int = CHUNK_ROWS,
    ) -> None:
        if index is not None and len(index) != len(database):
            raise _mismatch(index, f"it has {len(index)} vectors, the database {len(database)}")
        self.database = database
        self.device = device
        self.index = index
        self.chunk_rows = chunk_rows

    def search(self, queries: Tensor, k: int) -> Neighbours:
        """Return the `k` nearest vectors of each query, or all vectors of a smaller database.

        Args:
            queries: (Q, D) of any length, on any device.
            k: number of neighbours, at least 1.

        Raises:
            UserError: the database comes from another CLIP, or its vectors are not finite.
        """
        width = self.database.embeddings.shape[1]
        if queries.shape[1] != width:
            raise UserError(
                f'the database "{self.database.folder}" has vectors of width {width}, the queries have width '
                f"{queries.shape[1]}; choose the CLIP that computed the database"
            )
        k = min(k, len(self.database))
        count = min(k + EXTRA_CANDIDATES, len(self.database))
        queries = F.normalize(queries.detach().float().cpu(), dim=1)
        candidates = self._index_candidates(self.index, queries, count) if self.index is not None else None
        if candidates is None:
            embeddings = self.database.embeddings
            candidates = exact_candidates(embeddings, queries.to(self.device), count, self.chunk_rows).cpu()
        return self._select(queries, candidates, k)

    def _index_candidates(self, index: ScannIndex, queries: Tensor, count: int) -> Tensor | None:
        """Return (Q, count) candidates of `index`, or None if it finds fewer for a query."""
        indices, scores = index.candidates(queries.numpy(), count)
        if np.isnan(scores).any():
            return None
        candidates = torch.from_numpy(indices)
        error = (self._score(queries, candidates)[0] - torch.from_numpy(scores)).abs().max()
        if error > SCORE_TOLERANCE:
            raise _mismatch(index, f"its scores are off by {error:.2f}")
        return candidates

    def _select(self, queries: Tensor, candidates: Tensor, k: int) -> Neighbours:
        """Return the `k` nearest of the candidates (Q, n)."""
        candidates = candidates.sort(dim=1).values  # a stable sort then keeps equal scores in database order
        scores, rows = self._score(queries, candidates)
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        order = order[:, :k]
        nearest = rows.take_along_dim(order[..., None], dim=1).float()
        return Neighbours(candidates.gather(1, order), scores[:, :k].float(), nearest)

    def _score(self, queries: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores (Q, n) and unit vectors (Q, n, D) of the candidates (Q, n) in float64."""
        rows = torch.from_numpy(self.database.embeddings[candidates.numpy()]).double()
        rows = F.normalize(rows, dim=-1)
        return (rows * F.normalize(queries.double(), dim=1)[:, None]).sum(dim=-1), rows


def exact_candidates(embeddings: np.ndarray, queries: Tensor, count: int, chunk_rows: int = CHUNK_ROWS) -> Tensor:
    """Return the indices of the `count` embeddings (N, D) that are nearest to queries (Q, D) of unit length.

    Returns:
        (Q, count) int64 on the device of the queries, the nearest in float32 first.

    Raises:
        UserError: a vector is not finite.
    """
    best_scores = queries.new_empty(len(queries), 0)
    best_indices = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for first, rows in chunks(embeddings, chunk_rows):
        scores = queries @ normalise(rows, queries.device, first).T
        positions = highest(scores, min(count, len(rows)))
        scores = torch.cat([best_scores, scores.gather(1, positions)], dim=1)
        indices = torch.cat([best_indices, first + positions], dim=1)
        # The indices ascend, and a stable sort keeps equal scores in this order.
        best_scores, order = scores.sort(dim=1, descending=True, stable=True)
        best_scores, best_indices = best_scores[:, :count], indices.gather(1, order[:, :count])
    return best_indices


def highest(scores: Tensor, count: int) -> Tensor:
    """Return the ascending positions (Q, count) of the highest scores (Q, N); of equal scores, the first ones."""
    values, positions = scores.topk(count, dim=1, sorted=False)
    # `topk` selects any of the scores that equal the lowest selected one.
    ambiguous = (scores >= values.amin(dim=1, keepdim=True)).sum(dim=1) > count
    if ambiguous.any():
        positions[ambiguous] = scores[ambiguous].sort(dim=1, descending=True, stable=True).indices[:, :count]
    return positions.sort(dim=1).values


def open_searcher(name: str, device: torch.device | str = "cpu") -> Searcher:
    """Return a searcher of the database `name`, or of the database in the folder `name`.

    It uses the index in `data/rdm/searchers` if there is one and ScaNN is installed.

    Raises:
        UserError: there is no such database, or the database or its index is damaged.
    """
    folder = find_database(name)
    index_folder = find_index(folder)
    index, description = None, "exact search; there is no index"
    if index_folder is not None:
        try:
            import_scann()
        except UserError as error:
            description = f'exact search without the index "{index_folder}": {error}'
        else:
            index, description = ScannIndex.load(index_folder), f'ScaNN index "{index_folder}"'
    searcher = Searcher(read_database(folder), device, index)
    logger.info('%d vectors of "%s": %s', len(searcher.database), folder, description)
    return searcher


def _mismatch(index: ScannIndex, reason: str) -> UserError:
    return UserError(
        f'the index "{index.source}" belongs to another database ({reason}); remove it, or train it again with '
        "ldm train_searcher"
    )
