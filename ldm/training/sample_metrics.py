"""Callback that measures samples during training."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch.utils.data import IterableDataset

from ldm.errors import UserError
from ldm.training.collate import Collate

if TYPE_CHECKING:
    from ldm.evaluation.data_sets import DatasetImages
    from ldm.evaluation.features import SetFeatures
    from ldm.evaluation.network import FeatureNetwork

logger = logging.getLogger(__name__)

METRICS = ("fid", "kid")
FIRST_SEED = 0
# Options of the previews of a latent diffusion model that leave out everything but samples.
SAMPLES_ONLY = {
    "quantize_denoised": False,
    "inpaint": False,
    "plot_progressive_rows": False,
    "plot_diffusion_rows": False,
}


class SampleMetrics(Callback):
    """Log FID or KID of samples from the averaged weights, as `val/fid` or `val/kid`.

    The samples are computed at the end of a validation, at most every `every_n_steps` steps. Their conditioning is that
    of items of the data set `split`, whose images are the reference. The same items and seeds are used each time. The
    best checkpoint is kept with `lightning.modelcheckpoint.params: {monitor: val/fid, mode: min}`.

    Args:
        n: number of samples.
        every_n_steps: smallest number of steps between two computations; validations between them log the last value.
        metric: "fid" or "kid".
        split: "train" or "validation".
        reference_n: number of images of the reference; default: all of the data set.
        features: weights of the feature network, or a TorchScript module; see `ldm.evaluation.network`.
        batch_size: samples at once.
        ddim_steps, ddim_eta: settings of DDIM, for latent diffusion models.
        allow_few: compute FID also of fewer images than features.
        kid_subset_size: images of a subset for KID; default: 1,000, or `n` if that is smaller.

    Raises:
        UserError: a value is not allowed.
    """

    def __init__(
        self,
        n: int = 2500,
        every_n_steps: int = 5000,
        metric: str = "fid",
        split: str = "train",
        reference_n: int | None = None,
        features: str | None = None,
        batch_size: int = 50,
        ddim_steps: int = 50,
        ddim_eta: float = 0.0,
        allow_few: bool = False,
        kid_subset_size: int | None = None,
    ) -> None:
        super().__init__()
        if metric not in METRICS:
            raise UserError(f'SampleMetrics: metric "{metric}" is not one of {", ".join(METRICS)}')
        if split not in ("train", "validation"):
            raise UserError(f'SampleMetrics: split "{split}" is neither train nor validation')
        if min(n, every_n_steps, batch_size, ddim_steps) < 1:
            raise UserError("SampleMetrics: n, every_n_steps, batch_size and ddim_steps must be at least 1")
        self.n, self.every_n_steps, self.metric, self.split = n, every_n_steps, metric, split
        self.reference_n, self.features, self.batch_size = reference_n, features, batch_size
        self.ddim_steps, self.ddim_eta, self.allow_few = ddim_steps, ddim_eta, allow_few
        self.kid_subset_size = kid_subset_size or min(1000, n)
        self._last_step: int | None = None
        self._value: float | None = None
        self._network: FeatureNetwork | None = None
        self._reference: SetFeatures | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the step and the value of the last computation."""
        return {"last_step": self._last_step, "value": self._value}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the step and the value of the last computation."""
        self._last_step, self._value = state_dict["last_step"], state_dict["value"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load the feature network, so that a missing one is reported before training.

        Raises:
            UserError: it is missing, or the data set has no length or too few items.
        """
        from ldm.evaluation.network import load_network
        from ldm.evaluation.scores import check_count

        if not trainer.is_global_zero:
            return
        self._network = load_network(self.features, pl_module.device)
        count = min(self.n, len(self._reference_images(trainer)))
        if self._network.dimension is not None:
            check_count(self._settings(), "SampleMetrics", count, self._network.dimension)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute the metric if it is due, and log it."""
        if trainer.sanity_checking or (self._network is None and trainer.is_global_zero):
            return
        step = trainer.global_step
        if self._last_step is None or step - self._last_step >= self.every_n_steps:
            value = self._compute(trainer, pl_module) if trainer.is_global_zero else None
            self._value = trainer.strategy.broadcast(value)
            self._last_step = step
        if self._value is not None:
            pl_module.log(f"val/{self.metric}", self._value, prog_bar=True)

    def _settings(self) -> Any:
        from ldm.evaluation.scores import Settings

        return Settings((self.metric,), subset_size=self.kid_subset_size, allow_few=self.allow_few)

    def _dataset(self, trainer: Trainer) -> tuple[Any, Any]:
        """Return the data set, and its configuration.

        Raises:
            UserError: the data module has no such data set.
        """
        data: Any = getattr(trainer, "datamodule", None)
        dataset = getattr(data, "datasets", {}).get(self.split)
        if dataset is None:
            raise UserError(f"SampleMetrics: the configuration has no data.params.{self.split}; choose another split")
        if isinstance(dataset, IterableDataset):
            raise UserError(f"SampleMetrics: data.params.{self.split} is a stream without an end; choose another split")
        return dataset, data.dataset_configs.get(self.split)

    def _reference_images(self, trainer: Trainer) -> DatasetImages:
        from ldm.evaluation.data_sets import DatasetImages

        dataset, settings = self._dataset(trainer)
        return DatasetImages(dataset, f"SampleMetrics: data.params.{self.split}", settings, self.reference_n)

    def _compute(self, trainer: Trainer, pl_module: LightningModule) -> float:
        """Return the metric; NaN if a sample has values that are not finite."""
        from ldm.evaluation.features import KEPT, Collector, kept_indices
        from ldm.evaluation.reference import cache_folder, cached_features
        from ldm.evaluation.scores import score
        from ldm.io.pixels import to_uint8

        network = self._network
        assert network is not None
        kept = KEPT if self.metric == "kid" else 0
        if self._reference is None:
            images = self._reference_images(trainer)
            self._reference = cached_features(images, network, self.batch_size, kept, cache_folder(), progress=False)
        collector = Collector(network, kept_indices(self.n, kept) if kept else None, False)
        for samples in self._samples(trainer, pl_module):
            if not torch.isfinite(samples).all():
                logger.warning("val/%s is NaN: a sample at step %d is not finite", self.metric, trainer.global_step)
                return math.nan
            collector.add(to_uint8(samples))
        figure = score(collector.result(), self._reference, self._settings(), network.device)[self.metric]
        logger.info("step %d: val/%s %.4g, %d samples", trainer.global_step, self.metric, figure.value, self.n)
        return figure.value

    def _samples(self, trainer: Trainer, pl_module: LightningModule) -> Iterator[torch.Tensor]:
        """Yield batches of samples (B, 3, H, W) in [-1, 1], with the conditioning of evenly spaced items."""
        from ldm.evaluation.data_sets import DatasetImages, seeded

        dataset, _ = self._dataset(trainer)
        images = DatasetImages(dataset, f"data.params.{self.split}")
        order = np.linspace(0, len(dataset) - 1, self.n).round().astype(int)
        collate = Collate(f"data.params.{self.split}")
        for start in range(0, self.n, self.batch_size):
            items = [images.item(int(index)) for index in order[start : start + self.batch_size]]
            batch = trainer.strategy.batch_to_device(collate(items))
            with seeded(FIRST_SEED + start), torch.no_grad(), trainer.precision_plugin.forward_context():
                yield self._sample(pl_module, batch, len(items)).float()

    def _sample(self, pl_module: Any, batch: Any, count: int) -> torch.Tensor:
        """Return samples with the conditioning of a batch, by the `log_images` of the model."""
        options: dict[str, Any] = {"N": count, "return_keys": ["samples"]}
        if hasattr(getattr(pl_module, "model", pl_module), "first_stage_model"):
            options |= {"ddim_steps": self.ddim_steps, "ddim_eta": self.ddim_eta, **SAMPLES_ONLY}
        return pl_module.log_images(batch, **options)["samples"]
