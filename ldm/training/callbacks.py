"""What happens beside training: folders, pictures, progress, and a report of time and memory."""

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
    """Makes the log folder and writes down the configuration when training starts, not earlier.

    Args:
        resume: the checkpoint that the run continues, or nothing.
        now: the run's start, the beginning of the files' names.
        logdir, ckptdir, cfgdir: the folders.
        config, lightning_config: what `<now>-project.yaml` and `<now>-lightning.yaml` hold.
    """

    def __init__(
        self, resume: Any, now: str, logdir: Any, ckptdir: Any, cfgdir: Any, config: Any, lightning_config: Any
    ) -> None:
        super().__init__()
        self.resume, self.now = resume, now
        self.logdir, self.ckptdir, self.cfgdir = Path(logdir), Path(ckptdir), Path(cfgdir)
        self.config, self.lightning_config = config, lightning_config

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the folders and write the two files, in the first process only."""
        if not trainer.is_global_zero:
            return
        for folder in (self.logdir, self.ckptdir, self.cfgdir):
            folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, self.cfgdir / f"{self.now}-project.yaml")
        sections = OmegaConf.create({"lightning": self.lightning_config})
        OmegaConf.save(sections, self.cfgdir / f"{self.now}-lightning.yaml")
        logger.info('this run is in "%s"', self.logdir)


class ImageLogger(Callback):
    """Writes pictures under `images/{train,val}` and to TensorBoard, without touching the training's random numbers.

    Args:
        batch_frequency: steps between pictures. Of a validation its first batch is shown, at most as often.
        max_images: of a batch.
        clamp: cut values to [-1, 1].
        increase_log_steps: also at every power of two before `batch_frequency`.
        rescale: pictures are in [-1, 1]; otherwise in [0, 1].
        disabled: write none.
        log_on_batch_idx: count batches of the epoch instead of steps.
        log_first_step: also the very first batch.
        log_images_kwargs: passed to the model's `log_images`.
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
        self._last = {"train": 0, "val": 0}

    def state_dict(self) -> dict[str, Any]:
        """The steps at which pictures were last written."""
        return dict(self._last)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from those steps."""
        self._last.update(state_dict)

    def check_frequency(self, step: int, since: int) -> bool:
        """Whether a step that asks for pictures lies after `since` and not after `step`."""
        if step <= since:
            return False
        if step // self.batch_freq > since // self.batch_freq:
            return True
        highest_power = 1 << (min(step, self.batch_freq).bit_length() - 1)
        return self.increase_log_steps and highest_power > since

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start anew where batches of the epoch are counted."""
        if self.log_on_batch_idx:
            self._last["train"] = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Pictures of the batch that was just learnt from."""
        step = batch_idx if self.log_on_batch_idx else trainer.global_step
        first = self.log_first_step and trainer.current_epoch == 0 and batch_idx == 0
        if first or self.check_frequency(step, self._last["train"]):
            self._last["train"] = step
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
        """Pictures of a validation's first batch."""
        step = trainer.global_step
        if batch_idx == 0 and not trainer.sanity_checking and self.check_frequency(step, self._last["val"]):
            self._last["val"] = step
            self.log_img(trainer, pl_module, batch, batch_idx, "val")

    def log_img(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, split: str) -> None:
        """Ask the model for pictures and write them, in the first process only."""
        if self.disabled or self.max_images < 1 or not hasattr(pl_module, "log_images") or not trainer.is_global_zero:
            return
        few = _first_items(batch, self.max_images)
        with isolate_rng(), torch.no_grad(), _evaluating(pl_module), trainer.precision_plugin.forward_context():
            images = pl_module.log_images(few, split=split, **self.log_images_kwargs)
        folder = Path(trainer.default_root_dir) / "images" / split
        step, epoch = trainer.global_step, trainer.current_epoch
        for key, value in images.items():
            grid = self._grid(value)
            name = f"{key}_gs-{step:06}_e-{epoch:06}_b-{batch_idx:06}.png"
            save_png(grid, folder / name)
            for each in trainer.loggers:
                if isinstance(each, TensorBoardLogger):
                    each.experiment.add_image(f"{split}/{key}", grid, global_step=step, dataformats="HWC")

    def _grid(self, images: torch.Tensor) -> Any:
        images = images.detach().float().cpu()
        images = images[None] if images.dim() == 3 else images[: self.max_images]
        if not self.rescale:
            images = images * 2.0 - 1.0
        return make_grid(images.clamp(-1.0, 1.0) if self.clamp else images, nrow=4)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards each part is in its own mode again."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


def _first_items(batch: Any, count: int) -> Any:
    """The first `count` items of every tensor and list in a batch: fewer pictures cost less time."""
    if isinstance(batch, Mapping):
        return {key: _first_items(value, count) for key, value in batch.items()}
    if isinstance(batch, torch.Tensor):
        return batch[:count] if batch.dim() else batch
    return batch[:count] if isinstance(batch, list | tuple) else batch


class CUDACallback(Callback):
    """Reports every epoch's time and peak memory: the device's, or on a CPU the process's."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start measuring: a continued epoch has no start of its own."""
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start measuring."""
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(trainer.strategy.root_device)
            torch.cuda.synchronize(trainer.strategy.root_device)
        self.start_time = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report, averaged over the processes."""
        device = trainer.strategy.root_device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            memory = torch.cuda.max_memory_allocated(device)
        else:
            memory = _peak_resident_memory()
        measured = torch.tensor([time.perf_counter() - self.start_time, memory / 2**20], device=device)
        seconds, mebibytes = trainer.strategy.reduce(measured, reduce_op="mean").tolist()
        if trainer.is_global_zero:
            logger.info("epoch %d: %.2f s, peak memory %.0f MiB", trainer.current_epoch, seconds, mebibytes)


def _peak_resident_memory() -> int:
    """In bytes; 0 where the system does not tell."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class ProgressBar(TQDMProgressBar):
    """Lightning's bar, which stays after each epoch and tells how long the whole run still takes."""

    def __init__(self) -> None:
        super().__init__(leave=True)
        self._began: tuple[float, int] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the time."""
        super().on_train_start(trainer, pl_module)
        self._began = (time.monotonic(), trainer.global_step)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """What the bar shows: without the version, with the time left."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        left = self._seconds_left(trainer)
        if left is not None:
            minutes, seconds = divmod(int(left), 60)
            metrics["left"] = f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
        return metrics

    def _seconds_left(self, trainer: Trainer) -> float | None:
        total = trainer.max_steps
        if total < 0 and trainer.max_epochs and trainer.max_epochs > 0:
            total = trainer.max_epochs * trainer.num_training_batches // max(1, trainer.accumulate_grad_batches)
        if self._began is None or not 0 < total < float("inf") or trainer.global_step <= self._began[1]:
            return None
        elapsed = time.monotonic() - self._began[0]
        return elapsed / (trainer.global_step - self._began[1]) * max(0, total - trainer.global_step)
