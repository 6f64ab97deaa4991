"""Examination of a model: its checks, a trial that overfits one batch, and a sheet of samples."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.diagnosis.checks import CHECKS, Report, reconstruct
from ldm.diagnosis.subject import Subject
from ldm.io.grids import make_grid, make_sheet
from ldm.models.autoencoder import Autoencoder
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.frozen import freeze

LEARNING_RATE = 2e-4
# Share of its start above which the loss of a repeated batch has not fallen.
NOT_FALLEN = 0.99
# Standard deviation of samples below which all of their pixels are alike.
CONSTANT = 0.01


@dataclass(frozen=True)
class Diagnosis:
    """Result of an examination.

    Attributes:
        findings: what is wrong, one line each.
        values: measured values by name.
        sheet: inputs, reconstructions and samples, (H, W, 3) uint8.
    """

    findings: tuple[str, ...]
    values: dict[str, str]
    sheet: np.ndarray


def examine(subject: Subject, overfitting_steps: int = 30, ddim_steps: int = 20, seed: int = 0) -> Diagnosis:
    """Examine a model.

    Args:
        subject: the model with its data.
        overfitting_steps: training steps on one batch; 0 leaves them out.
        ddim_steps: steps of sampling.
        seed: seed of all random numbers.
    """
    report = Report()
    findings: list[str] = []
    for check in CHECKS:
        torch.manual_seed(seed)
        findings += check(subject, report)
    torch.manual_seed(seed)
    rows = _rows(subject, ddim_steps)
    findings += _sample_findings(rows)
    if overfitting_steps:
        findings += _overfit(subject, report, overfitting_steps, seed)
    # Columns: inputs, reconstructions, samples.
    grids = [make_grid(row.float().cpu().clamp(-1, 1), nrow=2) for row in rows.values()]
    report.lines["sheet"] = " | ".join(rows)
    return Diagnosis(tuple(findings), report.lines, make_sheet([grids], columns=1))


@torch.no_grad()
def _rows(subject: Subject, ddim_steps: int) -> dict[str, Tensor]:
    """Return the images of the sheet: inputs, reconstructions and samples of the first batch."""
    model, x = subject.model, subject.images[0]
    rows = {"inputs": _as_rgb(model, x)}
    if subject.first_stage is not None:
        rows["reconstructions"] = _as_rgb(model, reconstruct(subject.first_stage, x))
    if isinstance(model, Autoencoder):
        return rows
    if isinstance(model, LatentDiffusion):
        steps = min(ddim_steps, model.num_timesteps)
        _, c = model.get_input(subject.batches[0], model.first_stage_key, force_c_encode=True)
        with model.ema_scope():
            latents, _ = model.sample_log(c, len(x), True, steps, eta=0.0, verbose=False)
        rows["samples"] = _as_rgb(model, model.decode_first_stage(latents))
    else:
        with model.ema_scope():
            rows["samples"] = model.sample(batch_size=len(x), verbose=False)
    return rows


def _as_rgb(model: Any, x: Tensor) -> Tensor:
    return model.to_rgb(x) if x.shape[1] not in (1, 3) else x


def _sample_findings(rows: dict[str, Tensor]) -> Iterator[str]:
    samples = rows.get("samples")
    if samples is None:
        return
    if not samples.isfinite().all():
        yield (
            "samples have values that are not finite; use an earlier checkpoint, and train on with a lower "
            "base_learning_rate or --gradient_clip_val 1"
        )
        rows["samples"] = samples.nan_to_num()
    elif float(samples.std()) < CONSTANT:
        yield "samples are images of a single colour; check the first stage and scale_factor, or train longer"


def _overfit(subject: Subject, report: Report, steps: int, seed: int) -> Iterator[str]:
    """Train a copy of the model on one batch with fixed random numbers; its loss must fall."""
    model = _trainable_copy(subject.model)
    batch = subject.batches[0]
    parameters = [p for p in _parameters(model) if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        torch.manual_seed(seed)
        loss = _loss(model, batch)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    first, best = losses[0], min(losses[1:], default=losses[0])
    report.lines["overfitting"] = f"loss of one batch {first:.4g} → {best:.4g} in {steps} steps"
    if not np.isfinite(losses).all():
        yield "the loss of one batch is not finite; check the weights and the data, and lower base_learning_rate"
    elif steps > 1 and best > NOT_FALLEN * first:
        yield (
            f"the loss of one batch does not fall ({first:.4g} → {best:.4g} in {steps} steps): no gradient reaches the "
            "weights; check which parameters are trained"
        )


def _trainable_copy(model: Any) -> Any:
    """Return a copy whose trained part is trained without dropout of the conditioning."""
    copied = copy.deepcopy(model)
    if isinstance(copied, Autoencoder):
        return copied.train()
    copied.cond_dropout = 0.0
    for name in ("first_stage_model", "cond_stage_model"):
        stage = getattr(copied, name, None)
        if stage is not None and not (name == "cond_stage_model" and copied.cond_stage_trainable):
            freeze(stage)
    return copied.train()


def _parameters(model: Any) -> list[torch.nn.Parameter]:
    found = model.optimizer_parameters()
    return found[0] if isinstance(found, tuple) else found


def _loss(model: Any, batch: dict[str, Any]) -> Tensor:
    """Return the loss of a diffusion model, or the mean error of the reconstructions of a first stage."""
    if not isinstance(model, Autoencoder):
        return model.shared_step(batch)[0]
    stage: Any = model  # `reconstruct` belongs to the classes derived from `Autoencoder`
    rec = stage.reconstruct({key: _on(value, model.device) for key, value in batch.items()})
    return (rec.inputs - rec.outputs).abs().mean()


def _on(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
