"""Data module that configurations name as `main.DataModuleFromConfig`."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pytorch_lightning import LightningDataModule
from torch.utils.data import Dataset, IterableDataset

from ldm.config.instantiate import instantiate_from_config
from ldm.data.image_files import ImageFiles
from ldm.data.unreadable import check_limit, wrapped
from ldm.errors import UserError, did_you_mean
from ldm.training.classes import check_same_classes
from ldm.training.collate import Collate
from ldm.training.loader import ResumableLoader, StreamWorkerInit, length_of, seed_worker, shard_stream

logger = logging.getLogger(__name__)

LATENT_CACHE_KEYS = ("variants", "path")
# The data sets, and the names that Lightning has for them.
PREFIXES = {"train": "train", "validation": "val", "test": "test", "predict": "predict"}


class WrappedDataset(Dataset):
    """PyTorch data set around any object with a length and items."""

    def __init__(self, dataset: Any) -> None:
        self.data = dataset

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        return self.data[index]


def shown_name(prefix: str) -> str:
    """Return the name of a data set in messages; `prefix` is the name that Lightning has for it."""
    return next((f"data.params.{name}" for name, own in PREFIXES.items() if own == prefix), f"the {prefix} data")


class DataModuleFromConfig(LightningDataModule):
    """Data module that builds data sets and their loaders from a configuration.

    Training data is always shuffled.

    Args:
        batch_size: number of items in a batch, on each device.
        train, validation, test, predict: `target` and `params` of a data set; without them there is no loader.
        wrap: wrap each data set that is not a stream in a `WrappedDataset`.
        num_workers: number of loader processes (default: twice the batch size, at most the number of cores).
        shuffle_test_loader, shuffle_val_dataloader: shuffle the test and validation data as well.
        use_worker_init_fn: accepted for published configurations; each worker always has its own seed.
        latent_cache: `{"variants": int, "path": str | None}` to compute the moments of the first stage once, before
            training (see `ldm.training.latents`).
        max_unreadable: largest share of image files that may be missing or damaged, which is checked before training;
            None skips the check. Data sets with a parameter of that name use their own.

    Raises:
        UserError: the batch size is not positive, or `latent_cache` has an unknown key.
    """

    def __init__(
        self,
        batch_size: int,
        train: Mapping[str, Any] | None = None,
        validation: Mapping[str, Any] | None = None,
        test: Mapping[str, Any] | None = None,
        predict: Mapping[str, Any] | None = None,
        wrap: bool = False,
        num_workers: int | None = None,
        shuffle_test_loader: bool = False,
        use_worker_init_fn: bool = False,
        shuffle_val_dataloader: bool = False,
        latent_cache: Mapping[str, Any] | None = None,
        max_unreadable: float | None = 0.01,
    ) -> None:
        super().__init__()
        if not isinstance(batch_size, int) or batch_size < 1:
            raise UserError(f"data.params.batch_size must be an integer of at least 1, not {batch_size}")
        for key in latent_cache or ():
            if key not in LATENT_CACHE_KEYS:
                hint = did_you_mean(key, LATENT_CACHE_KEYS)
                raise UserError(f'data.params.latent_cache has an unknown key "{key}"{hint}')
        self.batch_size = batch_size
        self.num_workers = min(batch_size * 2, os.cpu_count() or 1) if num_workers is None else num_workers
        self.wrap = wrap
        check_limit(max_unreadable, "data.params")
        self.max_unreadable = max_unreadable
        self.shuffle = {"test": shuffle_test_loader, "validation": shuffle_val_dataloader, "predict": False}
        self.use_worker_init_fn = use_worker_init_fn
        self.latent_cache = dict(latent_cache) if latent_cache else None
        configs = {"train": train, "validation": validation, "test": test, "predict": predict}
        self.dataset_configs = {name: config for name, config in configs.items() if config is not None}
        self.datasets: dict[str, Any] = {}
        # Lightning looks for the loaders' methods, so only existing data sets may have one.
        for name in self.dataset_configs:
            setattr(self, f"{PREFIXES[name]}_dataloader", getattr(self, f"_{PREFIXES[name]}_dataloader"))

    def prepare_data(self) -> None:
        """Build the data sets, which may download files; Lightning calls this in one process per machine."""
        self.setup()

    def setup(self, stage: str | None = None) -> None:
        """Build the data sets if they do not exist yet."""
        if self.datasets:
            return
        datasets = {name: instantiate_from_config(config) for name, config in self.dataset_configs.items()}
        for name, dataset in datasets.items():
            length, is_stream = length_of(dataset), isinstance(dataset, IterableDataset)
            if length is None and not is_stream:
                raise UserError(f"data.params.{name}: {type(dataset).__name__} has no length; define __len__")
            if length == 0:
                remedy = "set its number of records" if is_stream else "check its files"
                raise UserError(f"the data set data.params.{name} is empty; {remedy}")
            size = "a stream" if length is None else f"{length} items"
            logger.info("%s: %s, %s", name, type(dataset).__name__, size)
            for images in wrapped(dataset):
                if isinstance(images, ImageFiles) and not images.unreadable.is_checked:
                    images.max_unreadable = self.max_unreadable
                    images.check_files()
        check_same_classes(datasets)
        self.datasets = {
            name: WrappedDataset(dataset) if self.wrap and not isinstance(dataset, IterableDataset) else dataset
            for name, dataset in datasets.items()
        }

    def batch_size_of(self, name: str) -> int:
        """Return the number of items in a batch of the data set `name`, such as "validation"."""
        return self.batch_size

    def workers_of(self, name: str) -> int:
        """Return the number of loader processes of the data set `name`."""
        return self.num_workers

    def collate(self, name: str) -> Callable[[list[Any]], Any]:
        """Return the function that makes a batch from items; `name` is the name of the data set in messages."""
        return Collate(name)

    def _train_dataloader(self) -> ResumableLoader:
        dataset, trainer = self.datasets["train"], self._any_trainer()
        overfit = trainer is not None and trainer.overfit_batches > 0
        return self._loader("train", shuffle=not overfit, limit=self._limit(dataset))

    def _val_dataloader(self) -> ResumableLoader:
        return self._loader("validation", self.shuffle["validation"])

    def _test_dataloader(self) -> ResumableLoader:
        return self._loader("test", self.shuffle["test"])

    def _predict_dataloader(self) -> ResumableLoader:
        return self._loader("predict", self.shuffle["predict"])

    def _any_trainer(self) -> Any:
        return self.trainer  # some of its attributes are set without a declaration

    def _loader(self, name: str, shuffle: bool, limit: int | None = None) -> ResumableLoader:
        dataset, batch_size, workers = self.datasets[name], self.batch_size_of(name), self.workers_of(name)
        rank, replicas = (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)
        is_stream = isinstance(dataset, IterableDataset)
        if is_stream and workers == 0:
            shard_stream(dataset, rank, replicas, batch_size if replicas > 1 else None)
        return ResumableLoader(
            dataset,
            batch_size,
            shuffle=shuffle,
            seed=int(os.environ.get("PL_GLOBAL_SEED", "0")),
            rank=rank,
            replicas=replicas,
            limit=limit,
            name=shown_name(PREFIXES[name]),
            num_workers=workers,
            collate_fn=self.collate(shown_name(PREFIXES[name])),
            worker_init_fn=StreamWorkerInit(rank, replicas, batch_size) if is_stream else seed_worker,
            evaluates=name != "train",  # its workers start in each pass, so that a resumed run repeats random numbers
            pin_memory=torch.cuda.is_available(),
        )

    def _limit(self, dataset: Any) -> int | None:
        """Return the number of batches in an epoch if the trainer limits it."""
        trainer = self._any_trainer()
        limit = None if trainer is None else trainer.limit_train_batches
        if limit is None or isinstance(dataset, IterableDataset):
            return None
        if isinstance(limit, int):
            return limit
        batches = -(-len(dataset) // (self.batch_size * trainer.world_size))
        return int(batches * limit)
