"""Nearest neighbours of images in a database, to train retrieval-augmented models (arXiv:2204.11824).

Shapes: N items, k neighbours, D channels of an embedding.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from ldm.config.instantiate import instantiate_from_config
from ldm.errors import UserError
from ldm.io.npz import Rows, write_npz
from ldm.models.diffusion.batch_keys import NEIGHBOURS_KEY
from ldm.retrieval.database import Database, normalise, read_database
from ldm.retrieval.folders import find_database
from ldm.retrieval.searcher import Searcher, open_searcher

logger = logging.getLogger(__name__)

QUERY_BATCH = 256  # queries that share one pass over the database


class Neighbours(Dataset):
    """Wrapper that adds the neighbours of each item of a data set, for models with `cond_stage_key: nix`.

    Items: those of the wrapped data set, and `nix`, the embeddings (k, D) of the neighbours of the item in the
    database, float32 unit vectors, the nearest first.

    Args:
        dataset: `target` and `params` of the wrapped data set.
        embeddings: name or folder of a database with one embedding for each item, in the order of the items;
            `scripts/embed_images.py` writes it.
        database: name or folder of the database to search; default: `embeddings`.
        knn: k, the number of neighbours.
        leave_out: number of nearest neighbours to leave out: 1 if the database contains the items themselves.
        path: NPZ file for the neighbours, which later runs read instead of searching again.

    Raises:
        UserError: a database is missing or damaged, the numbers of items and embeddings differ, there are too few
            vectors, or `path` has the neighbours of other data.
    """

    def __init__(
        self,
        dataset: Mapping[str, Any],
        embeddings: str,
        database: str | None = None,
        knn: int = 4,
        leave_out: int = 0,
        path: str | None = None,
    ) -> None:
        self.dataset: Any = instantiate_from_config(dataset)
        queries = read_database(find_database(embeddings))
        if len(queries) != len(self.dataset):
            raise UserError(
                f'Neighbours: "{embeddings}" has {len(queries)} embeddings, the data set {len(self.dataset)} items; '
                "compute the embeddings of this data set"
            )
        if path is not None and Path(path).is_file():
            self.database = read_database(find_database(database or embeddings))
            self.indices = _read_indices(Path(path), (len(queries), knn), self.database)
            logger.info("using the neighbours in %s", path)
            return
        searcher = open_searcher(database or embeddings)
        self.database = searcher.database
        self.indices = find_neighbours(searcher, queries.embeddings, knn, leave_out)
        if path is not None:
            write_npz(path, {"indices": Rows.of(self.indices)})

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.dataset[index], NEIGHBOURS_KEY: neighbour_vectors(self.database, self.indices[index])}


def find_neighbours(searcher: Searcher, queries: np.ndarray, knn: int, leave_out: int = 0) -> np.ndarray:
    """Return the indices (Q, k) of the neighbours of queries (Q, D), without the `leave_out` nearest ones.

    Raises:
        UserError: the database has too few vectors, or a number is out of range.
    """
    if knn < 1 or leave_out < 0:
        raise UserError(f"Neighbours: knn must be at least 1 and leave_out at least 0, not {knn} and {leave_out}")
    count = knn + leave_out
    if count > len(searcher.database):
        raise UserError(
            f"Neighbours: the database has {len(searcher.database)} vectors, fewer than knn + leave_out ({count}); "
            "lower knn"
        )
    found = []
    with tqdm(total=len(queries), desc="neighbours", unit="item", delay=1.0, leave=False) as bar:
        for first in range(0, len(queries), QUERY_BATCH):
            rows = torch.from_numpy(queries[first : first + QUERY_BATCH])
            found.append(searcher.search(rows, count).indices[:, leave_out:].numpy())
            bar.update(len(rows))
    return np.concatenate(found)


def neighbour_vectors(database: Database, indices: np.ndarray) -> np.ndarray:
    """Return the unit vectors (k, D) float32 with these indices (k,) in a database."""
    return normalise(database.embeddings[indices]).numpy()


def _read_indices(path: Path, shape: tuple[int, int], database: Database) -> np.ndarray:
    """Read the indices of neighbours from a file.

    Raises:
        UserError: it is damaged, or contains the neighbours of other data.
    """
    try:
        with np.load(path, allow_pickle=False) as content:
            indices = content["indices"]
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise UserError(f'cannot read the neighbours in "{path}" ({error}); remove the file') from None
    fits = indices.shape == shape and indices.dtype.kind == "i"
    if not fits or not 0 <= int(indices.min()) <= int(indices.max()) < len(database):
        raise UserError(f'"{path}" contains the neighbours of another data set or database; remove the file')
    return indices
