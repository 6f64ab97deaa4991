"""Retrieval databases for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def vectors(count: int, width: int = 24, seed: int = 0, dtype: str = "float32") -> np.ndarray:
    """Return random embeddings (count, width) with different norms."""
    generator = np.random.default_rng(seed)
    rows = generator.standard_normal((count, width)) * generator.uniform(0.1, 10.0, (count, 1))
    return rows.astype(dtype)


def write_database(folder: Path, *parts: np.ndarray, **replaced: np.ndarray) -> Path:
    """Write a database with one file per array of embeddings; `replaced` replaces arrays, None removes them."""
    folder.mkdir(parents=True, exist_ok=True)
    start = 0
    for number, part in enumerate(parts):
        arrays = {
            "embedding": part,
            "img_id": np.array([f"image{start + row}" for row in range(len(part))]),
            "patch_coords": np.arange(start * 4, (start + len(part)) * 4).reshape(-1, 4),
        }
        arrays = {name: array for name, array in {**arrays, **replaced}.items() if array is not None}
        np.savez(folder / f"part{number}.npz", **arrays)
        start += len(part)
    return folder


def neighbours_by_argsort(embeddings: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return indices and scores (Q, k), computed in float64 without chunks."""
    rows, queries = unit(embeddings.astype(np.float64)), unit(queries.astype(np.float64))
    scores = (queries[:, None] * rows[None]).sum(axis=-1)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(scores, order, axis=1)


def unit(rows: np.ndarray) -> np.ndarray:
    """Normalise rows (N, D) to unit length."""
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)
