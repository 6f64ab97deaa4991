"""Optimizer steps with finite values only: others are skipped or end the run, and their batches are named."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from ldm.errors import UserError
from ldm.io.batch_items import describe_items, finite_items, item_names
from ldm.training.options import NON_FINITE_POLICIES

if TYPE_CHECKING:
    from ldm.training.modules import ModelTraining

logger = logging.getLogger(__name__)

# Number of skipped steps in a row after which a run ends.
MAX_SKIPPED = 10
SKIP, STOP = NON_FINITE_POLICIES


class DivergenceError(UserError):
    """Training cannot go on because its weights or losses are not finite. Its last state is not worth a checkpoint."""


class DamagedBatchError(UserError):
    """Training data holds values that are not finite. The weights are those before the batch."""


class NonFiniteStepError(DamagedBatchError):
    """Loss or gradients of a step are not finite, and the run ends then. The weights are those before the step."""


@dataclass(frozen=True)
class BatchRecord:
    """Batch that a message can name, without the tensors of the batch.

    Attributes:
        index, epoch: position of the batch.
        names: names of the files of its items; empty if it does not hold them.
        finite: flags (B,) for each entry, see `finite_items`.
    """

    index: int
    epoch: int
    names: list[str]
    finite: dict[str, Tensor]

    @classmethod
    def of(cls, batch: Any, index: int, epoch: int) -> BatchRecord:
        """Return the record of a batch."""
        return cls(index, epoch, item_names(batch), finite_items(batch))

    def __str__(self) -> str:
        files = f" ({describe_items(self.names, range(len(self.names)))})" if self.names else ""
        return f"batch {self.index} of epoch {self.epoch}{files}"

    def damage(self) -> str | None:
        """Return text that names the items with values that are not finite, or None if there are none."""
        for key, flags in self.finite.items():
            positions = [position for position, is_finite in enumerate(flags.tolist()) if not is_finite]
            if positions:
                items = describe_items(self.names, positions)
                return f'"{key}" of {items} in batch {self.index} of epoch {self.epoch}'
        return None


class StepGuard:
    """Guard that skips optimizer steps whose loss or gradients are not finite, and ends a run that cannot go on.

    A skipped step leaves weights, optimizer state and running statistics as they are. All processes skip the same
    steps. With a gradient scaler, overflowing gradients of a finite loss are usual: the scaler handles them.

    An adapter calls `begin` before and `record` after each forward pass, `check` and `drop_gradients` before each
    optimizer step, and `end_batch` at the end of each batch.

    Args:
        module: the adapter.

    Attributes:
        policy: `SKIP` skips every step that is not finite, also for damaged data. `STOP` ends the run at the first one.
            None skips steps, and ends the run for damaged data.
        gradient_norms: norm of the gradients of the latest step, before clipping, by the number of the optimizer.
    """

    def __init__(self, module: ModelTraining) -> None:
        self.module = module
        self.policy: str | None = None
        self.gradient_norms: dict[int, Tensor] = {}
        self._batches: list[BatchRecord] = []
        self._losses: dict[int, list[Tensor]] = {}
        self._statistics: list[tuple[Tensor, Tensor]] = []
        self._norms: list[_NormBase] | None = None
        self._drops = self._is_step = self._bad_losses = self._bad_gradients = False
        self._skipped_in_a_row = 0

    def begin(self, batch: Any, batch_idx: int) -> None:
        """Record a batch, and the running statistics before it."""
        self._statistics = [(value, value.clone()) for value in self._running_statistics()]
        self._batches.append(BatchRecord.of(batch, batch_idx, self.module.current_epoch))

    def record(self, loss: Tensor, optimizer: int = 0) -> None:
        """Record the loss of the current batch for an optimizer."""
        self._losses.setdefault(optimizer, []).append(loss.detach().isfinite().all())

    def check(self, optimizer: Any, index: int = 0) -> bool:
        """Return whether losses and gradients of the next step are finite, in all processes.

        Args:
            optimizer: the optimizer that is about to step.
            index: its number, as in `record`.
        """
        losses = torch.stack(self._losses[index]).all()
        norms = _gradient_norms(optimizer, losses.device)
        self.gradient_norms[index] = torch.linalg.vector_norm(norms)
        bad = (~torch.stack([losses, norms.isfinite().all()])).float()
        if self.module.trainer.world_size > 1:
            torch.distributed.all_reduce(bad)
        bad_losses, bad_gradients = (count > 0 for count in bad.tolist())  # waits for the device, once for each step
        self._is_step = True
        self._bad_losses |= bad_losses
        self._bad_gradients |= bad_gradients
        self._drops = bad_losses or bad_gradients
        return not self._drops

    def drop_gradients(self, optimizer: Optimizer) -> None:
        """Remove the gradients after a failed check, so that the step changes nothing and is still counted."""
        if self._drops:
            optimizer.zero_grad(set_to_none=True)
            self._drops = False

    def end_batch(self) -> None:
        """Restore running statistics that are not finite, and report a skipped step after its last batch.

        Raises:
            DamagedBatchError: a batch of the step holds values that are not finite, or the policy is to stop.
            DivergenceError: the weights are not finite, or too many steps in a row were skipped.
        """
        for value, saved in self._statistics:
            value.copy_(torch.where(value.isfinite().all(), value, saved))
        self._statistics = []
        if not self._is_step:
            return
        try:
            if not (self._bad_losses or self._bad_gradients):
                self._skipped_in_a_row = 0
            elif not self._is_usual_overflow():
                self._report()
        finally:
            self._batches, self._losses = [], {}
            self._is_step = self._bad_losses = self._bad_gradients = False

    def _is_usual_overflow(self) -> bool:
        """Return whether only gradients overflowed in float16, for which the scaler lowers its scale."""
        scaler = getattr(self.module.trainer.precision_plugin, "scaler", None)
        return scaler is not None and not self._bad_losses and scaler.get_scale() >= 1.0

    def _report(self) -> None:
        damages, causes = zip(*self._from_all_processes((self._damage(), self._cause())), strict=True)
        damage = next(filter(None, damages), None)
        if damage is not None and self.policy != SKIP:
            raise DamagedBatchError(f"training data is not finite: {damage}; repair or remove it")
        weight = _first_non_finite(self.module.model)
        if weight is not None:
            raise DivergenceError(f'the weights "{weight}" are not finite; start from another checkpoint')
        self._skipped_in_a_row += 1
        values = "loss is" if self._bad_losses else "gradients are"
        step = self.module.trainer.global_step
        if self._skipped_in_a_row >= MAX_SKIPPED:
            raise DivergenceError(
                f"the {values} not finite in {MAX_SKIPPED} steps in a row, up to step {step}; "
                "lower base_learning_rate, set gradient_clip_val or use another precision"
            )
        cause = damage or next(filter(None, causes), self._batches[-1])
        if self.policy == STOP:
            raise NonFiniteStepError(
                f"the {values} not finite in step {step}: {cause}; the weights are those before the step; "
                "lower base_learning_rate, set gradient_clip_val, or continue with lightning.non_finite=skip"
            )
        if self.module.trainer.is_global_zero:
            logger.warning("step %d is skipped, because its %s not finite: %s", step, values, cause)

    def _damage(self) -> str | None:
        return next((text for batch in self._batches if (text := batch.damage())), None)

    def _cause(self) -> str | None:
        """Return text that names the first batch of the step whose loss is not finite, or None."""
        for batch, *flags in zip(self._batches, *self._losses.values(), strict=True):
            if not torch.stack(flags).all():
                return str(batch)
        return None

    def _from_all_processes(self, value: Any) -> list[Any]:
        processes = self.module.trainer.world_size
        values = [value] * processes
        if processes > 1:
            torch.distributed.all_gather_object(values, value)
        return values

    def _running_statistics(self) -> list[Tensor]:
        """Return the running statistics that forward passes change: those of normalization layers in training mode."""
        if self._norms is None:
            self._norms = [layer for layer in self.module.modules() if isinstance(layer, _NormBase)]
        layers = [layer for layer in self._norms if layer.training]
        buffers = [buffer for layer in layers for buffer in (layer.running_mean, layer.running_var)]
        return [buffer for buffer in buffers if buffer is not None]


class ValidationRecord:
    """Record of the losses of a validation, which names the batches whose losses are not finite at its end."""

    def __init__(self) -> None:
        self._losses: list[tuple[BatchRecord, list[str], Tensor]] = []

    def record(self, log: Mapping[str, Any], batch: Any, batch_idx: int, epoch: int) -> None:
        """Record the logged values of a batch."""
        values = {key: value for key, value in log.items() if isinstance(value, Tensor)}
        if values:
            finite = torch.stack([value.detach().isfinite().all() for value in values.values()])
            self._losses.append((BatchRecord.of(batch, batch_idx, epoch), list(values), finite))

    def report(self) -> None:
        """Log one line if losses are not finite, and start again."""
        bad = [(batch, keys, flags) for batch, keys, flags in self._losses if not flags.all()]
        self._losses = []
        if bad:
            batch, keys, flags = bad[0]
            name = next(key for key, is_finite in zip(keys, flags.tolist(), strict=True) if not is_finite)
            damage = batch.damage()
            reason = f"; the data is not finite: {damage}" if damage else ""
            others = len({other.index for other, _, _ in bad}) - 1
            more = f" and {others} more" if others else ""
            logger.warning('validation: "%s" is not finite for %s%s%s', name, batch, more, reason)


def _first_non_finite(model: nn.Module) -> str | None:
    """Return the name of the first parameter with a value that is not finite, or None.

    Losses are left out: their perceptual networks contain NaN until they load their weights.
    """
    weights = ((name, value) for name, value in model.named_parameters() if "loss." not in name)
    return next((name for name, value in weights if not value.isfinite().all()), None)


def _gradient_norms(optimizer: Any, device: torch.device) -> Tensor:
    """Return the norms of the gradients of all parameters, on `device`.

    They are finite if the gradients and their squares are, which Adam averages.
    """
    gradients = list(_gradients(optimizer.param_groups))
    if not gradients:
        return torch.zeros(1, device=device)
    norms: list[Tensor] = list(torch._foreach_norm(gradients, 2, torch.float32))
    return torch.stack(norms).to(device)


def _gradients(groups: Iterable[Mapping[str, Any]]) -> Iterable[Tensor]:
    return (parameter.grad for group in groups for parameter in group["params"] if parameter.grad is not None)
