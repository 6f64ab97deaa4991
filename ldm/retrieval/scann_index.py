"""Indices of ScaNN (arXiv:1908.10396), an approximate nearest-neighbour search.

Shapes: N vectors of width D, Q queries. All have unit length.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from ldm.config.distribution import install_hint
from ldm.errors import UserError
from ldm.io.files import atomic_folder
from ldm.retrieval.folders import INDEX_MARK

# Number of vectors below which the search is exact, and below which it hashes all vectors without partitions.
EXACT_BELOW = 20_000
HASHING_BELOW = 100_000
# Number of leaves of the partitions per leaf that is searched.
LEAVES_PER_SEARCHED = 20
# Number of candidates per neighbour whose scores are computed exactly. With 3, a few percent of neighbours were missed.
REORDERED_PER_NEIGHBOUR = 5
# Values that ScaNN's documentation recommends for hashing.
DIMENSIONS_PER_BLOCK = 2
ANISOTROPIC_THRESHOLD = 0.2
TRAINING_SAMPLE = 250_000
# Asset types of the files of an index; older versions of ScaNN wrote indices without a list of their files.
ASSET_TYPES = {
    "ah_codebook.pb": "AH_CENTERS",
    "serialized_partitioner.pb": "PARTITIONER",
    "datapoint_to_token.npy": "TOKENIZATION_NPY",
    "hashed_dataset.npy": "AH_DATASET_NPY",
    "int8_dataset.npy": "INT8_DATASET_NPY",
    "int8_multipliers.npy": "INT8_MULTIPLIERS_NPY",
    "dp_norms.npy": "INT8_NORMS_NPY",
    "dataset.npy": "DATASET_NPY",
}


def import_scann() -> Any:
    """Import ScaNN's module for NumPy arrays.

    Raises:
        UserError: ScaNN is not installed.
    """
    try:
        from scann.scann_ops.py import scann_ops_pybind
    except ImportError:
        raise UserError(
            f"an index needs the package scann (for Linux); install it with {install_hint('retrieval')}"
        ) from None
    return scann_ops_pybind


def search_method(count: int) -> str:
    """Return the search method of an index of `count` vectors."""
    return "exact" if count < EXACT_BELOW else "hashing" if count < HASHING_BELOW else "partitions"


class ScannIndex:
    """Trained index of ScaNN.

    Args:
        searcher: the searcher of ScaNN.
        source: name of the index in messages.
    """

    def __init__(self, searcher: Any, source: str) -> None:
        self._searcher = searcher
        self.source = source

    def __len__(self) -> int:
        return self._searcher.size()

    @classmethod
    def train(cls, embeddings: np.ndarray, k: int) -> ScannIndex:
        """Train an index of embeddings (N, D), float32 unit vectors, for a default of `k` neighbours.

        Raises:
            UserError: ScaNN is not installed, or the training fails.
        """
        count = len(embeddings)
        builder = import_scann().builder(embeddings, min(k, count), "dot_product")
        method = search_method(count)
        if method == "partitions":
            leaves = math.isqrt(count)
            sample = min(count, TRAINING_SAMPLE)
            builder = builder.tree(leaves, max(1, leaves // LEAVES_PER_SEARCHED), training_sample_size=sample)
        if method == "exact":
            builder = builder.score_brute_force()
        else:
            hashed = builder.score_ah(DIMENSIONS_PER_BLOCK, anisotropic_quantization_threshold=ANISOTROPIC_THRESHOLD)
            builder = hashed.reorder(REORDERED_PER_NEIGHBOUR * k)
        try:
            return cls(builder.build(), "the index")
        except (RuntimeError, MemoryError) as error:
            raise UserError(f"ScaNN cannot index these {count} vectors: {_one_line(error)}") from None

    @classmethod
    def load(cls, folder: Path) -> ScannIndex:
        """Load the index in a folder.

        ScaNN's own `load_searcher` may read a pickle, and requires the files in the folder in which the index was
        trained.

        Raises:
            UserError: ScaNN is not installed, or the index is damaged.
        """
        scann = import_scann()
        try:
            # Any exception of ScaNN here (RuntimeError, IndexError, …) means damaged files.
            return cls(scann.ScannSearcher(scann.scann_pybind.ScannNumpy(str(folder), _assets(folder))), str(folder))
        except MemoryError:
            raise UserError(f'the index "{folder}" does not fit into memory; remove it for an exact search') from None
        except Exception as error:
            raise UserError(
                f'the index "{folder}" is damaged ({_one_line(error)}); remove it, or train it again with '
                "ldm train_searcher"
            ) from None

    def save(self, folder: Path) -> None:
        """Write the index to `folder` atomically, replacing an existing index.

        Raises:
            UserError: the folder cannot be written, or contains other files.
        """
        check_replaceable(folder)
        with atomic_folder(folder) as temporary:
            try:
                self._searcher.serialize(str(temporary), relative_path=True)
            except RuntimeError as error:
                raise OSError(_one_line(error)) from None

    def candidates(self, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the indices (Q, count) int64 of vectors near the queries (Q, D), and their scores.

        If ScaNN finds fewer vectors, the remaining scores are NaN.

        Raises:
            UserError: the vectors of the index have another width.
        """
        try:
            indices, scores = self._searcher.search_batched(queries, count, REORDERED_PER_NEIGHBOUR * count)
        except RuntimeError as error:
            raise UserError(f'the index "{self.source}" cannot be searched ({_one_line(error)}); remove it') from None
        return indices.astype(np.int64), scores


def check_replaceable(folder: Path) -> None:
    """Check that an index can be written to `folder`.

    Raises:
        UserError: the folder exists and is not an index.
    """
    is_index = (folder / INDEX_MARK).is_file()
    if folder.exists() and not is_index and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f'"{folder}" exists and is not an index; choose another folder')


def _assets(folder: Path) -> str:
    """Return ScaNN's list of the files of an index as protobuf text, with paths relative to the folder.

    Older versions of ScaNN wrote the paths of the machine that trained the index, or no list.
    """
    listed = folder / "scann_assets.pbtxt"
    if listed.is_file():
        return re.sub(r'(asset_path:\s*")[^"]*/', r"\1", listed.read_text(encoding="utf-8"))
    present = {name: kind for name, kind in ASSET_TYPES.items() if (folder / name).is_file()}
    return "".join(f'assets {{ asset_type: {kind} asset_path: "{name}" }}\n' for name, kind in present.items())


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
