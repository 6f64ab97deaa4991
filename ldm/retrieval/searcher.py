"""Neighbours of a query in a database: by inner product of vectors of length 1.

Legend: N vectors of D numbers each in the database, Q queries, k neighbours.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.errors import UserError
from ldm.retrieval.database import CHUNK_ROWS, Database, chunks, normalised, read_database
from ldm.retrieval.folders import find_database, find_index
from ldm.retrieval.scann_index import ScannIndex, import_scann

logger = logging.getLogger(__name__)

# Candidates beyond those asked for. Scores in float32 may change places by rounding, which depends on the device and
# on the size of chunks; compared once more in float64, they come in the same order everywhere.
SPARE = 32
# An index of another database, or of another order of its files, gives scores that are further off than its rounding.
SCORE_TOLERANCE = 0.05


class Neighbours(NamedTuple):
    """The nearest first; among equals the one that comes first in the database."""

    indices: Tensor  # (Q, k) int64, on the CPU
    scores: Tensor  # (Q, k) float32 in [-1, 1], on the CPU
    embeddings: Tensor  # (Q, k, D) float32 of length 1, on the CPU


class Searcher:
    """Finds neighbours, in all of the database or through an index.

    Args:
        database: where to search.
        device: what computes the exact search; it holds `chunk_rows` vectors at a time, and the database stays where
            it is.
        index: searched instead, where given. Its neighbours are compared exactly, and put in order, all the same.
        chunk_rows: no more vectors than this are worked on at a time.

    Raises:
        UserError: the index is of another database.
    """

    def __init__(
        self,
        database: Database,
        device: torch.device | str = "cpu",
        index: ScannIndex | None = None,
        chunk_rows: int = CHUNK_ROWS,
    ) -> None:
        if index is not None and len(index) != len(database):
            raise _foreign(index, f"it has {len(index)} vectors, the database {len(database)}")
        self.database = database
        self.device = device
        self.index = index
        self.chunk_rows = chunk_rows

    def search(self, queries: Tensor, k: int) -> Neighbours:
        """The `k` nearest vectors of each query, or all where the database has fewer.

        Args:
            queries: (Q, D), of any length and on any device.
            k: at least 1.

        Raises:
            UserError: the database holds vectors of another CLIP, or such that are not finite.
        """
        width = self.database.embeddings.shape[1]
        if queries.shape[1] != width:
            raise UserError(
                f'the database "{self.database.folder}" holds vectors of {width} numbers, the queries have '
                f"{queries.shape[1]}; choose the CLIP that the database was made with"
            )
        k = min(k, len(self.database))
        count = min(k + SPARE, len(self.database))
        queries = F.normalize(queries.detach().float().cpu(), dim=1)
        found = self._by_index(queries, count) if self.index is not None else None
        if found is None:
            found = exact_candidates(self.database.embeddings, queries.to(self.device), count, self.chunk_rows).cpu()
        return self._in_order(queries, found, k)

    def _by_index(self, queries: Tensor, count: int) -> Tensor | None:
        """(Q, count) candidates of the index; None where it finds fewer for a query."""
        indices, scores = self.index.candidates(queries.numpy(), count)
        if np.isnan(scores).any():
            return None
        found = torch.from_numpy(indices)
        error = (self._compared(queries, found)[0] - torch.from_numpy(scores)).abs().max()
        if error > SCORE_TOLERANCE:
            raise _foreign(self.index, f"its scores are off by {error:.2f}")
        return found

    def _in_order(self, queries: Tensor, found: Tensor, k: int) -> Neighbours:
        found = found.sort(dim=1).values  # so that a stable sort leaves equals in the order of the database
        scores, rows = self._compared(queries, found)
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        order = order[:, :k]
        picked = rows.take_along_dim(order[..., None], dim=1).float()
        return Neighbours(found.gather(1, order), scores[:, :k].float(), picked)

    def _compared(self, queries: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (Q, n) and vectors of length 1 (Q, n, D) of the vectors `found` (Q, n), in float64."""
        rows = torch.from_numpy(self.database.embeddings[found.numpy()]).double()
        rows = F.normalize(rows, dim=-1)
        return (rows * F.normalize(queries.double(), dim=1)[:, None]).sum(dim=-1), rows


def exact_candidates(embeddings: np.ndarray, queries: Tensor, count: int, chunk_rows: int = CHUNK_ROWS) -> Tensor:
    """The numbers of the `count` nearest of the embeddings (N, D), for queries (Q, D) of length 1.

    Returns:
        (Q, count) int64, on the queries' device, the nearest in float32 first.

    Raises:
        UserError: a vector is not finite.
    """
    best = queries.new_empty(len(queries), 0)
    numbers = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for first, rows in chunks(embeddings, chunk_rows):
        scores = queries @ normalised(rows, queries.device, first).T
        here = torch.arange(first, first + len(rows), device=queries.device).expand(len(queries), -1)
        # The best so far come before, and a stable sort leaves equals so.
        best, order = torch.cat([best, scores], dim=1).sort(dim=1, descending=True, stable=True)
        best, numbers = best[:, :count], torch.cat([numbers, here], dim=1).gather(1, order[:, :count])
    return numbers


def open_searcher(name: str, device: torch.device | str = "cpu") -> Searcher:
    """The searcher of the database that is called `name`, or that is in the folder `name`.

    It uses the index in `data/rdm/searchers`, where there is one and ScaNN is installed.

    Raises:
        UserError: there is no such database; or it, or its index, is damaged.
    """
    folder = find_database(name)
    index_folder = find_index(folder)
    index, how = None, "exact search; there is no index of it"
    if index_folder is not None:
        try:
            import_scann()
        except UserError as error:
            how = f'exact search, not by the index "{index_folder}": {error}'
        else:
            index, how = ScannIndex.load(index_folder), f'ScaNN\'s index "{index_folder}"'
    searcher = Searcher(read_database(folder), device, index)
    logger.info('%d vectors of "%s": %s', len(searcher.database), folder, how)
    return searcher


def _foreign(index: ScannIndex, reason: str) -> UserError:
    return UserError(
        f'the index "{index.source}" is not of this database ({reason}); remove it, or train it again with '
        "scripts/train_searcher.py"
    )
