"""Mean and deviation of the latents at the start of a run, and the scale that follows from them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.models.autoencoder import IdentityFirstStage
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.training.batch_check import reads_batches_itself
from ldm.training.rng import preserved_rng

logger = logging.getLogger(__name__)

# Standard deviations of scaled latents outside this range are reported: the noise schedule expects about 1.
USUAL_DEVIATION = (0.5, 2.0)


class LatentStatistics:
    """Mean and standard deviation of latents, summed over batches and processes in float64.

    Args:
        sums: number, sum and sum of squares of the values of each channel, (3, c).
    """

    def __init__(self, sums: Tensor) -> None:
        self._sums = sums

    @classmethod
    def of(cls, batches: Iterable[Tensor], trainer: Any) -> LatentStatistics:
        """Return the statistics of batches of latents (B, c, h, w), over all processes of a run."""
        parts = [z.detach().cpu().double().transpose(0, 1).flatten(1) for z in batches]
        sums = torch.stack(
            [torch.stack([torch.full_like(z[:, 0], z.shape[1]), z.sum(dim=1), z.square().sum(dim=1)]) for z in parts]
        ).sum(dim=0)
        if trainer.world_size > 1:  # NCCL adds tensors of GPUs only
            sums = trainer.strategy.reduce(sums.to(trainer.strategy.root_device), reduce_op="sum").cpu()
        return cls(sums)

    @property
    def means(self) -> list[float]:
        """Mean of each channel."""
        return (self._sums[1] / self._sums[0]).tolist()

    @property
    def deviations(self) -> list[float]:
        """Standard deviation of each channel."""
        return [_deviation(channel) for channel in self._sums.unbind(dim=1)]

    @property
    def deviation(self) -> float:
        """Standard deviation of all values together."""
        return _deviation(self._sums.sum(dim=1))

    def scaled(self, factor: float) -> LatentStatistics:
        """Return the statistics of the latents times `factor`."""
        return LatentStatistics(self._sums * torch.tensor([[1.0], [factor], [factor**2]], dtype=torch.float64))


def _deviation(sums: Tensor) -> float:
    count, total, squares = sums.tolist()
    variance = (squares - total * total / count) / max(1.0, count - 1)
    return max(0.0, variance) ** 0.5


@torch.no_grad()
def check_latents(model: Any, batch: Mapping[str, Any], trainer: Any) -> None:
    """Log the statistics of the scaled latents on the first batch of a run, and warn if their deviation is unusual.

    With `scale_by_std`, the scale is measured in the first batches of all processes. The random numbers of training
    stay unchanged.

    Args:
        model: the model; only a `LatentDiffusion` is checked. It has measured the scale in its own first batch.
        batch: the first batch.
        trainer: the Trainer.

    Raises:
        UserError: the latents of the first batches are constant or not finite.
    """
    if not isinstance(model, LatentDiffusion) or reads_batches_itself(model):
        return
    measures = model.scale_by_std and not model.restarted_from_ckpt
    several = model.scale_batches if measures else 1
    if isinstance(model.first_stage_model, IdentityFirstStage) and several == trainer.world_size == 1:
        return
    together = measures and (several > 1 or trainer.world_size > 1)
    if together:  # each process has measured another scale in its own first batch
        cast(Tensor, model.scale_factor).fill_(1.0)
    with preserved_rng():
        batches = _first_batches(batch, several, trainer)
        statistics = LatentStatistics.of((model.get_x_start(each) for each in batches), trainer)
    if together:
        deviation = statistics.deviation
        if not 0.0 < deviation < float("inf"):
            raise UserError(
                "scale_by_std: the latents of the first batches are constant or not finite; check the images and "
                "model.params.first_stage_config"
            )
        cast(Tensor, model.scale_factor).fill_(1.0 / deviation)
        statistics = statistics.scaled(1.0 / deviation)
    if trainer.is_global_zero and not isinstance(model.first_stage_model, IdentityFirstStage):
        _report(model, statistics, several, trainer)


def _first_batches(batch: Mapping[str, Any], count: int, trainer: Any) -> Iterable[Mapping[str, Any]]:
    """Return the first `count` batches of this process; more than one are read by a loader of their own."""
    data = trainer.datamodule
    return [batch] if count == 1 or data is None else islice(data.train_dataloader(), count)


def _report(model: LatentDiffusion, statistics: LatentStatistics, batches: int, trainer: Any) -> None:
    scale, deviation = float(model.scale_factor), statistics.deviation
    of_batches = "the first batch" if batches == 1 else f"the first {batches} batches"
    logger.info(
        "latents of %s, times %.4g: standard deviation %.3g; mean of each channel %s; deviation of each channel %s",
        *(of_batches, scale, deviation, _listed(statistics.means), _listed(statistics.deviations)),
    )
    values = {f"latents/mean_{channel}": value for channel, value in enumerate(statistics.means)}
    values |= {f"latents/std_{channel}": value for channel, value in enumerate(statistics.deviations)}
    for run_logger in trainer.loggers:
        run_logger.log_metrics({**values, "latents/std": deviation, "latents/scale_factor": scale}, step=0)
    low, high = USUAL_DEVIATION
    if not low <= deviation <= high:
        advice = "check that model.params.first_stage_config loads its weights"
        if not model.restarted_from_ckpt and deviation > 0:
            advice += f", and set model.params.scale_factor to {scale / deviation:.3g} or scale_by_std to true"
        logger.warning("the scaled latents have a standard deviation of %.3g, far from 1; %s", deviation, advice)


def _listed(values: list[float]) -> str:
    return ", ".join(f"{value:.3g}" for value in values)
