"""Callbacks: the log folder, sample images, progress, and a report of time and memory."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import TQDMProgressBar
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities.seed import isolate_rng
from torch import nn

from ldm.io.grids import make_grid
from ldm.io.images import save_png

logger = logging.getLogger(__name__)


class SetupCallback(Callback):
    """Create the log folder and save the configuration when training starts.

    Args:
        resume: the checkpoint that the run resumes from, or None.
        now: time of the start, the prefix of the file names.
        logdir, ckptdir, cfgdir: the folders.
        config, lightning_config: the contents of `<now>-project.yaml` and `<now>-lightning.yaml`.
    """

    def __init__(
        self, resume: Any, now: str, logdir: Any, ckptdir: Any, cfgdir: Any, config: Any, lightning_config: Any
    ) -> None:
        super().__init__()
        self.resume, self.now = resume, now
        self.logdir, self.ckptdir, self.cfgdir = Path(logdir), Path(ckptdir), Path(cfgdir)
        self.config, self.lightning_config = config, lightning_config

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Create the folders and write the two files, in the first process only."""
        if not trainer.is_global_zero:
            return
        for folder in (self.logdir, self.ckptdir, self.cfgdir):
            folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, self.cfgdir / f"{self.now}-project.yaml")
        sections = OmegaConf.create({"lightning": self.lightning_config})
        OmegaConf.save(sections, self.cfgdir / f"{self.now}-lightning.yaml")
        logger.info('log folder: "%s"', self.logdir)


class ImageLogger(Callback):
    """Write the model's images to `images/{train,val}` and to TensorBoard.

    The random numbers of training stay unchanged. A validation shows images of its first batch, at most as often as
    training does.

    Args:
        batch_frequency: steps between two sets of images.
        max_images: number of images of a batch.
        clamp: clamp values to [-1, 1].
        increase_log_steps: also write images at every power of two before `batch_frequency`.
        rescale: the images are in [-1, 1]; otherwise in [0, 1].
        disabled: write no images.
        log_on_batch_idx: count batches of the epoch instead of steps.
        log_first_step: also write images of the first batch.
        log_images_kwargs: arguments of the model's `log_images`.
    """

    def __init__(
        self,
        batch_frequency: int,
        max_images: int,
        clamp: bool = True,
        increase_log_steps: bool = True,
        rescale: bool = True,
        disabled: bool = False,
        log_on_batch_idx: bool = False,
        log_first_step: bool = False,
        log_images_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.batch_freq, self.max_images = batch_frequency, max_images
        self.clamp, self.rescale, self.disabled = clamp, rescale, disabled
        self.increase_log_steps = increase_log_steps
        self.log_on_batch_idx, self.log_first_step = log_on_batch_idx, log_first_step
        self.log_images_kwargs = dict(log_images_kwargs or {})
        self._last_step = {"train": 0, "val": 0}

    def state_dict(self) -> dict[str, Any]:
        """Return the steps at which images were last written."""
        return dict(self._last_step)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the steps at which images were last written."""
        self._last_step.update(state_dict)

    def check_frequency(self, step: int, since: int) -> bool:
        """Return whether a step after `since`, up to and including `step`, is due for images."""
        if step <= since:
            return False
        if step // self.batch_freq > since // self.batch_freq:
            return True
        highest_power = 1 << (min(step, self.batch_freq).bit_length() - 1)
        return self.increase_log_steps and highest_power > since

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from zero again if batches of the epoch count."""
        if self.log_on_batch_idx:
            self._last_step["train"] = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write images of the training batch if they are due."""
        step = batch_idx if self.log_on_batch_idx else trainer.global_step
        first = self.log_first_step and trainer.current_epoch == 0 and batch_idx == 0
        if first or self.check_frequency(step, self._last_step["train"]):
            self._last_step["train"] = step
            self.log_img(trainer, pl_module, batch, batch_idx, "train")

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write images of the first validation batch if they are due."""
        step = trainer.global_step
        if batch_idx == 0 and not trainer.sanity_checking and self.check_frequency(step, self._last_step["val"]):
            self._last_step["val"] = step
            self.log_img(trainer, pl_module, batch, batch_idx, "val")

    def log_img(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, split: str) -> None:
        """Generate the model's images and write them, in the first process only."""
        if self.disabled or self.max_images < 1 or not hasattr(pl_module, "log_images") or not trainer.is_global_zero:
            return
        batch = _first_items(batch, self.max_images)
        with isolate_rng(), torch.no_grad(), _eval_mode(pl_module), trainer.precision_plugin.forward_context():
            images = pl_module.log_images(batch, split=split, **self.log_images_kwargs)
        folder = Path(trainer.default_root_dir) / "images" / split
        step, epoch = trainer.global_step, trainer.current_epoch
        for key, value in images.items():
            grid = self._grid(value)
            name = f"{key}_gs-{step:06}_e-{epoch:06}_b-{batch_idx:06}.png"
            save_png(grid, folder / name)
            for run_logger in trainer.loggers:
                if isinstance(run_logger, TensorBoardLogger):
                    run_logger.experiment.add_image(f"{split}/{key}", grid, global_step=step, dataformats="HWC")

    def _grid(self, images: torch.Tensor) -> Any:
        images = images.detach().float().cpu()
        images = images[None] if images.dim() == 3 else images[: self.max_images]
        if not self.rescale:
            images = images * 2.0 - 1.0
        return make_grid(images.clamp(-1.0, 1.0) if self.clamp else images, nrow=4)


@contextmanager
def _eval_mode(module: nn.Module) -> Iterator[None]:
    """Set evaluation mode, and restore the mode of each submodule afterwards."""
    modes = {submodule: submodule.training for submodule in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for submodule, training in modes.items():
            submodule.training = training


def _first_items(batch: Any, count: int) -> Any:
    """Return a batch with the first `count` items of every tensor and list, because fewer images take less time."""
    if isinstance(batch, Mapping):
        return {key: _first_items(value, count) for key, value in batch.items()}
    if isinstance(batch, torch.Tensor):
        return batch[:count] if batch.dim() else batch
    return batch[:count] if isinstance(batch, list | tuple) else batch


class CUDACallback(Callback):
    """Report the time and peak memory of every epoch, of the device or, on a CPU, of the process."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to measure, because a resumed epoch does not call `on_train_epoch_start`."""
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to measure."""
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(trainer.strategy.root_device)
            torch.cuda.synchronize(trainer.strategy.root_device)
        self.start_time = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report time and memory, averaged over all processes."""
        device = trainer.strategy.root_device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            memory = torch.cuda.max_memory_allocated(device)
        else:
            memory = _peak_resident_memory()
        values = torch.tensor([time.perf_counter() - self.start_time, memory / 2**20], device=device)
        seconds, mebibytes = trainer.strategy.reduce(values, reduce_op="mean").tolist()
        if trainer.is_global_zero:
            logger.info("epoch %d: %.2f s, peak memory %.0f MiB", trainer.current_epoch, seconds, mebibytes)


def _peak_resident_memory() -> int:
    """Return the peak memory of the process in bytes, or 0 if the system does not report it."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class ProgressBar(TQDMProgressBar):
    """Lightning's progress bar, which stays after each epoch and shows the time left of the whole run."""

    def __init__(self) -> None:
        super().__init__(leave=True)
        self._start: tuple[float, int] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record time and step of the start."""
        super().on_train_start(trainer, pl_module)
        self._start = (time.monotonic(), trainer.global_step)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Return the values that the bar shows: without the version, with the time left."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        seconds_left = self._seconds_left(trainer)
        if seconds_left is not None:
            minutes, seconds = divmod(int(seconds_left), 60)
            metrics["left"] = f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
        return metrics

    def _seconds_left(self, trainer: Trainer) -> float | None:
        total = trainer.max_steps
        if total < 0 and trainer.max_epochs and trainer.max_epochs > 0:
            total = trainer.max_epochs * trainer.num_training_batches // max(1, trainer.accumulate_grad_batches)
        if self._start is None or not 0 < total < float("inf") or trainer.global_step <= self._start[1]:
            return None
        elapsed = time.monotonic() - self._start[0]
        return elapsed / (trainer.global_step - self._start[1]) * max(0, total - trainer.global_step)
