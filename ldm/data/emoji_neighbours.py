"""Neighbours of emoji drawings, for a small retrieval-augmented model that needs no CLIP.

The embedding of a drawing is the mean colour and opacity of `CELLS` × `CELLS` cells. It has no weights, and similar
drawings have similar embeddings.

Shapes: N drawings, k neighbours, D = 4 · `CELLS`² channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ldm.config.instantiate import instantiate_from_config
from ldm.data.emoji import DEFAULT_ROOT, Drawings, load_drawings, premultiply
from ldm.data.neighbours import find_neighbours, neighbour_vectors
from ldm.errors import UserError
from ldm.models.diffusion.batch_keys import NEIGHBOURS_KEY
from ldm.retrieval.database import Database
from ldm.retrieval.searcher import Searcher

CELLS = 8
WIDTH = 4 * CELLS**2


def embed_drawings(rgba: np.ndarray) -> np.ndarray:
    """Return the embeddings (N, D) float32 of drawings (N, S, S, 4) uint8, which are not normalised.

    Colours are in [-1, 1] and weighted by the opacity, so transparent cells are zero.
    """
    pixels = premultiply(rgba) / 255
    pixels[..., :3] = 2 * pixels[..., :3] - pixels[..., 3:]
    count, side = rgba.shape[:2]
    cells = pixels.reshape(count, CELLS, side // CELLS, CELLS, side // CELLS, 4).mean(axis=(2, 4))
    return cells.reshape(count, WIDTH)


class DrawingDatabase:
    """Database of the embeddings of some drawings.

    Args:
        drawings: all drawings.
        classes: the drawings in the database (default: all of them).
    """

    def __init__(self, drawings: Drawings, classes: Sequence[int] | None = None) -> None:
        self.classes = np.arange(len(drawings)) if classes is None else np.array(classes)
        self.embeddings = embed_drawings(drawings.rgba)
        self.database = Database(Path(DEFAULT_ROOT), self.embeddings[self.classes])

    def neighbours(self, drawings: Sequence[int], knn: int) -> np.ndarray:
        """Return the neighbours (Q, k) of drawings, as their positions in `classes`."""
        return find_neighbours(Searcher(self.database), self.embeddings[np.array(drawings)], knn)

    def vectors(self, positions: np.ndarray) -> np.ndarray:
        """Return the unit vectors (k, D) at these positions (k,)."""
        return neighbour_vectors(self.database, positions)


class DrawingNeighbours(Dataset):
    """Wrapper that adds the neighbours of the drawing of each item, for models with `cond_stage_key: nix`.

    Items: those of the wrapped data set, and `nix` (k, D), float32 unit vectors, the nearest first. The database holds
    all drawings, so the nearest neighbour is the drawing itself.

    Args:
        dataset: `target` and `params` of a data set with the number of the drawing as `class_label`, such as
            `ldm.data.emoji.EmojiTrain`.
        knn: k, the number of neighbours.
        root: the data folder (default: `data/emoji`).

    Raises:
        UserError: there is no data in `root`, or `knn` is out of range.
    """

    def __init__(self, dataset: Mapping[str, Any], knn: int = 4, root: str | Path | None = None) -> None:
        self.dataset: Any = instantiate_from_config(dataset)
        drawings = load_drawings(64, root)
        self.database = DrawingDatabase(drawings)
        self.indices = self.database.neighbours(range(len(drawings)), knn)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.dataset[index]
        label = item.get("class_label")
        if not isinstance(label, int) or not 0 <= label < len(self.indices):
            raise UserError(
                f"DrawingNeighbours: an item has the class_label {label!r}; wrap a data set of single drawings, such "
                "as ldm.data.emoji.EmojiTrain"
            )
        return {**item, NEIGHBOURS_KEY: self.database.vectors(self.indices[label])}
