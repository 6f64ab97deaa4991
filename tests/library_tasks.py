"""One call of each public function of the library, with three inputs, for tests of what they share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from retrieval_files import vectors, write_database
from tiny_models import (
    class_config,
    inpainting_config,
    layout_config,
    make_model,
    map_config,
    pixel_config,
    retrieval_config,
    superresolution_config,
    text_config,
    unconditional_config,
    write_clip,
)

import ldm


def random_images(count: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Return random images (count, height, width, 3) uint8."""
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def half_mask(height: int, width: int) -> np.ndarray:
    """Return a mask (height, width) bool of the left half."""
    mask = np.zeros((height, width), bool)
    mask[:, : width // 2] = True
    return mask


@dataclass(frozen=True)
class Call:
    """Call of a public function that returns three images.

    Attributes:
        config: configuration of the model.
        function: calls the public function with a model, a folder with a CLIP and a database, and options.
        size: (height, width) of the results.
        latents: (C, h, w) of their latents.
        blends: whether the result combines the decoded latents with the input.
    """

    config: dict[str, Any]
    function: Callable[..., list[Any]]
    size: tuple[int, int] = (16, 16)
    latents: tuple[int, int, int] = (3, 8, 8)
    blends: bool = False


LABEL_MAPS = np.random.default_rng(0).integers(0, 8, (3, 16, 16))
LAYOUT = {"boxes": [{"label": 3, "box": [0.1, 0.2, 0.6, 0.9]}]}

CALLS = {
    "text_to_image": Call(
        text_config(), lambda m, _, **o: ldm.text_to_image(m, ["fox", "rocket", "red heart"], steps=3, **o)
    ),
    "image_to_image": Call(
        text_config(),
        lambda m, _, **o: ldm.image_to_image(m, random_images(3, 16, 16), ["fox", "rocket", "red heart"], steps=4, **o),
    ),
    "class_to_image": Call(
        class_config(cond_dropout=0.1), lambda m, _, **o: ldm.class_to_image(m, ["0-1", 3], steps=3, **o)
    ),
    "unconditional": Call(unconditional_config(), lambda m, _, **o: ldm.unconditional(m, 3, steps=3, **o)),
    "unconditional of pixels": Call(
        pixel_config(), lambda m, _, **o: ldm.unconditional(m, 3, steps=3, **o), size=(8, 8)
    ),
    "inpaint": Call(
        inpainting_config(),
        lambda m, _, **o: ldm.inpaint(m, random_images(3, 16, 16), half_mask(16, 16), steps=3, **o),
        blends=True,
    ),
    "super_resolve": Call(
        superresolution_config(),
        lambda m, _, **o: ldm.super_resolve(m, random_images(3, 8, 8), **{"steps": 3, "eta": 0.0, **o}),
    ),
    "layout_to_image": Call(layout_config(), lambda m, _, **o: ldm.layout_to_image(m, 3 * [LAYOUT], steps=3, **o)),
    "semantic_to_image": Call(map_config(8), lambda m, _, **o: ldm.semantic_to_image(m, LABEL_MAPS, steps=3, **o)),
    "retrieval_to_image": Call(
        retrieval_config(),
        lambda m, folder, **o: ldm.retrieval_to_image(
            m, ["cat", "a", "b"], **retrieval_files(folder), knn=2, steps=3, **o
        ),
    ),
}


def retrieval_files(folder: Path) -> dict[str, str]:
    """Return `clip_type` and `database` of a tiny CLIP and database, which are written to `folder` once."""
    if not (folder / "clip").is_dir():
        write_clip(folder / "clip")
        write_database(folder / "database", vectors(9, 10))
    return {"clip_type": str(folder / "clip"), "database": str(folder / "database")}


class Tasks:
    """Models of all calls, each built once; `tasks(name, **options)` calls a public function."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.models = folder, {}

    def model(self, name: str) -> torch.nn.Module:
        """Return the model of a call."""
        if name not in self.models:
            self.models[name] = make_model(CALLS[name].config)
        return self.models[name]

    def __call__(self, name: str, **options: Any) -> list[Any]:
        return CALLS[name].function(self.model(name), self.folder, **{"seed": 1, "progress": False, **options})
