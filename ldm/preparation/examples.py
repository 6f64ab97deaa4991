"""Example inputs for sampling from a trained model: masked or small images from the prepared data."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ldm.config.instantiate import instantiate_from_config
from ldm.io.images import save_png
from ldm.preparation.recipes import Data
from ldm.preparation.yaml_text import plain

COUNT = 4
SEED = 0


def write_examples(data: Data, folder: Path) -> list[Path]:
    """Write images of the validation set as inputs of `ldm inpaint` or `ldm superres`, and return their paths.

    Building the data set also checks the configuration that names it.
    """
    import torch

    sets = data.datasets()
    dataset = instantiate_from_config(plain(sets.get("validation", sets["train"])))
    written: list[Path] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        items = [dataset[index] for index in range(min(COUNT, len(dataset)))]
    for number, item in enumerate(items):
        image = item["LR_image"] if data.task == "superres" else item["image"]
        written.append(folder / f"{number}.png")
        save_png(_pixels(image), written[-1])
        if data.task == "inpainting":
            written.append(folder / f"{number}_mask.png")
            save_png(_pixels(item["mask"]), written[-1])
    return written


def _pixels(image: np.ndarray) -> np.ndarray:
    return ((image + 1.0) * 127.5).round().clip(0, 255).astype(np.uint8)
