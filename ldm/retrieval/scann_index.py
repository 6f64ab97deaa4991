"""Indices of ScaNN (arXiv:1908.10396), which finds most of the neighbours in a fraction of the time.

Legend: N vectors of D numbers each, Q queries. All have length 1.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from ldm.errors import UserError
from ldm.io.files import atomic_folder
from ldm.retrieval.folders import INDEX_MARK

# Below the first nothing is approximate, below the second every vector is looked at, by its hash.
EXACT_BELOW = 20_000
HASHING_BELOW = 100_000
# Of the leaves of the partitions, how many are searched: one in so many.
LEAVES_PER_SEARCHED = 20
# Candidates by hash that are compared exactly, for each neighbour. With 3 a few in a hundred neighbours were missed.
REORDERED_PER_NEIGHBOUR = 5
# What scann's documentation recommends: two numbers share a code, and errors along the vector count more.
DIMENSIONS_PER_BLOCK = 2
ANISOTROPIC_THRESHOLD = 0.2
TRAINING_SAMPLE = 250_000
# ScaNN's names for the files of indices that were written before it kept a list of them.
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
    """ScaNN's module for numpy arrays.

    Raises:
        UserError: it is not installed.
    """
    try:
        from scann.scann_ops.py import scann_ops_pybind
    except ImportError:
        raise UserError('an index needs the package scann (for Linux); pip install "ldm[retrieval]"') from None
    return scann_ops_pybind


def method(count: int) -> str:
    """How an index of `count` vectors searches."""
    return "exact" if count < EXACT_BELOW else "hashing" if count < HASHING_BELOW else "partitions"


class ScannIndex:
    """A trained index of ScaNN.

    Args:
        searcher: ScaNN's own.
        source: what to call it in messages.
    """

    def __init__(self, searcher: Any, source: str) -> None:
        self._searcher = searcher
        self.source = source

    def __len__(self) -> int:
        return self._searcher.size()

    @classmethod
    def train(cls, embeddings: np.ndarray, k: int) -> ScannIndex:
        """Train an index of embeddings (N, D) float32 of length 1, which gives `k` neighbours by itself.

        Raises:
            UserError: ScaNN is not installed, or cannot.
        """
        count = len(embeddings)
        builder = import_scann().builder(embeddings, min(k, count), "dot_product")
        kind = method(count)
        if kind == "partitions":
            leaves = math.isqrt(count)
            sample = min(count, TRAINING_SAMPLE)
            builder = builder.tree(leaves, max(1, leaves // LEAVES_PER_SEARCHED), training_sample_size=sample)
        if kind == "exact":
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
        """The index in a folder.

        Not by ScaNN's `load_searcher`: that reads a pickle where there is one, and expects the files where they were
        when the index was made.

        Raises:
            UserError: ScaNN is not installed, or the index is damaged.
        """
        scann = import_scann()
        try:
            # Whatever ScaNN raises here (RuntimeError, IndexError, …) comes from the files.
            return cls(scann.ScannSearcher(scann.scann_pybind.ScannNumpy(str(folder), _assets(folder))), str(folder))
        except MemoryError:
            raise UserError(f'the index "{folder}" does not fit into memory; remove it to search without') from None
        except Exception as error:
            raise UserError(
                f'the index "{folder}" is damaged ({_one_line(error)}); remove it, or train it again with '
                "scripts/train_searcher.py"
            ) from None

    def save(self, folder: Path) -> None:
        """Write the index as `folder`, whole or not at all; one that is there is replaced.

        Raises:
            UserError: the place cannot be written to, or holds something else.
        """
        check_replaceable(folder)
        with atomic_folder(folder) as temporary:
            try:
                self._searcher.serialize(str(temporary), relative_path=True)
            except RuntimeError as error:
                raise OSError(_one_line(error)) from None

    def candidates(self, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """For each of the queries (Q, D) the numbers of `count` near vectors, (Q, count) int64, and their scores.

        Where ScaNN finds fewer, scores are NaN.

        Raises:
            UserError: the index is of vectors of another width.
        """
        reordered = REORDERED_PER_NEIGHBOUR * count
        try:
            indices, scores = self._searcher.search_batched(queries, count, reordered)
        except RuntimeError as error:
            raise UserError(f'the index "{self.source}" cannot be searched ({_one_line(error)}); remove it') from None
        return indices.astype(np.int64), scores


def check_replaceable(folder: Path) -> None:
    """Whether an index may be written as `folder`.

    Raises:
        UserError: something that is no index is there.
    """
    is_index = (folder / INDEX_MARK).is_file()
    if folder.exists() and not is_index and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f'"{folder}" exists and is no index; choose another place to write to')


def _assets(folder: Path) -> str:
    """ScaNN's list of the files of an index, as protobuf text, with paths from the folder.

    Older versions wrote the paths that the files had on the machine that trained the index, or no list.
    """
    listed = folder / "scann_assets.pbtxt"
    if listed.is_file():
        return re.sub(r'(asset_path:\s*")[^"]*/', r"\1", listed.read_text(encoding="utf-8"))
    there = {name: kind for name, kind in ASSET_TYPES.items() if (folder / name).is_file()}
    return "".join(f'assets {{ asset_type: {kind} asset_path: "{name}" }}\n' for name, kind in there.items())


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
