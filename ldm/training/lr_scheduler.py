"""Learning-rate schedules for `torch.optim.lr_scheduler.LambdaLR`.

A schedule maps the number of completed steps to a factor of the base learning rate. If `verbosity_interval` is
positive, it logs the factor once per that many steps.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

logger = logging.getLogger(__name__)


def _half_cosine(progress: float) -> float:
    """Decay from 1 at progress 0 to 0 at progress 1."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


class LambdaWarmUpCosineScheduler:
    """Linear warm-up from `lr_start` to `lr_max`, then cosine decay to `lr_min` at `max_decay_steps`.

    With a base learning rate of 1, the factors are the learning rates themselves.
    """

    def __init__(
        self,
        warm_up_steps: int,
        lr_min: float,
        lr_max: float,
        lr_start: float,
        max_decay_steps: int,
        verbosity_interval: int = 0,
    ) -> None:
        self.lr_warm_up_steps = warm_up_steps
        self.lr_min = lr_min
        self.lr_max = lr_max
        self.lr_start = lr_start
        self.lr_max_decay_steps = max_decay_steps
        self.verbosity_interval = verbosity_interval
        self.last_lr = 0.0

    def schedule(self, n: int) -> float:
        """Return the factor after `n` steps."""
        if n < self.lr_warm_up_steps:
            self.last_lr = self.lr_start + (self.lr_max - self.lr_start) * n / self.lr_warm_up_steps
        else:
            decay_steps = max(1, self.lr_max_decay_steps - self.lr_warm_up_steps)
            progress = min((n - self.lr_warm_up_steps) / decay_steps, 1.0)
            self.last_lr = self.lr_min + (self.lr_max - self.lr_min) * _half_cosine(progress)
        if self.verbosity_interval > 0 and n % self.verbosity_interval == 0:
            logger.info("step %d: learning-rate factor %g", n, self.last_lr)
        return self.last_lr

    def __call__(self, n: int) -> float:
        return self.schedule(n)


class LambdaWarmUpCosineScheduler2:
    """Cycles of a linear warm-up from `f_start` to `f_max` in `warm_up_steps` and a cosine decay to `f_min`.

    All arguments except `verbosity_interval` are lists with one entry per cycle.
    """

    def __init__(
        self,
        warm_up_steps: Sequence[int],
        f_min: Sequence[float],
        f_max: Sequence[float],
        f_start: Sequence[float],
        cycle_lengths: Sequence[int],
        verbosity_interval: int = 0,
    ) -> None:
        if len({len(values) for values in (warm_up_steps, f_min, f_max, f_start, cycle_lengths)}) != 1:
            raise ValueError("warm_up_steps, f_min, f_max, f_start and cycle_lengths need one entry for each cycle")
        self.lr_warm_up_steps = warm_up_steps
        self.f_min = f_min
        self.f_max = f_max
        self.f_start = f_start
        self.cycle_lengths = cycle_lengths
        self.cum_cycles = [sum(cycle_lengths[:count]) for count in range(len(cycle_lengths) + 1)]
        self.verbosity_interval = verbosity_interval
        self.last_f = 0.0

    def find_in_interval(self, n: int) -> int:
        """Return the cycle of step `n`; a cycle includes its last step, and the last cycle does not end."""
        cycles = len(self.cycle_lengths)
        return next((cycle for cycle in range(cycles) if n <= self.cum_cycles[cycle + 1]), cycles - 1)

    def _decay(self, cycle: int, n: int) -> float:
        warm_up, length = self.lr_warm_up_steps[cycle], self.cycle_lengths[cycle]
        progress = min((n - warm_up) / max(1, length - warm_up), 1.0)
        return self.f_min[cycle] + (self.f_max[cycle] - self.f_min[cycle]) * _half_cosine(progress)

    def schedule(self, n: int) -> float:
        """Return the factor after `n` steps."""
        cycle = self.find_in_interval(n)
        step = n - self.cum_cycles[cycle]
        if step < self.lr_warm_up_steps[cycle]:
            start = self.f_start[cycle]
            self.last_f = start + (self.f_max[cycle] - start) * step / self.lr_warm_up_steps[cycle]
        else:
            self.last_f = self._decay(cycle, step)
        if self.verbosity_interval > 0 and n % self.verbosity_interval == 0:
            logger.info("step %d, cycle %d: learning-rate factor %g", n, cycle, self.last_f)
        return self.last_f

    def __call__(self, n: int) -> float:
        return self.schedule(n)


class LambdaLinearScheduler(LambdaWarmUpCosineScheduler2):
    """Variant of `LambdaWarmUpCosineScheduler2` with a linear decay from `f_max` to `f_min`."""

    def _decay(self, cycle: int, n: int) -> float:
        length = self.cycle_lengths[cycle]
        return self.f_min[cycle] + (self.f_max[cycle] - self.f_min[cycle]) * max(length - n, 0) / length
