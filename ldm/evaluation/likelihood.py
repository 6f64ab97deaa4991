"""Variational bound of a diffusion model on the likelihood of its latents, in bits per dimension."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.evaluation.data_sets import DatasetImages, seeded
from ldm.evaluation.image_sets import batched
from ldm.models.diffusion.conditioning import map_tensors
from ldm.modules.diffusionmodules.parameterization import training_target
from ldm.training.collate import Collate

RANGES = 10  # ranges of timesteps whose contributions are stated


@dataclass(frozen=True)
class Bound:
    """Variational bound of a set of images, in bits per dimension of the latents.

    Attributes:
        total: the bound of each image.
        prior: its part for x_T: the divergence of q(x_T | x_0) from the standard normal distribution.
        ranges: mean contributions of ranges of timesteps of equal lengths, from the first to the last.
        size: channels, height and width of the latents.
    """

    total: list[float]
    prior: list[float]
    ranges: list[float]
    size: tuple[int, ...]


def measure_bound(
    model: Any, images: DatasetImages, every: int, batch_size: int, seed: int = 0, progress: bool = True
) -> Bound:
    """Return the variational bound of a diffusion model.

    The bound is the sum over all timesteps of the weighted simple loss (`lvlb_weights`, as training logs it as
    `loss_vlb`), and the divergence of the prior. One timestep of every `every` consecutive ones is chosen at random and
    stands for all of them, so that the expected value does not depend on `every`.

    Args:
        model: a diffusion model with the weights to measure.
        images: the data set, with the conditioning that the model needs.
        every: length of a range of timesteps of which one is evaluated; 1 evaluates all.
        batch_size: latents at once.
        seed: image i uses the seed `seed` + i for its timesteps and its noise.
        progress: show a progress bar.

    Raises:
        UserError: the model noises its conditioning, `every` is too large, or the data lack what the model needs.
    """
    from tqdm import tqdm

    if getattr(model, "shorten_cond_schedule", False):
        raise UserError("likelihood does not measure models that noise their conditioning (num_timesteps_cond)")
    steps = model.num_timesteps
    if every > steps:
        raise UserError(f"--every {every} is larger than the {steps} timesteps of the model; give a smaller one")
    total: list[float] = []
    prior: list[float] = []
    sums = np.zeros(steps)
    size: tuple[int, ...] = ()
    with tqdm(total=len(images), desc="likelihood", unit="image", disable=None if progress else True) as bar:
        for items in batched(images.items(), batch_size):
            latents, conditioning = _encoded(model, Collate(images.name)(items), seed + len(total))
            size = tuple(latents.shape[1:])
            for number in range(len(latents)):
                condition = partial(_repeated, conditioning, number)
                terms = _terms(model, latents[number], condition, every, batch_size, seed + len(total))
                sums += terms
                prior.append(_prior(model, latents[number]))
                total.append(float(terms.sum()) + prior[-1])
                bar.update()
    edges = np.linspace(0, steps, RANGES + 1).round().astype(int)
    ranges = [float(sums[first:last].sum()) / len(total) for first, last in itertools.pairwise(edges)]
    return Bound(total, prior, ranges, size)


@torch.no_grad()
def _encoded(model: Any, batch: dict[str, Any], seed: int) -> tuple[Tensor, Any]:
    """Return the latents of a batch and their conditioning."""
    moved = {name: value.to(model.device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    with seeded(seed):
        if not hasattr(model, "first_stage_model"):
            return model.get_input(moved, model.first_stage_key), None
        latents, conditioning = model.get_input(moved, model.first_stage_key, force_c_encode=True)[:2]
    return latents, conditioning


@torch.no_grad()
def _terms(
    model: Any, latent: Tensor, condition: Callable[[int], Any], every: int, batch_size: int, seed: int
) -> np.ndarray:
    """Return the terms (T,) of one image in bits per dimension; a chosen timestep has those of its range.

    Args:
        model: the diffusion model.
        latent: (C, h, w).
        condition: returns the conditioning for a number of timesteps.
        every, batch_size, seed: see `measure_bound`.
    """
    rng = np.random.default_rng(seed)
    chosen = [
        (int(rng.integers(start, min(start + every, model.num_timesteps))), min(every, model.num_timesteps - start))
        for start in range(0, model.num_timesteps, every)
    ]
    generator = torch.Generator().manual_seed(seed % 2**63)
    terms = np.zeros(model.num_timesteps)
    for part in batched(chosen, batch_size):
        t = torch.tensor([step for step, _ in part], device=latent.device)
        z = latent.expand(len(part), *latent.shape)
        noise = torch.randn(z.shape, generator=generator).to(z)
        output = model.apply_model(model.q_sample(z, t, noise), t, condition(len(part)))
        alpha = model.alphas_cumprod[t].view(-1, 1, 1, 1)
        error = (output - training_target(model.parameterization, z, noise, alpha)).square().mean(dim=(1, 2, 3))
        values = (model.lvlb_weights[t] * error).double().cpu().numpy()
        for (step, length), value in zip(part, values, strict=True):
            terms[step] = length * value / math.log(2)
    return terms


def _repeated(conditioning: Any, index: int, count: int) -> Any:
    """Return the conditioning of one item of a batch `count` times."""
    return map_tensors(lambda c: c[index : index + 1].expand(count, *c.shape[1:]), conditioning)


def _prior(model: Any, latent: Tensor) -> float:
    """Return the divergence of q(x_T | x_0) from the standard normal distribution, in bits per dimension."""
    alpha = float(model.alphas_cumprod[-1])
    variance = 1.0 - alpha
    divergence = 0.5 * (alpha * float(latent.double().square().mean()) + variance - 1.0 - math.log(variance))
    return divergence / math.log(2)
