"""The data module that configurations name as `main.DataModuleFromConfig`."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

import torch
from pytorch_lightning import LightningDataModule
from torch.utils.data import Dataset, IterableDataset

from ldm.config.instantiate import instantiate_from_config
from ldm.errors import UserError, did_you_mean
from ldm.training.loader import ResumableLoader, ShareRecords, narrow, seed_worker

logger = logging.getLogger(__name__)

LATENT_CACHE_KEYS = ("variants", "path")


class WrappedDataset(Dataset):
    """Anything with a length and items as a PyTorch data set."""

    def __init__(self, dataset: Any) -> None:
        self.data = dataset

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        return self.data[index]


class DataModuleFromConfig(LightningDataModule):
    """Loaders for the data sets that configurations describe.

    Args:
        batch_size: items a batch, on each device.
        train, validation, test, predict: a `target:` and `params:` each; those left out have no loader.
        wrap: put a `WrappedDataset` around each set that is no stream.
        num_workers: processes that load; by default twice the batch size, but not more than there are cores.
        shuffle_test_loader, shuffle_val_dataloader: shuffle those too; training data always is.
        use_worker_init_fn: kept for published configurations; workers are always seeded apart.
        latent_cache: `{"variants": int, "path": str | None}` to compute the first stage's moments once, before
            training (see `ldm.training.latents`).

    Raises:
        UserError: a batch size below one, or an unknown key in `latent_cache`.
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
    ) -> None:
        super().__init__()
        if not isinstance(batch_size, int) or batch_size < 1:
            raise UserError(f"data.params.batch_size is {batch_size}; give a whole number from 1 on")
        for key in latent_cache or ():
            if key not in LATENT_CACHE_KEYS:
                hint = did_you_mean(key, LATENT_CACHE_KEYS)
                raise UserError(f'data.params.latent_cache has an unknown key "{key}"{hint}')
        self.batch_size = batch_size
        self.num_workers = min(batch_size * 2, os.cpu_count() or 1) if num_workers is None else num_workers
        self.wrap = wrap
        self.shuffle = {"test": shuffle_test_loader, "validation": shuffle_val_dataloader, "predict": False}
        self.use_worker_init_fn = use_worker_init_fn
        self.latent_cache = dict(latent_cache) if latent_cache else None
        given = {"train": train, "validation": validation, "test": test, "predict": predict}
        self.dataset_configs = {name: config for name, config in given.items() if config is not None}
        self.datasets: dict[str, Any] = {}
        # Lightning takes a loader's absence from the method's: only sets that exist may have one.
        hooks = {"train": "train", "validation": "val", "test": "test", "predict": "predict"}
        for name in self.dataset_configs:
            setattr(self, f"{hooks[name]}_dataloader", getattr(self, f"_{hooks[name]}_dataloader"))

    def prepare_data(self) -> None:
        """Build the data sets, which may fetch and unpack; Lightning calls this in one process a machine."""
        self.setup()

    def setup(self, stage: str | None = None) -> None:
        """Build the data sets, once."""
        if self.datasets:
            return
        datasets = {name: instantiate_from_config(config) for name, config in self.dataset_configs.items()}
        for name, dataset in datasets.items():
            if not isinstance(dataset, IterableDataset) and len(dataset) == 0:
                raise UserError(f"the data set data.params.{name} is empty; check its files")
            size = len(dataset) if hasattr(dataset, "__len__") else "a stream of"
            logger.info("%s: %s, %s items", name, type(dataset).__name__, size)
        wrapped = {name for name, d in datasets.items() if self.wrap and not isinstance(d, IterableDataset)}
        self.datasets = {name: WrappedDataset(d) if name in wrapped else d for name, d in datasets.items()}

    def _train_dataloader(self) -> ResumableLoader:
        dataset = self.datasets["train"]
        overfit = self.trainer is not None and self.trainer.overfit_batches > 0
        return self._loader("train", shuffle=not overfit, limit=self._limit(dataset))

    def _val_dataloader(self) -> ResumableLoader:
        return self._loader("validation", self.shuffle["validation"])

    def _test_dataloader(self) -> ResumableLoader:
        return self._loader("test", self.shuffle["test"])

    def _predict_dataloader(self) -> ResumableLoader:
        return self._loader("predict", self.shuffle["predict"])

    def _loader(self, name: str, shuffle: bool, limit: int | None = None) -> ResumableLoader:
        dataset = self.datasets[name]
        rank, replicas = (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)
        streamed = isinstance(dataset, IterableDataset)
        if streamed and self.num_workers == 0:
            narrow(dataset, rank, replicas)
        return ResumableLoader(
            dataset,
            self.batch_size,
            shuffle=shuffle,
            seed=int(os.environ.get("PL_GLOBAL_SEED", "0")),
            rank=rank,
            replicas=replicas,
            limit=limit,
            num_workers=self.num_workers,
            worker_init_fn=ShareRecords(rank, replicas) if streamed else seed_worker,
            # Workers of the training set start anew each epoch: a continued run then augments as this one does.
            persistent_workers=self.num_workers > 0 and name != "train",
            pin_memory=torch.cuda.is_available(),
        )

    def _limit(self, dataset: Any) -> int | None:
        """Batches that the trainer takes of an epoch, when it was told to take fewer than there are."""
        limit = self.trainer.limit_train_batches if self.trainer is not None else None
        if limit is None or isinstance(dataset, IterableDataset):
            return None
        if isinstance(limit, int):
            return limit
        batches = -(-len(dataset) // (self.batch_size * self.trainer.world_size))
        return int(batches * limit)
