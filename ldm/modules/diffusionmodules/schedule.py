"""Noise schedules, and the closed forms of the diffusion process that they determine.

Symbols, as in DDPM (arXiv:2006.11239) and DDIM (arXiv:2010.02502):

    betas                β_t          variance added by the forward step t
    alphas_cumprod       ᾱ_t          q(x_t | x_0) = N(√ᾱ_t x_0, (1 - ᾱ_t) I)
    x_start, noise       x_0, ε       x_t = √ᾱ_t x_0 + √(1 - ᾱ_t) ε
    sigmas               σ_t          noise added by a reverse step, σ_t = η · (DDPM's)
    T, S                              steps of the model, steps of a sampling run

Tables are float64 numpy arrays of shape (T,) or (S,); steps t count from 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from ldm.errors import UserError, did_you_mean

BETA_SCHEDULES = ("linear", "cosine", "sqrt_linear", "sqrt")
GRIDS = ("exact", "logsnr", "uniform", "quad")


def make_beta_schedule(
    schedule: str,
    n_timestep: int,
    linear_start: float = 1e-4,
    linear_end: float = 2e-2,
    cosine_s: float = 8e-3,
) -> np.ndarray:
    """β_t of shape (n_timestep,).

    `linear` is linear in √β, as the published models were trained; `sqrt_linear` is linear in β itself.
    `cosine` follows arXiv:2102.09672, equation 17, with offset `cosine_s`.

    Raises:
        UserError: an unknown schedule.
    """
    if schedule == "linear":
        return np.linspace(linear_start**0.5, linear_end**0.5, n_timestep, dtype=np.float64) ** 2
    if schedule == "cosine":
        return betas_for_alpha_bar(n_timestep, lambda t: math.cos((t + cosine_s) / (1 + cosine_s) * math.pi / 2) ** 2)
    if schedule == "sqrt_linear":
        return np.linspace(linear_start, linear_end, n_timestep, dtype=np.float64)
    if schedule == "sqrt":
        return np.linspace(linear_start, linear_end, n_timestep, dtype=np.float64) ** 0.5
    known = ", ".join(BETA_SCHEDULES)
    hint = did_you_mean(schedule, BETA_SCHEDULES)
    raise UserError(f'beta_schedule "{schedule}" is not known{hint}; choose one of {known}')


def betas_for_alpha_bar(
    num_diffusion_timesteps: int, alpha_bar: Callable[[float], float], max_beta: float = 0.999
) -> np.ndarray:
    """β_t (T,) from a function ᾱ(t) of t in [0, 1]: β_t = min(1 - ᾱ((t+1)/T) / ᾱ(t/T), max_beta)."""
    values = np.array([alpha_bar(i / num_diffusion_timesteps) for i in range(num_diffusion_timesteps + 1)])
    return np.clip(1 - values[1:] / values[:-1], 0, max_beta)


def diffusion_tables(betas: np.ndarray, v_posterior: float = 0.0) -> dict[str, np.ndarray]:
    """Every table that a model registers as a buffer, under its published name.

    The posterior q(x_{t-1} | x_t, x_0) is equation 7 of arXiv:2006.11239; `v_posterior` v moves its
    variance towards β_t: (1 - v) β̃_t + v β_t.
    """
    alphas = 1.0 - betas
    alphas_cumprod = np.cumprod(alphas)
    alphas_cumprod_prev = np.append(1.0, alphas_cumprod[:-1])
    variance = (1 - v_posterior) * betas * (1 - alphas_cumprod_prev) / (1 - alphas_cumprod) + v_posterior * betas
    return {
        "betas": betas,
        "alphas_cumprod": alphas_cumprod,
        "alphas_cumprod_prev": alphas_cumprod_prev,
        "sqrt_alphas_cumprod": np.sqrt(alphas_cumprod),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - alphas_cumprod),
        "log_one_minus_alphas_cumprod": np.log(1 - alphas_cumprod),
        "sqrt_recip_alphas_cumprod": np.sqrt(1 / alphas_cumprod),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / alphas_cumprod - 1),
        "posterior_variance": variance,
        # The variance at t = 0 is zero; its logarithm is clipped.
        "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
        "posterior_mean_coef1": betas * np.sqrt(alphas_cumprod_prev) / (1 - alphas_cumprod),
        "posterior_mean_coef2": (1 - alphas_cumprod_prev) * np.sqrt(alphas) / (1 - alphas_cumprod),
    }


TABLE_NAMES = frozenset(diffusion_tables(np.full(2, 0.5)))


def lvlb_weights(tables: Mapping[str, np.ndarray], parameterization: str) -> np.ndarray:
    """Weights (T,) that turn the simple loss into the variational bound.

    For `eps` these are those of equation 12, arXiv:2006.11239. For `x0` the published expression is kept:
    its denominator is 2 - ᾱ_t. Computed in single precision, as published: 1 - ᾱ_0 cancels. For `v` they are
    those of `eps` times ᾱ_t: an error of v is an error of √ᾱ_t as much in the noise.
    """
    single = {name: table.astype(np.float32) for name, table in tables.items()}
    betas, alphas_cumprod, variance = (single[name] for name in ("betas", "alphas_cumprod", "posterior_variance"))
    if parameterization in ("eps", "v"):
        alphas = (1 - tables["betas"]).astype(np.float32)
        with np.errstate(divide="ignore"):
            weights = betas**2 / (2 * variance * alphas * (1 - alphas_cumprod))
        weights = weights * alphas_cumprod if parameterization == "v" else weights
    else:
        weights = 0.5 * np.sqrt(alphas_cumprod) / (2.0 - alphas_cumprod)
    weights[0] = weights[min(1, len(weights) - 1)]
    return weights


def min_snr_weights(alphas_cumprod: np.ndarray, gamma: float, parameterization: str) -> np.ndarray:
    """Weights (T,) of the simple loss by which errors of x_start weigh min(SNR_t, γ); arXiv:2303.09556, section 3.4.

    SNR_t = ᾱ_t / (1 - ᾱ_t); an error of x_start is one of √SNR_t in the noise and of √(SNR_t + 1) in v.

    Raises:
        UserError: γ is not above 0.
    """
    if not gamma > 0:
        raise UserError(f"min_snr_gamma must be above 0, got {gamma}; leave it out to weight all steps alike")
    snr = alphas_cumprod / (1 - alphas_cumprod)
    return np.minimum(snr, gamma) / {"eps": snr, "x0": 1.0, "v": snr + 1}[parameterization]


def make_ddim_timesteps(
    ddim_discr_method: str,
    num_ddim_timesteps: int,
    num_ddpm_timesteps: int,
    verbose: bool = False,
    alphas_cumprod: np.ndarray | None = None,
) -> np.ndarray:
    """The increasing grid of model steps, int64, that a sampling run visits backwards.

    `exact` gives S evenly spaced steps for every S from 1 to T. It starts at step 1, as the published grid
    does, and equals it wherever S divides T; at S = T it is 0 .. T-1.
    `uniform` is the published grid: stride T // S from step 1. Unless S divides T it has more steps than
    asked for, and it leaves the model's range for some S.
    `quad` is quadratic in t over the first 80 % of the steps.
    `logsnr` spaces S steps from T-1 to 0 evenly in log √(ᾱ / (1 - ᾱ)), for which it needs `alphas_cumprod` (T,).

    Raises:
        UserError: an unknown method, S outside 1 .. T, or a grid that leaves the model's range.
    """
    S, T = num_ddim_timesteps, num_ddpm_timesteps
    if not 1 <= S <= T:
        raise UserError(f"{S} sampling steps asked for: choose between 1 and the model's {T}")
    if ddim_discr_method == "exact":
        return np.arange(T) if S == T else np.arange(S) * T // S + 1
    if ddim_discr_method == "logsnr":
        if alphas_cumprod is None:
            raise ValueError('the "logsnr" grid follows the noise schedule: give alphas_cumprod')
        return _logsnr_timesteps(S, alphas_cumprod)
    if ddim_discr_method == "uniform":
        steps = np.arange(0, T, T // S) + 1
    elif ddim_discr_method == "quad":
        steps = (np.linspace(0, np.sqrt(T * 0.8), S) ** 2).astype(np.int64) + 1
    else:
        hint = did_you_mean(ddim_discr_method, GRIDS)
        raise UserError(f'step grid "{ddim_discr_method}" is not known{hint}; choose one of {", ".join(GRIDS)}')
    if steps[-1] >= T:
        raise UserError(
            f'the "{ddim_discr_method}" grid with {S} of {T} steps reaches step {steps[-1]}, past the last one;'
            ' use "exact", which runs any number of steps'
        )
    return steps


def _logsnr_timesteps(S: int, alphas_cumprod: np.ndarray) -> np.ndarray:
    """The model steps nearest to an even grid of λ = log √(ᾱ / (1 - ᾱ)), each once, from 0 to T - 1."""
    T = len(alphas_cumprod)
    half_logsnr = 0.5 * np.log(alphas_cumprod / (1 - alphas_cumprod))
    wanted = np.linspace(half_logsnr[-1], half_logsnr[0], S)[::-1]
    steps = np.rint(np.interp(-wanted, -half_logsnr, np.arange(T))).astype(np.int64)
    # λ falls fastest near step 0, where neighbours of the grid may share a step: move them up, one each.
    places = np.arange(S)
    steps = np.maximum.accumulate(steps - places) + places
    return np.minimum(steps, T - S + places)


def make_ddim_sampling_parameters(
    alphacums: np.ndarray | torch.Tensor, ddim_timesteps: np.ndarray, eta: float, verbose: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(sigmas, alphas, alphas_prev), each (S,), of equation 16, arXiv:2010.02502.

    The step that follows the last one goes to ᾱ_0, as published, unless the grid contains step 0 itself:
    then it goes to the data, ᾱ = 1.
    """
    alphacums = np.asarray(alphacums, dtype=np.float64)
    alphas = alphacums[ddim_timesteps]
    final = 1.0 if ddim_timesteps[0] == 0 else alphacums[0]
    alphas_prev = np.append(final, alphacums[ddim_timesteps[:-1]])
    sigmas = eta * np.sqrt((1 - alphas_prev) / (1 - alphas) * (1 - alphas / alphas_prev))
    return sigmas, alphas, alphas_prev


def extract_into_tensor(a: torch.Tensor, t: torch.Tensor, x_shape: Sequence[int]) -> torch.Tensor:
    """`a[t]` for steps t (B,), shaped (B, 1, ..., 1) to multiply a tensor of shape `x_shape`."""
    return a[t].reshape(t.shape[0], *((1,) * (len(x_shape) - 1)))


def noise_like(shape: Sequence[int], device: torch.device | str, repeat: bool = False) -> torch.Tensor:
    """Standard normal noise; with `repeat` every item of the batch gets the same."""
    if repeat:
        return torch.randn((1, *shape[1:]), device=device).repeat(shape[0], *((1,) * (len(shape) - 1)))
    return torch.randn(tuple(shape), device=device)
