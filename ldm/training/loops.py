"""Lightning's training loops, whose checkpoints continue exactly where they were saved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, Protocol, cast

import torch
from pytorch_lightning import Trainer
from pytorch_lightning.loops.fit_loop import _FitLoop
from pytorch_lightning.loops.loop import _Loop
from pytorch_lightning.loops.training_epoch_loop import _TrainingEpochLoop
from pytorch_lightning.trainer.connectors.logger_connector.result import _ResultCollection

from ldm.training.loader import ResumableLoader
from ldm.training.rng import rng_state, set_rng_state

# Points at which a run is saved: after a batch, whose validation follows; after this validation; after an epoch.
Point = Literal["batch", "validation", "epoch"]
SUMS = ("value", "cumulated_batch_size")  # tensors of a Lightning metric that averages


class Listener(Protocol):
    """Receiver of the points at which a run can be saved."""

    def on_point(self, trainer: Trainer, point: Point) -> None:
        """Save if it is due; an exception ends the run."""


def install_loops(trainer: Trainer, listener: Listener) -> None:
    """Replace the loops of a Trainer by resumable ones, which report to `listener`; their state is kept."""
    fit_loop = trainer.fit_loop
    if not isinstance(fit_loop, FitLoop):
        epoch_loop = EpochLoop(trainer, fit_loop.min_steps, fit_loop.max_steps)
        vars(epoch_loop).update({**vars(fit_loop.epoch_loop), "_results": epoch_loop._results})
        fit_loop = FitLoop(trainer, fit_loop.min_epochs, fit_loop.max_epochs)
        vars(fit_loop).update({**vars(trainer.fit_loop), "epoch_loop": epoch_loop})
        trainer.fit_loop = fit_loop
    cast(EpochLoop, fit_loop.epoch_loop).listener = listener


class Averages(_ResultCollection):
    """Logged values of an epoch, whose averages continue those of a checkpoint."""

    def __init__(self) -> None:
        super().__init__(training=True)
        self._loaded: dict[str, dict[str, Any]] = {}

    def update_metrics(self, key: str, value: Any, batch_size: int) -> None:
        """Add a value to its average, after the values that a checkpoint contains."""
        loaded = self._loaded.pop(key, {})
        vars(self[key]).update({name: loaded[name].to(value.device) for name in SUMS if name in loaded})
        super().update_metrics(key, value, batch_size)

    def metrics(self, on_step: bool) -> Any:
        """Return the values to log, also those that were not updated since the checkpoint."""
        result = super().metrics(on_step)
        for loaded in self._loaded.values():
            value = loaded["step"] if on_step else _average(loaded)
            if value is None:
                continue
            is_both = loaded["on_step"] and loaded["on_epoch"]
            name = f"{loaded['name']}_{'step' if on_step else 'epoch'}" if is_both else loaded["name"]
            result["callback"] |= {loaded["name"]: value, name: value}
            if loaded["logger"]:
                result["log"][name] = value
            if loaded["prog_bar"]:
                result["pbar"][name] = value.item()
        return result

    def sums(self) -> dict[str, dict[str, Any]]:
        """Return the latest values, the sums behind the averages, and what `metrics` needs of their settings."""
        return {**self._loaded, **{key: _sums(metric) for key, metric in self.items() if _is_summed(metric)}}

    def set_sums(self, sums: dict[str, dict[str, Any]]) -> None:
        """Continue from the result of `sums`."""
        for metric in self.values():
            metric.reset()
        self._loaded = dict(sums)

    @property
    def are_loaded(self) -> bool:
        """Return whether values of a checkpoint wait for new ones."""
        return bool(self._loaded)

    def reset(self, metrics: bool | None = None, fx: str | None = None) -> None:
        """Start new averages."""
        if fx is None:
            self._loaded = {}
        super().reset(metrics, fx)


def _is_summed(metric: Any) -> bool:
    return metric.is_tensor and not metric.has_reset


def _sums(metric: Any) -> dict[str, Any]:
    names = ("name", "on_step", "on_epoch", "logger", "prog_bar")
    settings = {name: getattr(metric.meta, name) for name in names}
    sums = {name: getattr(metric, name) for name in SUMS if metric.meta.on_epoch and hasattr(metric, name)}
    return {**settings, **sums, "step": metric._forward_cache if metric.meta.on_step else None}


def _average(loaded: dict[str, Any]) -> torch.Tensor | None:
    if "value" not in loaded:
        return None
    return loaded["value"] / loaded["cumulated_batch_size"] if SUMS[1] in loaded else loaded["value"]


class EpochLoop(_TrainingEpochLoop):
    """Loop over the batches of an epoch.

    Lightning saves within a batch, so that a resumed run leaves out the rest of it: its logged values and its
    validation. This loop is saved between batches, and its checkpoints name the point.
    """

    def __init__(self, trainer: Trainer, min_steps: int | None = None, max_steps: int = -1) -> None:
        super().__init__(trainer, min_steps, max_steps)
        self.listener: Listener | None = None
        self.point: Point | None = None
        self.resumed_at: Point | None = None
        self._results = Averages()
        self._before: dict[str, Any] | None = None
        self.has_discarded = False

    @property
    def averages(self) -> Averages:
        """The logged values of the epoch."""
        return cast(Averages, self._results)

    def on_save_checkpoint(self) -> dict[str, Any]:
        """Return the state, with the point and the averages of the epoch."""
        state = super().on_save_checkpoint()
        return {**state, "point": self.point, "averages": {} if self.point == "epoch" else self.averages.sums()}

    def on_load_checkpoint(self, state_dict: dict[str, Any]) -> None:
        """Load the state; checkpoints that are not from this loop have no point."""
        super().on_load_checkpoint(state_dict)
        self.resumed_at = state_dict.get("point")
        epochs: Any = self.trainer.fit_loop.epoch_progress.current
        if epochs.processed < epochs.started:  # within an epoch
            self.averages.set_sums(state_dict.get("averages", {}))

    def reset(self) -> None:
        """Start an epoch, or continue the one of a checkpoint."""
        super().reset()
        if self.resumed_at is not None:
            self.val_loop.restarting = False
            self.val_loop.reset_restart_stage()
        if self.averages.are_loaded:
            # Lightning would start new averages in the first batch that a process trains.
            self.trainer._logger_connector._first_loop_iter = False
        if self.resumed_at == "validation":
            self._restarting, self.resumed_at = False, None

    def advance(self, data_fetcher: Any) -> None:
        """Train one batch; a run that was saved before a validation continues with what follows the batch."""
        point, self.resumed_at = self.resumed_at, None
        if point == "batch":
            return
        self._before = {
            "random": rng_state(),
            "averages": self.averages.sums(),
            "step": self.global_step,
            "positions": [loader.position for loader in self.loaders()],
        }
        try:
            super().advance(data_fetcher)
        except StopIteration:
            self._before = None
            raise
        self._before = None

    def on_advance_end(self, data_fetcher: Any) -> None:
        """Report the end of the batch, validate if it is due, and report again."""
        self._report("batch")
        super().on_advance_end(data_fetcher)
        self._report("validation")

    def _report(self, point: Point) -> None:
        if self.listener is not None:
            with self.at(point):
                self.listener.on_point(self.trainer, point)

    def loaders(self) -> list[ResumableLoader]:
        """Return the loaders that resume within an epoch."""
        loader = self.trainer.fit_loop._combined_loader
        return [part for part in (() if loader is None else loader.flattened) if isinstance(part, ResumableLoader)]

    @contextmanager
    def at(self, point: Point | None) -> Iterator[None]:
        """Let checkpoints of this block state a point."""
        previous, self.point = self.point, point
        try:
            yield
        finally:
            self.point = previous

    def discard_batch(self) -> Point | None:
        """Undo a batch that has failed before its step, and return the point at which the loop is then.

        Its item numbers, random numbers and logged values are those before it. A batch that has taken its step counts
        as complete. The gradients stay.
        """
        before, self._before = self._before, None
        if before is None:
            return None
        progress: Any = self.batch_progress
        if self.global_step != before["step"]:
            for tracker in (progress.total, progress.current):
                tracker.started = tracker.processed = tracker.completed = tracker.ready
            return "batch"
        for tracker in (progress.total, progress.current):
            tracker.ready = tracker.started = tracker.processed = tracker.completed
        for loader, position in zip(self.loaders(), before["positions"], strict=True):
            if loader.position > position:
                loader.unread()
        self.has_discarded = True
        set_rng_state(before["random"])
        self.averages.set_sums(before["averages"])
        return "validation"


class FitLoop(_FitLoop):
    """Loop over epochs, see `EpochLoop`."""

    def reset(self) -> None:
        """Start to train, with a new epoch if the checkpoint was saved after one."""
        if self._at_epoch_end():
            _Loop.restarting.fset(self, False)  # type: ignore[attr-defined] # Lightning restarts the finished epoch
            self.epoch_loop.resumed_at = None  # type: ignore[attr-defined] # it is an `EpochLoop`
        super().reset()

    def _at_epoch_end(self) -> bool:
        return cast(EpochLoop, self.epoch_loop).resumed_at == "epoch"

    def _load_combined_loader_states(self) -> None:
        """Load the state of the loader, also after the end of an epoch."""
        if self._combined_loader_states_to_load and self._combined_loader is not None:
            self._combined_loader._load_state_dicts(self._combined_loader_states_to_load)
            self._combined_loader_states_to_load = []

    def on_advance_end(self) -> None:
        """End the epoch, and report it unless the run ends within it."""
        is_complete = self.epoch_loop._num_ready_batches_reached()
        super().on_advance_end()
        if is_complete:
            epoch_loop = cast(EpochLoop, self.epoch_loop)
            for loader in epoch_loop.loaders():
                loader.end_epoch()
            epoch_loop._report("epoch")
