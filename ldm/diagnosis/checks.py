"""Checks of a model. Each yields findings: one line that says what is wrong, with the remedy."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ldm.diagnosis.subject import Subject
from ldm.models.autoencoder import Autoencoder, VQModel
from ldm.models.diffusion.conditioning import map_tensors
from ldm.models.diffusion.ddpm import DDPM, LatentDiffusion
from ldm.modules.ema import LitEma
from ldm.modules.losses.vqperceptual import measure_perplexity
from ldm.training.codebook import COLLAPSED_SHARE
from ldm.training.latent_scale import USUAL_DEVIATION, LatentStatistics

# Share of the variance of images that a useful first stage reconstructs.
EXPLAINED = 0.5
# Share of items without their conditioning above which a model hardly learns it.
LARGEST_DROPOUT = 0.5
# Relative change of the prediction with another conditioning below which the conditioning is ignored.
SMALLEST_EFFECT = 1e-3
# Loss with the averaged weights, relative to that with the live ones, above which the averages lag behind.
LARGEST_LAG = 2.0
# Steps before which a model cannot have learnt its conditioning; 0 is a checkpoint that states no step.
YOUNG = range(1, 50)


class Report:
    """Values that the checks measure, by name, for the summary."""

    def __init__(self) -> None:
        self.lines: dict[str, str] = {}
        self.reconstructs = True  # later checks need latents of a working first stage
        self.has_collapsed = False  # a collapsed codebook reconstructs nothing


Check = Callable[[Subject, Report], Iterator[str]]


def check_missing(subject: Subject, report: Report) -> Iterator[str]:
    """Find weights that the checkpoint lacks."""
    if subject.missing:
        total = sum(1 for _ in subject.model.parameters())
        yield (
            f"the checkpoint lacks {len(subject.missing)} of the {total} weights of the model, "
            f'first "{subject.missing[0]}", which have random values; '
            "use the configuration that the checkpoint was trained with, or a complete checkpoint"
        )


def check_range(subject: Subject, report: Report) -> Iterator[str]:
    """Find images that do not lie in [-1, 1]."""
    images = subject.images
    if images[0].shape[1] not in (1, 3):
        return
    low, high = (min(float(x.min()) for x in images), max(float(x.max()) for x in images))
    report.lines["images"] = f"{sum(map(len, images))} in [{low:.3g}, {high:.3g}]"
    if 0.0 <= low < high <= 1.0 + 1e-3:
        yield (
            f"the images of the data lie in [{low:.3g}, {high:.3g}] and the model expects [-1, 1]; "
            "return 2 * image - 1 from the data set, and train again"
        )
    elif low < -1.5 or high > 1.5:
        yield (
            f"the images of the data lie in [{low:.3g}, {high:.3g}] and the model expects [-1, 1]; "
            "correct the normalization of the data set, and train again"
        )


@torch.no_grad()
def check_first_stage(subject: Subject, report: Report) -> Iterator[str]:
    """Find a first stage that has not been loaded, or that does not reconstruct images."""
    stage = subject.first_stage
    if stage is None:
        return
    outputs = [reconstruct(stage, x) for x in subject.images]
    explained, psnr = _explained(subject.images, outputs)
    report.lines["reconstruction"] = f"PSNR {psnr:.1f} dB, {100 * max(0.0, explained):.0f} % of the variance"
    is_model = stage is subject.model
    if is_initial(stage):
        report.reconstructs = False
        remedy = (
            "train it with -t"
            if is_model
            else "set model.params.first_stage_config.params.ckpt_path to a trained first stage, and train again"
        )
        yield f"the first stage has its initial random weights (PSNR {psnr:.1f} dB); {remedy}"
    elif not explained > EXPLAINED and not report.has_collapsed:
        report.reconstructs = False
        remedy = (
            "train longer, and check the learning rate and the range of the images"
            if is_model
            else "check that first_stage_config.params.ckpt_path names the first stage of these images"
        )
        yield (
            f"the first stage reconstructs {100 * max(0.0, explained):.0f} % of the variance of the images "
            f"(PSNR {psnr:.1f} dB), as untrained weights do; {remedy}"
        )


def reconstruct(stage: Autoencoder, x: Tensor) -> Tensor:
    """Return the reconstructions of images, of a Gaussian latent from its mean."""
    return stage(x)[0] if isinstance(stage, VQModel) else stage(x, sample_posterior=False)[0]


def is_initial(module: nn.Module) -> bool:
    """Return whether all normalization layers of a module have their initial weights."""
    norms = [each for each in module.modules() if isinstance(each, nn.GroupNorm) and each.affine]
    return bool(norms) and all(bool((norm.weight == 1).all()) and bool((norm.bias == 0).all()) for norm in norms)


def _explained(images: list[Tensor], outputs: list[Tensor]) -> tuple[float, float]:
    """Return the share of the variance of images that reconstructions explain, and their PSNR."""
    x, y = torch.cat(images).double(), torch.cat(outputs).double()
    error = float((x - y).square().mean())
    variance = float((x - x.mean(dim=(2, 3), keepdim=True)).square().mean())
    return 1 - error / max(variance, 1e-12), float(10 * torch.log10(torch.tensor(4.0 / max(error, 1e-12))))


@torch.no_grad()
def check_scale(subject: Subject, report: Report) -> Iterator[str]:
    """Find a scale of the latents that does not fit the noise schedule."""
    model = subject.model
    if not isinstance(model, LatentDiffusion) or subject.first_stage is None:
        return
    latents = [model.get_first_stage_encoding(model.encode_first_stage(x)).float() for x in subject.images]
    found = LatentStatistics.of(latents, SimpleNamespace(world_size=1))
    channels = ", ".join(f"{value:.2f}" for value in found.deviations)
    report.lines["latents"] = f"standard deviation {found.deviation:.3g}, of each channel {channels}"
    low, high = USUAL_DEVIATION
    if report.reconstructs and not low <= found.deviation <= high:
        factor = float(model.scale_factor)
        yield (
            f"the latents times scale_factor {factor:.4g} have the standard deviation {found.deviation:.3g}, and the "
            f"noise schedule expects about 1; set scale_factor: {factor / max(found.deviation, 1e-12):.4g} or "
            "scale_by_std: true, and train again"
        )


@torch.no_grad()
def check_codebook(subject: Subject, report: Report) -> Iterator[str]:
    """Find a codebook of which hardly any entry is used."""
    stage = subject.first_stage
    if not isinstance(stage, VQModel):
        return
    encode = stage.encode_to_prequant
    codes = torch.cat([stage.quantize(encode(x))[2][2].flatten() for x in subject.images])
    size = int(stage.quantize.re_embed)
    perplexity, used = (float(value) for value in measure_perplexity(codes, size))
    report.lines["codebook"] = f"{used:.0f} of {size} entries used, perplexity {perplexity:.1f}"
    reachable = min(size, len(codes))
    if used <= 1 < size or used < COLLAPSED_SHARE * reachable:
        report.has_collapsed = True
        yield (
            f"the codebook has collapsed: {used:.0f} of its {size} entries are used for {len(codes):,} vectors; "
            "train the first stage again with a lower base_learning_rate, a smaller n_embed, or another --seed"
        )


def check_discriminator(subject: Subject, report: Report) -> Iterator[str]:
    """Find a discriminator that has not been trained, or that no image changes."""
    stage, loss = subject.model, getattr(subject.model, "loss", None)
    network = getattr(loss, "discriminator", None)
    if not isinstance(stage, Autoencoder) or network is None or not _has(subject, "loss.discriminator."):
        return
    start = int(getattr(loss, "discriminator_iter_start", 0))
    if subject.step <= start:
        report.lines["discriminator"] = f"starts at step {start}, after this checkpoint"
        return
    with torch.no_grad():
        fakes = torch.cat([reconstruct(stage, x) for x in subject.images])
    reals = torch.cat(subject.images)
    images = torch.cat([reals, fakes, torch.randn_like(reals).clamp(-1, 1)]).requires_grad_()
    logits = copy.deepcopy(network).train().requires_grad_(False)(images)
    (gradient,) = torch.autograd.grad(logits.sum(), images)
    logits = logits.detach()
    spread = float(logits.std())
    real, fake = float(logits[: len(reals)].mean()), float(logits[len(reals) : 2 * len(reals)].mean())
    report.lines["discriminator"] = f"logits {real:.3g} for images, {fake:.3g} for reconstructions"
    remedy = "train again with a lower base_learning_rate or a later disc_start"
    if not logits.isfinite().all():
        yield f"the discriminator is dead: its logits are not finite; {remedy}"
    elif spread <= 1e-6 * max(1.0, abs(real)) or not gradient.any():
        yield f"the discriminator is dead: its logits are {real:.3g} for every image, even for noise; {remedy}"
    elif _never_stepped(subject):
        yield (
            f"the discriminator is dead: it has not been trained by step {subject.step:,}, and disc_start is {start}; "
            "check that both optimizers of the first stage step, and that disc_factor is above 0"
        )


def _has(subject: Subject, prefix: str) -> bool:
    return any(name.startswith(prefix) for name in subject.state)


def _never_stepped(subject: Subject) -> bool:
    """Return whether the state of the discriminator's optimizer, or else its batch norms, are those of the start."""
    states = subject.content.get("optimizer_states")
    if isinstance(states, list) and len(states) > 1:
        moments = [entry.get("exp_avg_sq") for entry in states[1].get("state", {}).values()]
        return not any(isinstance(each, Tensor) and bool(each.any()) for each in moments)
    batches = [value for name, value in subject.state.items() if name.endswith("num_batches_tracked")]
    return bool(batches) and not any(bool(value) for value in batches)


@torch.no_grad()
def check_conditioning(subject: Subject, report: Report) -> Iterator[str]:
    """Find a conditioning that training leaves out too often, or that the model ignores."""
    model = subject.model
    if not isinstance(model, LatentDiffusion) or model.model.conditioning_key is None:
        return
    if model.cond_dropout > LARGEST_DROPOUT:
        yield (
            f"cond_dropout {model.cond_dropout:g} leaves the conditioning to "
            f"{100 * (1 - model.cond_dropout):.0f} % of the items, and the model hardly learns it; "
            "set cond_dropout: 0.1, and train again"
        )
        return
    effects = [effect for batch in subject.batches if (effect := _effect(model, batch)) is not None]
    if not effects:
        return
    effect = max(effects)
    report.lines["conditioning"] = f"changes the prediction by {effect:.2%}; cond_dropout {model.cond_dropout:g}"
    if effect < SMALLEST_EFFECT and subject.step not in YOUNG:
        yield (
            f"the model ignores its conditioning: another {model.cond_stage_key} changes the prediction by "
            f"{effect:.2%}; check cond_stage_key and that the data returns different values for it, "
            "lower cond_dropout, and train again"
        )


def _effect(model: LatentDiffusion, batch: Mapping[str, Any]) -> float | None:
    """Return the relative change of the prediction with the conditioning of other items; None if it is the same."""
    if not _varies(model.raw_conditioning(batch)):
        return None
    z, c = model.get_input(batch, model.first_stage_key, force_c_encode=True)
    other = map_tensors(lambda each: each.roll(1, 0), c)
    noise, effects = torch.randn_like(z), []
    for share in (0.3, 0.6, 0.9):
        t = torch.full((len(z),), int(share * (model.num_timesteps - 1)), device=z.device)
        x = model.q_sample(z, t, noise)
        first, second = model.apply_model(x, t, c), model.apply_model(x, t, other)
        norm = float(first.norm())
        if norm > 0:
            effects.append(float((first - second).norm()) / norm)
    return max(effects, default=None)


def _varies(conditioning: Any) -> bool:
    """Return whether the items of a batch have different conditionings."""
    if isinstance(conditioning, Mapping):
        return any(_varies(value) for value in conditioning.values())
    if isinstance(conditioning, Tensor):
        return bool((conditioning != conditioning[:1]).any())
    return len(set(map(str, conditioning))) > 1


@torch.no_grad()
def check_average(subject: Subject, report: Report) -> Iterator[str]:
    """Find moving averages that are not updated, or that lag behind the weights."""
    model = subject.model
    average = getattr(model, "model_ema", None)
    if not getattr(model, "use_ema", False) or not isinstance(average, LitEma) or not isinstance(model, DDPM):
        return
    updates, remedy = int(average.num_updates), "call model.update_ema() after each optimizer step, or use_ema: false"
    if updates == 0 and subject.step > 0:
        yield (
            f"the moving average was never updated in {subject.step:,} steps, and samples use it; {remedy}; "
            "ldm export_model --weights live exports the trained weights"
        )
        return
    if float(average.decay) >= 1.0:
        yield f"the decay of the moving average is 1, so that it never changes; use 0.9999, or {remedy}"
        return
    live = mean_loss(subject)
    with model.ema_scope():
        averaged = mean_loss(subject)
    report.lines["loss"] = f"{live:.4g} with the live weights, {averaged:.4g} with the averages of {updates:,} updates"
    if averaged > LARGEST_LAG * live:
        yield (
            f"the loss is {averaged:.4g} with the averaged weights and {live:.4g} with the live ones: the average is "
            f"not updated, or lags far behind; {remedy}, and export the live weights meanwhile"
        )


@torch.no_grad()
def mean_loss(subject: Subject) -> float:
    """Return the loss of the batches, with fixed random numbers."""
    torch.manual_seed(0)
    return sum(float(subject.model.shared_step(batch)[0]) for batch in subject.batches) / len(subject.batches)


CHECKS: tuple[Check, ...] = (
    check_missing,
    check_range,
    check_codebook,
    check_first_stage,
    check_scale,
    check_discriminator,
    check_conditioning,
    check_average,
)
