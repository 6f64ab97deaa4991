"""Data module of shards of images and texts, which configurations name as `ldm.data.laion.WebDataModuleFromConfig`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ldm.errors import UserError
from ldm.training.collate import Collate
from ldm.training.data import DataModuleFromConfig
from ldm.training.loader import ResumableLoader

STREAM = "ldm.data.shards.ImageShards"


class SampleCollate(Collate):
    """`collate_fn` for samples with records: dictionaries and lists become a list of those of the items.

    A batch has the entries that all its items have.
    """

    def __call__(self, items: list[Any]) -> dict[str, Any]:
        """Return the batch of the items.

        Raises:
            UserError: the items cannot be batched.
        """
        keys = [key for key in items[0] if all(key in item for item in items)]
        records = [key for key in keys if isinstance(items[0][key], dict | list)]
        batch = super().__call__([{key: item[key] for key in keys if key not in records} for item in items])
        return {**batch, **{key: [item[key] for item in items] for key in records}}


class WebDataModuleFromConfig(DataModuleFromConfig):
    """Data module of tar archives with images, texts and records, such as those of LAION.

    `train`, `validation` and `test` hold parameters of `ldm.data.shards.ImageShards`: `shards`, `shuffle`, `image_key`,
    `image_transforms`, `postprocess` and others. Batches have images (B, H, W, 3) float32 in [-1, 1] under the image
    key, texts under `txt`, records under `json` and the names of the samples under `__key__`. An epoch is one pass over
    all samples; each one is read by one process and one worker.

    Args:
        tar_base: folder or web address that precedes the names of the shards.
        batch_size: number of items in a batch, on each device.
        train, validation, test: parameters of the data sets; without them there is no loader.
        num_workers: number of loader processes.
        multinode: divide the samples among several processes. With False, more than one process is an error.
        min_size, max_pwatermark, max_punsafe: filters of all data sets; see `ImageShards`.
        val_batch_size, val_num_workers: the same for validation and test.

    Raises:
        UserError: the batch size is not positive.
    """

    def __init__(
        self,
        tar_base: str | None,
        batch_size: int,
        train: Mapping[str, Any] | None = None,
        validation: Mapping[str, Any] | None = None,
        test: Mapping[str, Any] | None = None,
        num_workers: int = 4,
        multinode: bool = True,
        min_size: int | None = None,
        max_pwatermark: float = 1.0,
        val_batch_size: int | None = None,
        val_num_workers: int | None = None,
        max_punsafe: float = 1.0,
    ) -> None:
        shared = {
            "tar_base": tar_base,
            "min_size": min_size,
            "max_pwatermark": max_pwatermark,
            "max_punsafe": max_punsafe,
        }
        configs = {
            name: {"target": STREAM, "params": {**shared, "name": f"data.params.{name}", **params}}
            for name, params in (("train", train), ("validation", validation), ("test", test))
            if params is not None
        }
        super().__init__(batch_size, **configs, num_workers=num_workers)  # type: ignore[arg-type] # by their names
        self.tar_base, self.multinode = tar_base, multinode
        self.train, self.validation, self.test = train, validation, test
        self.min_size, self.max_pwatermark, self.max_punsafe = min_size, max_pwatermark, max_punsafe
        self.val_batch_size = batch_size if val_batch_size is None else val_batch_size
        self.val_num_workers = num_workers if val_num_workers is None else val_num_workers

    def batch_size_of(self, name: str) -> int:
        """Return the number of items in a batch of the data set `name`."""
        return self.batch_size if name == "train" else self.val_batch_size

    def workers_of(self, name: str) -> int:
        """Return the number of loader processes of the data set `name`."""
        return self.num_workers if name == "train" else self.val_num_workers

    def collate(self, name: str) -> Callable[[list[Any]], Any]:
        """Return the function that makes a batch from samples; `name` is the name of the data set in messages."""
        return SampleCollate(name)

    def _loader(self, name: str, shuffle: bool, limit: int | None = None) -> ResumableLoader:
        if not self.multinode and self.trainer is not None and self.trainer.world_size > 1:
            raise UserError(
                f"data.params.{name}: multinode: false is for one process, and the run has {self.trainer.world_size}; "
                "set data.params.multinode=true"
            )
        return super()._loader(name, shuffle, limit)
