"""Callbacks: the log folder, sample images, and a report of time and memory."""

from __future__ import annotations

import logging
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import nn

from ldm.errors import is_out_of_memory
from ldm.io.grids import make_grid
from ldm.io.images import save_png
from ldm.io.pixels import in_random_colours
from ldm.training.image_loggers import log_image
from ldm.training.limits import total_steps
from ldm.training.rng import preserved_rng
from ldm.training.run_folder import save_configuration

logger = logging.getLogger(__name__)


class SetupCallback(Callback):
    """Create the log folder when training starts, and save the configuration.

    A resumed run saves its configuration after its first batch, so that one that fails to start changes nothing.

    Args:
        resume: the checkpoint that the run resumes from, or None.
        now: time of the start, the prefix of the file names.
        logdir, ckptdir, cfgdir: the folders.
        config, lightning_config: the contents of `<now>-project.yaml` and `<now>-lightning.yaml`.
        options: the content of `<now>-options.yaml`, if there is one.
    """

    def __init__(
        self,
        resume: Any,
        now: str,
        logdir: Any,
        ckptdir: Any,
        cfgdir: Any,
        config: Any,
        lightning_config: Any,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.resume, self.now = resume, now
        self.logdir, self.ckptdir, self.cfgdir = Path(logdir), Path(ckptdir), Path(cfgdir)
        self.config, self.lightning_config, self.options = config, lightning_config, options
        self.started = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Create the folders and save the configuration of a new run, in the first process only."""
        if not trainer.is_global_zero:
            return
        for folder in (self.logdir, self.ckptdir, self.cfgdir):
            folder.mkdir(parents=True, exist_ok=True)
        if not self.resume:
            self._save()
        logger.info('log folder: "%s"', self.logdir)

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Save the configuration of a resumed run after its first batch, in the first process only."""
        is_trial = trainer.fast_dev_run  # type: ignore[attr-defined] # Lightning sets it without a declaration
        if not self.started and self.resume and trainer.is_global_zero and not is_trial:
            self._save()
        self.started = True

    def _save(self) -> None:
        parts = {"project": self.config, "lightning": {"lightning": self.lightning_config}}
        if self.options is not None:
            parts["options"] = {"options": self.options}
        save_configuration(self.cfgdir, self.now, parts)


class ImageLogger(Callback):
    """Write the model's images to `images/{train,val}` and to every logger that shows images.

    The random numbers of training stay unchanged. A validation shows images of its first batch, at most as often as
    training does. A run of fewer steps than `batch_frequency` also shows its first and its last batch. Images that
    cannot be generated or written are reported once, and training goes on.

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
        self.log_steps = [2**n for n in range(max(1, batch_frequency).bit_length())] if increase_log_steps else []
        self.log_on_batch_idx, self.log_first_step = log_on_batch_idx, log_first_step
        self.log_images_kwargs = dict(log_images_kwargs or {})
        self._last_step = {"train": 0, "val": 0}
        self._since: int | None = None
        self._reported: set[str] = set()

    def state_dict(self) -> dict[str, Any]:
        """Return the steps at which images were last written."""
        return dict(self._last_step)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the steps at which images were last written."""
        self._last_step.update(state_dict)

    def check_frequency(self, check_idx: int) -> bool:
        """Return whether images are due at a step: a multiple of `batch_freq`, or one of `log_steps`.

        In training, the steps between the last images and this one count too, because a step may take several batches.
        """
        since = check_idx - 1 if self._since is None else self._since
        if check_idx <= since:
            return False
        if check_idx // self.batch_freq > since // self.batch_freq:
            return True
        return any(since < step <= check_idx for step in self.log_steps)

    def _is_due(self, split: str, step: int) -> bool:
        self._since = self._last_step[split]
        try:
            return self.check_frequency(step)
        finally:
            self._since = None

    def _is_short(self, trainer: Trainer) -> bool:
        """Return whether a run ends before the first multiple of `batch_freq`, unless a subclass chooses the steps."""
        if type(self).check_frequency is not ImageLogger.check_frequency:
            return False
        total = total_steps(trainer)
        return total is not None and total < self.batch_freq

    def _is_last(self, split: str, step: int, trainer: Trainer) -> bool:
        """Return whether this is the last step of a short run, and its images have not been written yet."""
        return self._is_short(trainer) and trainer.global_step == total_steps(trainer) and self._last_step[split] < step

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from zero again if batches of the epoch count."""
        if self.log_on_batch_idx:
            self._last_step["train"] = 0

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write images of the training batch if they are due."""
        step = batch_idx if self.log_on_batch_idx else trainer.global_step
        first = self.log_first_step or self._is_short(trainer)
        first = first and trainer.current_epoch == 0 and batch_idx == 0
        if first or self._is_due("train", step) or self._is_last("train", step, trainer):
            self._last_step["train"] = step
            self.log_img(pl_module, batch, batch_idx, "train")

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
        due = batch_idx == 0 and not trainer.sanity_checking
        if due and (self._is_due("val", step) or self._is_last("val", step, trainer)):
            self._last_step["val"] = step
            self.log_img(pl_module, batch, batch_idx, "val")

    def log_img(self, pl_module: LightningModule, batch: Any, batch_idx: int, split: str = "train") -> None:
        """Generate the model's images and write them, in the first process only."""
        trainer = pl_module.trainer
        if self.disabled or self.max_images < 1 or not hasattr(pl_module, "log_images") or not trainer.is_global_zero:
            return
        try:
            images = dict(self._generate(trainer, pl_module, _first_items(batch, self.max_images), split))
        except Exception as error:
            self._report_failure(split, f"{split} images", error)
            return
        for key, value in images.items():
            try:
                self._write(trainer, split, key, value, batch_idx)
            except Exception as error:
                self._report_failure(split, f'{split} images "{key}"', error)

    def _generate(self, trainer: Trainer, pl_module: Any, batch: Any, split: str) -> dict[str, torch.Tensor]:
        """Return the images of a module with `log_images`."""
        with preserved_rng(), torch.no_grad(), _eval_mode(pl_module), trainer.precision_plugin.forward_context():
            return pl_module.log_images(batch, split=split, **self.log_images_kwargs)

    def log_local(
        self,
        save_dir: str | Path,
        split: str,
        images: Mapping[str, torch.Tensor],
        global_step: int,
        current_epoch: int,
        batch_idx: int,
    ) -> None:
        """Write a grid of each batch of images (B, C, H, W) to `images/<split>` in a folder."""
        name = f"gs-{global_step:06}_e-{current_epoch:06}_b-{batch_idx:06}.png"
        for key, value in images.items():
            save_png(self._grid(value), Path(save_dir) / "images" / split / f"{key}_{name}")

    def _write(self, trainer: Trainer, split: str, key: str, images: torch.Tensor, batch_idx: int) -> None:
        """Write images to a file and to the loggers, unless some of their values are not finite."""
        images, name = images.detach().float().cpu(), f"{split}/{key}"
        if not images.isfinite().all():
            self._warn_once(name, f'the images "{name}" are not finite and are not written; training goes on')
            return
        step, epoch = trainer.global_step, trainer.current_epoch
        self.log_local(trainer.default_root_dir, split, {key: images}, step, epoch, batch_idx)
        if not trainer.loggers:
            return
        grid = self._grid(images)
        for run_logger in trainer.loggers:
            try:
                log_image(run_logger, name, grid, step)
            except Exception as error:
                place = type(run_logger).__name__
                self._report_failure(place, f"images in {place}", error)

    def _grid(self, images: torch.Tensor) -> np.ndarray:
        images = images[None] if images.dim() == 3 else images[: self.max_images]
        if not self.rescale:
            images = images * 2.0 - 1.0
        if images.shape[1] not in (1, 3, 4):
            images = in_random_colours(images)
        return make_grid(images.clamp(-1.0, 1.0) if self.clamp else images, nrow=4)

    def _report_failure(self, place: str, what: str, error: Exception) -> None:
        """Log one line for each place and type of error."""
        reason = " ".join(str(error).split()) or type(error).__name__
        if is_out_of_memory(error):
            reason = "out of memory"
            traceback.clear_frames(error.__traceback__)  # they hold tensors
            torch.cuda.empty_cache()
        logger.debug("no %s", what, exc_info=error)
        self._warn_once(f"{place}: {type(error).__name__}", f"no {what}: {reason}; training goes on")

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._reported:
            self._reported.add(kind)
            logger.warning("%s", message)


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

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any = None) -> None:
        """Report time and memory, averaged over all processes."""
        device = trainer.strategy.root_device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            memory: float = torch.cuda.max_memory_allocated(device)
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
