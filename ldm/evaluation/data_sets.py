"""Images of data sets, prepared as for training."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset

from ldm.config.assets import locate
from ldm.errors import UserError
from ldm.evaluation.image_sets import ImageSet, Named, hash_of


@dataclass
class DatasetImages(ImageSet):
    """Images of a data set, with its crop and its resizing; random ones depend on `seed` alone.

    Args:
        dataset: the data set, whose items have an `image` (H, W, 3) in [-1, 1].
        title: name of the set in messages.
        settings: the configuration of the data set.
        limit: use only the first images; default: all.
        seed: item i is read with the seed `seed` + i.

    Raises:
        UserError: the data set is empty, has fewer images than `limit`, or is a stream and `limit` is None.
    """

    dataset: Any
    title: str
    settings: Any = None
    limit: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        self.is_stream = isinstance(self.dataset, IterableDataset) or not hasattr(self.dataset, "__getitem__")
        if self.is_stream:
            if self.limit is None:
                raise UserError(
                    f"{self.title} is a stream without an end; give its number of images, e.g. --reference-n"
                )
        elif self.limit is not None and self.limit > len(self.dataset):
            raise UserError(f"{self.title} has {len(self.dataset)} images, fewer than {self.limit}")
        elif len(self.dataset) == 0:
            raise UserError(f"{self.title} has no images; check its files")

    @property
    def name(self) -> str:
        """Name of the set in messages."""
        return self.title

    @property
    def preparation(self) -> str:
        """Preparation of the images: the settings of the data set."""
        return json.dumps(self.settings, sort_keys=True, default=str)

    def __len__(self) -> int:
        return len(self.dataset) if self.limit is None else self.limit

    def key(self) -> str | None:
        """Return a hash of the settings, of the items and of the files that they name; None for a stream."""
        from ldm.training.fingerprint import fingerprint

        return (
            None if self.is_stream else hash_of("data", self.settings, fingerprint(self.dataset), len(self), self.seed)
        )

    def images(self, start: int = 0) -> Iterator[Named]:
        """Yield the number and the pixels of each image from the index `start` on."""
        for number, item in enumerate(self.items(start), start):
            yield str(number), self._pixels(item)

    def items(self, start: int = 0) -> Iterator[Any]:
        """Yield each item from the index `start` on.

        Raises:
            UserError: a stream ends too early.
        """
        stream = iter(self.dataset) if self.is_stream else None
        for number in range(start if stream is None else 0, len(self)):
            if stream is None:
                yield self.item(number)
                continue
            with seeded(self.seed + number):
                item = next(stream, None)
            if item is None:
                raise UserError(f"{self.name} ends after {number} images; ask for fewer")
            if number >= start:
                yield item

    def item(self, index: int) -> Any:
        """Return an item of a data set that is not a stream."""
        with seeded(self.seed + index):
            return self.dataset[index]

    def _pixels(self, item: Any) -> np.ndarray:
        from ldm.io.pixels import batch_entry, to_uint8

        values = np.asarray(batch_entry(item, "image"))
        if values.ndim != 3 or values.shape[-1] != 3:
            raise UserError(f"{self.name} has images of shape {values.shape}; metrics need (H, W, 3)")
        return to_uint8(values)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run a block with the generators of PyTorch, NumPy and Python at a seed; restore their states afterwards."""
    from ldm.training.rng import preserved_rng

    with preserved_rng():
        torch.manual_seed(seed % 2**32)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        yield


def configured_images(path: str | Path, split: str, limit: int | None = None) -> DatasetImages:
    """Return the images of the data set `split`, "train", "validation" or "test", of a training configuration.

    Raises:
        UserError: the configuration is missing, or has no such data set, or its data are missing.
    """
    from omegaconf import OmegaConf

    from ldm.config.instantiate import instantiate_from_config
    from ldm.training.configuration import read_yaml

    node: Any = OmegaConf.to_container(read_yaml(locate(path)), resolve=True)
    for key in ("data", "params", split):
        node = node.get(key) if isinstance(node, dict) else None
    if not isinstance(node, dict):
        raise UserError(f'the configuration "{path}" has no data.params.{split}; choose another --split')
    return DatasetImages(instantiate_from_config(node), f'the {split} set of "{path}"', node, limit)
