"""Progress of a run in one line: a bar in a terminal, a line a minute in a log file."""

from __future__ import annotations

import logging
import shutil
import sys
import time
from collections.abc import Mapping
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import ProgressBar as LightningProgressBar
from pytorch_lightning.callbacks import Timer

from ldm.training.limits import total_steps
from ldm.training.throughput import IMAGES_PER_SECOND

logger = logging.getLogger(__name__)

COLUMNS = 100
SMALLEST_BAR, LARGEST_BAR = 6, 20
# Logged values that a line shows, by their label. The first name that is logged counts.
LOSSES = {
    "loss": ("train/loss_step", "train/loss", "aeloss_step", "aeloss", "loss_step", "loss"),
    "disc": ("discloss_step", "discloss"),
}
# Fields that a line leaves out first if it is too long.
LEAST_IMPORTANT = ("epoch", "disc", "grad", "lr", "speed")


class ProgressBar(LightningProgressBar):
    """Progress bar with the loss, the learning rate, the gradient norm, images a second and the time left.

    The line has at most 100 columns. If stderr is not a terminal, such as a log file, the line is logged once a minute
    and at the end. The time left includes validation, previews and checkpoints. It respects `max_time`.

    Args:
        seconds: time between two lines in a log file.
        refresh_seconds: time between two updates in a terminal.
    """

    def __init__(self, seconds: float = 60.0, refresh_seconds: float = 0.5) -> None:
        super().__init__()
        self.seconds, self.refresh_seconds = seconds, refresh_seconds
        self._is_enabled = True
        self._start: tuple[float, int] | None = None
        self._shown_at = 0.0
        self._epoch = 0
        self._shown_step: int | None = None
        self._terminal = TerminalLine()

    def disable(self) -> None:
        """Show nothing."""
        self._is_enabled = False

    def enable(self) -> None:
        """Show progress again."""
        self._is_enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print a line above the bar."""
        self._terminal.clear()
        super().print(*args, **kwargs)

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch the log lines, which appear above the bar."""
        self._terminal.open()
        self._shown_at = time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of the log lines."""
        self._terminal.open()
        self._start, self._shown_at, self._shown_step = None, time.monotonic(), None
        self._epoch = trainer.current_epoch

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show the line if it is due."""
        if self._start is None:  # the first batch takes longer than the others
            self._start = (time.monotonic(), trainer.global_step)
        self._epoch = trainer.current_epoch  # the trainer's is one higher at the end
        if self._is_due():
            self._show_step(trainer)

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Show the batch of a validation if a line is due."""
        self._show_evaluation(trainer, "validation", trainer.fit_loop.epoch_loop.val_loop)

    def on_test_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Show the batch of a test if a line is due."""
        self._show_evaluation(trainer, "test", trainer.test_loop)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the last line."""
        if self._shown_step != trainer.global_step or self._terminal.is_terminal:
            self._show_step(trainer)
        self._terminal.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the line as it is, above the error."""
        self._terminal.close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the line as it is."""
        self._terminal.close()

    def _is_due(self) -> bool:
        interval = self.refresh_seconds if self._terminal.is_terminal else self.seconds
        return self._is_enabled and time.monotonic() - self._shown_at >= interval

    def _show_step(self, trainer: Trainer) -> None:
        total = total_steps(trainer)
        fields = self._fields(trainer, total)
        share = trainer.global_step / total if total else None
        self._show(fields, share)
        self._shown_step = trainer.global_step

    def _show_evaluation(self, trainer: Trainer, name: str, loop: Any) -> None:
        if not self._is_due():
            return
        batches, done = loop.max_batches, loop.batch_progress.total.ready
        total = sum(batches) if isinstance(batches, list) else batches
        done = loop.batch_progress.current.ready if total == float("inf") or done > total else done
        of_total = f"/{total}" if total != float("inf") else ""
        self._show({"name": f"{name} of step {trainer.global_step}", "batch": f"batch {done}{of_total}"}, None)

    def _show(self, fields: dict[str, str], share: float | None) -> None:
        self._shown_at = time.monotonic()
        if not self._is_enabled:
            return
        if self._terminal.is_terminal:
            columns = min(COLUMNS, shutil.get_terminal_size((COLUMNS, 24)).columns - 1)
            self._terminal.show(progress_line(fields, columns, share))
        else:
            logger.info("%s", progress_line(fields))

    def _fields(self, trainer: Trainer, total: int | None) -> dict[str, str]:
        """Return the parts of a line in their order."""
        step = f"step {trainer.global_step}" + ("" if total is None else f"/{total}")
        fields = {"epoch": f"epoch {self._epoch}", "step": step}
        metrics = trainer.callback_metrics
        for label, names in LOSSES.items():
            value = next((metrics[name] for name in names if name in metrics), None)
            if value is not None:
                fields[label] = f"{label} {float(value):.3g}"
        if trainer.optimizers:
            fields["lr"] = f"lr {trainer.optimizers[0].param_groups[0]['lr']:.3g}"
        if "train/grad_norm" in metrics:
            fields["grad"] = f"grad {float(metrics['train/grad_norm']):.3g}"
        if IMAGES_PER_SECOND in metrics:
            fields["speed"] = f"{_three_digits(float(metrics[IMAGES_PER_SECOND]))} img/s"
        seconds = self._seconds_left(trainer, total)
        if seconds is not None:
            fields["left"] = f"left {duration(seconds)}"
        return fields

    def _seconds_left(self, trainer: Trainer, total: int | None) -> float | None:
        estimates = [_timer_seconds(callback) for callback in trainer.callbacks if isinstance(callback, Timer)]  # type: ignore[attr-defined] # Lightning sets it without a declaration
        if total is not None and trainer.global_step >= total:
            estimates.append(0.0)
        elif self._start is not None and total is not None and trainer.global_step > self._start[1]:
            seconds = (time.monotonic() - self._start[0]) / (trainer.global_step - self._start[1])
            estimates.append(seconds * (total - trainer.global_step))
        known = [seconds for seconds in estimates if seconds is not None]
        return min(known) if known else None


def _timer_seconds(timer: Timer) -> float | None:
    seconds = timer.time_remaining()
    return None if seconds is None else max(0.0, seconds)


def progress_line(fields: Mapping[str, str], columns: int = COLUMNS, share: float | None = None) -> str:
    """Return the fields as one line of at most `columns`, with a bar if there is room.

    Args:
        fields: parts of the line by name, in their order. Those in `LEAST_IMPORTANT` are left out of a long line.
        columns: length of the line.
        share: length of the bar, from 0 to 1; None leaves it out.
    """
    fields = dict(fields)
    for name in LEAST_IMPORTANT:
        if len("  ".join(fields.values())) > columns:
            fields.pop(name, None)
    room = min(columns - len("  ".join(fields.values())) - 2, LARGEST_BAR)
    parts = list(fields.values())
    if share is not None and room >= SMALLEST_BAR:
        filled = int(min(max(share, 0.0), 1.0) * (room - 2))
        parts.insert(list(fields).index("step") + 1, f"[{'#' * filled}{'.' * (room - 2 - filled)}]")
    return "  ".join(parts)[:columns]


def duration(seconds: float) -> str:
    """Return a time such as "1:02:03" or, from two days on, "20 d 3 h"."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours // 24} d {hours % 24} h" if hours >= 48 else f"{hours}:{minutes:02}:{rest:02}"


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


class TerminalLine:
    """Last line of a terminal, which is replaced while it is shown. Log lines appear above it."""

    def __init__(self) -> None:
        self._is_open = False
        self._shown = 0
        self._handlers: list[logging.Handler] = []

    @property
    def is_terminal(self) -> bool:
        """Return whether stderr is a terminal."""
        return sys.stderr.isatty()

    def open(self) -> None:
        """Remove the line before each log line from now on."""
        if self._is_open or not self.is_terminal:
            return
        self._is_open = True
        loggers = (logging.getLogger(name) for name in (None, "pytorch_lightning", "lightning"))
        self._handlers = [handler for source in loggers for handler in source.handlers]
        for handler in self._handlers:
            handler.addFilter(self._clear_before)

    def show(self, text: str) -> None:
        """Replace the line by `text`."""
        padding = " " * max(0, self._shown - len(text))
        sys.stderr.write(f"\r{text}{padding}")
        sys.stderr.flush()
        self._shown = len(text)

    def clear(self) -> None:
        """Remove the line."""
        if self._shown:
            sys.stderr.write(f"\r{' ' * self._shown}\r")
            sys.stderr.flush()
            self._shown = 0

    def close(self) -> None:
        """Leave the line as it is, and continue below it."""
        if self._shown:
            sys.stderr.write("\n")
            self._shown = 0
        for handler in self._handlers:
            handler.removeFilter(self._clear_before)
        self._handlers, self._is_open = [], False

    def _clear_before(self, record: logging.LogRecord) -> bool:
        self.clear()
        return True
