"""Noise schedules and the closed-form quantities of the diffusion process.

Symbols, as in DDPM (arXiv:2006.11239) and DDIM (arXiv:2010.02502):

    betas                β_t          variance added by the forward step t
    alphas_cumprod       ᾱ_t          q(x_t | x_0) = N(√ᾱ_t x_0, (1 - ᾱ_t) I)
    x_start, noise       x_0, ε       x_t = √ᾱ_t x_0 + √(1 - ᾱ_t) ε
    sigmas               σ_t          noise added by a reverse step, σ_t = η · (DDPM's)
    T, S                              timesteps of the model, steps of a sampling run

Tables are float64 NumPy arrays of shape (T,) or (S,). Timesteps t count from 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from ldm.config.values import TIMESTEP_SPACINGS
from ldm.errors import UserError, did_you_mean

BETA_SCHEDULES = ("linear", "cosine", "sqrt_linear", "sqrt")
GRIDS = TIMESTEP_SPACINGS
# Lower end of the "logsnr" grid if ᾱ ends at 0, where λ is -∞. The schedules of published models end at -2.7.
LOWEST_LAMBDA = -3.0


def make_beta_schedule(
    schedule: str,
    n_timestep: int,
    linear_start: float = 1e-4,
    linear_end: float = 2e-2,
    cosine_s: float = 8e-3,
) -> np.ndarray:
    """Return β_t (n_timestep,).

    The schedule "linear" is linear in √β, as in the published models, and "sqrt_linear" is linear in β. The schedule
    "cosine" follows arXiv:2102.09672, equation 17, with offset `cosine_s`.

    Raises:
        UserError: `schedule` is unknown.
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
    """Return β_t (T,) for a function ᾱ(t) of t in [0, 1]: β_t = min(1 - ᾱ((t+1)/T) / ᾱ(t/T), max_beta)."""
    values = np.array([alpha_bar(i / num_diffusion_timesteps) for i in range(num_diffusion_timesteps + 1)])
    return np.clip(1 - values[1:] / values[:-1], 0, max_beta)


def rescale_zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Return betas (T,) whose ᾱ ends at exactly 0 (zero terminal SNR, arXiv:2305.08891, algorithm 1).

    √ᾱ is shifted and scaled: its last value becomes 0 and its first value stays. A schedule that ends at 0 stays.

    Raises:
        UserError: the schedule has a single timestep.
    """
    if len(betas) < 2:
        raise UserError("rescale_betas_zero_snr needs a schedule of at least 2 timesteps")
    roots = np.sqrt(np.cumprod(1.0 - betas))
    if roots[-1] == 0:
        return betas
    roots = (roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))
    alphas_cumprod = roots**2
    return 1.0 - np.append(alphas_cumprod[0], alphas_cumprod[1:] / alphas_cumprod[:-1])


def check_betas(betas: np.ndarray) -> None:
    """Raise an error if betas do not define a noise schedule.

    Raises:
        UserError: the betas are not a list of numbers above 0 and at most 1.
    """
    if betas.ndim != 1 or not len(betas) or not ((betas > 0) & (betas <= 1)).all():
        raise UserError("the betas of the noise schedule must be a list of numbers above 0 and at most 1")


def diffusion_tables(betas: np.ndarray, v_posterior: float = 0.0) -> dict[str, np.ndarray]:
    """Return every table that a model registers as a buffer, by its published name.

    Equation 7 of arXiv:2006.11239 defines the posterior q(x_{t-1} | x_t, x_0). With v = `v_posterior` its variance
    is (1 - v) β̃_t + v β_t. Where ᾱ is 0, x_t is noise alone; the two tables that divide by √ᾱ are 0 there.
    """
    alphas = 1.0 - betas
    alphas_cumprod = np.cumprod(alphas)
    alphas_cumprod_prev = np.append(1.0, alphas_cumprod[:-1])
    variance = (1 - v_posterior) * betas * (1 - alphas_cumprod_prev) / (1 - alphas_cumprod) + v_posterior * betas
    has_signal = alphas_cumprod > 0
    reciprocal = 1 / np.where(has_signal, alphas_cumprod, 1.0)
    return {
        "betas": betas,
        "alphas_cumprod": alphas_cumprod,
        "alphas_cumprod_prev": alphas_cumprod_prev,
        "sqrt_alphas_cumprod": np.sqrt(alphas_cumprod),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - alphas_cumprod),
        "log_one_minus_alphas_cumprod": np.log(1 - alphas_cumprod),
        "sqrt_recip_alphas_cumprod": np.where(has_signal, np.sqrt(reciprocal), 0.0),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(reciprocal - 1),
        "posterior_variance": variance,
        # The variance at t = 0 is zero; its logarithm is clipped.
        "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
        "posterior_mean_coef1": betas * np.sqrt(alphas_cumprod_prev) / (1 - alphas_cumprod),
        "posterior_mean_coef2": (1 - alphas_cumprod_prev) * np.sqrt(alphas) / (1 - alphas_cumprod),
    }


TABLE_NAMES = frozenset(diffusion_tables(np.full(2, 0.5)))


def lvlb_weights(tables: Mapping[str, np.ndarray], parameterization: str) -> np.ndarray:
    """Return the weights (T,) that turn the simple loss into the variational lower bound.

    The weights for "eps" are those of equation 12, arXiv:2006.11239. The weights for "x0" follow the published code,
    with the denominator 2 - ᾱ_t. The weights for "v" are those for "eps" times ᾱ_t, because an error δ of v is an
    error √ᾱ_t δ of the noise; ᾱ_t / α_t = ᾱ_{t-1} keeps them finite at ᾱ_t = 0. The published code computes in
    float32, where 1 - ᾱ_0 loses precision; so does this one.
    """
    single = {name: table.astype(np.float32) for name, table in tables.items()}
    betas, alphas_cumprod, variance = (single[name] for name in ("betas", "alphas_cumprod", "posterior_variance"))
    if parameterization in ("eps", "v"):
        alphas = (1 - tables["betas"]).astype(np.float32)
        with np.errstate(divide="ignore", invalid="ignore"):
            weights = betas**2 / (2 * variance * alphas * (1 - alphas_cumprod))
            if parameterization == "v":
                at_zero = betas**2 * single["alphas_cumprod_prev"] / (2 * variance * (1 - alphas_cumprod))
                weights = np.where(alphas_cumprod > 0, weights * alphas_cumprod, at_zero)
    else:
        weights = 0.5 * np.sqrt(alphas_cumprod) / (2.0 - alphas_cumprod)
    weights[0] = weights[min(1, len(weights) - 1)]
    return weights


def min_snr_weights(alphas_cumprod: np.ndarray, gamma: float, parameterization: str) -> np.ndarray:
    """Return the min-SNR-γ weights (T,) of the simple loss (arXiv:2303.09556, section 3.4).

    The weight of a squared error of x_start is min(SNR_t, γ), with SNR_t = ᾱ_t / (1 - ᾱ_t). An error δ of x_start is
    an error √SNR_t δ of the noise and an error √(SNR_t + 1) δ of v. The weight is 0 at a timestep with ᾱ_t = 0.

    Raises:
        UserError: `gamma` is not above 0.
    """
    if not gamma > 0:
        raise UserError(f"min_snr_gamma must be above 0, got {gamma}; omit it to weight all timesteps equally")
    snr = alphas_cumprod / (1 - alphas_cumprod)
    return np.minimum(snr, gamma) / {"eps": snr, "x0": 1.0, "v": snr + 1}[parameterization]


def make_ddim_timesteps(
    ddim_discr_method: str,
    num_ddim_timesteps: int,
    num_ddpm_timesteps: int,
    verbose: bool = False,
    alphas_cumprod: np.ndarray | None = None,
) -> np.ndarray:
    """Return the timesteps of a sampling run as an increasing int64 grid; sampling visits them in reverse.

    Args:
        ddim_discr_method: name of the grid.

            - "exact": S evenly spaced timesteps for every S from 1 to T. The grid starts at 1 and equals the published
              grid if S divides T. For S = T it is 0 .. T-1.
            - "uniform": the published grid with stride T // S from timestep 1. Unless S divides T, it has more than
              S timesteps, and for some S it exceeds T - 1.
            - "quad": quadratic in t over the first 80 % of the timesteps.
            - "logsnr": S timesteps from T-1 to 0, evenly spaced in log √(ᾱ / (1 - ᾱ)).
            - "trailing": S evenly spaced timesteps that end at T-1 (arXiv:2305.08891, table 2).
        num_ddim_timesteps: S.
        num_ddpm_timesteps: T.
        verbose: not used, part of the published signature.
        alphas_cumprod: ᾱ (T,), required by "logsnr".

    Raises:
        UserError: the grid is unknown, S is not in 1 .. T, or the grid exceeds T - 1.
    """
    S, T = num_ddim_timesteps, num_ddpm_timesteps
    if not 1 <= S <= T:
        raise UserError(f"the number of sampling steps is {S}; choose between 1 and the model's {T}")
    if ddim_discr_method == "exact":
        return np.arange(T) if S == T else np.arange(S) * T // S + 1
    if ddim_discr_method == "trailing":
        return np.rint(np.arange(1, S + 1) * T / S).astype(np.int64) - 1
    if ddim_discr_method == "logsnr":
        if alphas_cumprod is None:
            raise ValueError('the "logsnr" grid depends on the noise schedule; pass alphas_cumprod')
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
            f'the "{ddim_discr_method}" grid with {S} of {T} steps reaches timestep {steps[-1]}, past the last one; '
            'use "exact", which supports any number of steps'
        )
    return steps


def _logsnr_timesteps(S: int, alphas_cumprod: np.ndarray) -> np.ndarray:
    """Return the timesteps nearest to an even grid of λ = log √(ᾱ / (1 - ᾱ)), without repetition, from 0 to T - 1.

    If ᾱ ends at 0, the grid is even from `LOWEST_LAMBDA` on. Its last timestep is T - 1 all the same.
    """
    T = len(alphas_cumprod)
    with np.errstate(divide="ignore"):
        half_logsnr = 0.5 * np.log(alphas_cumprod / (1 - alphas_cumprod))
    if np.isneginf(half_logsnr[-1]):
        half_logsnr = np.maximum(half_logsnr, LOWEST_LAMBDA)
    targets = np.linspace(half_logsnr[-1], half_logsnr[0], S)[::-1]
    steps = np.rint(np.interp(-targets, -half_logsnr, np.arange(T))).astype(np.int64)
    # λ falls fastest near t = 0, where neighbouring targets may round to the same timestep: shift them up by one each.
    positions = np.arange(S)
    steps = np.maximum.accumulate(steps - positions) + positions
    return np.minimum(steps, T - S + positions)


def make_ddim_sampling_parameters(
    alphacums: np.ndarray | torch.Tensor,
    ddim_timesteps: np.ndarray,
    eta: float,
    verbose: bool = False,
    ends_at_data: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (sigmas, alphas, alphas_prev), each (S,), of equation 16, arXiv:2010.02502.

    As published, the last sampling step ends at ᾱ_0. If the grid contains timestep 0, or with `ends_at_data`, it ends
    at the data, ᾱ = 1.
    """
    alphacums = np.asarray(alphacums, dtype=np.float64)
    alphas = alphacums[ddim_timesteps]
    final = 1.0 if ends_at_data or ddim_timesteps[0] == 0 else alphacums[0]
    alphas_prev = np.append(final, alphacums[ddim_timesteps[:-1]])
    # A step between two timesteps with ᾱ = 0 changes nothing.
    ratio = np.divide(alphas, alphas_prev, out=np.ones_like(alphas), where=alphas_prev > 0)
    sigmas = eta * np.sqrt((1 - alphas_prev) / (1 - alphas) * (1 - ratio))
    return sigmas, alphas, alphas_prev


def extract_into_tensor(a: torch.Tensor, t: torch.Tensor, x_shape: Sequence[int]) -> torch.Tensor:
    """Return `a[t]` for timesteps `t` (B,), shaped (B, 1, ..., 1) to broadcast against `x_shape`."""
    return a[t].reshape(t.shape[0], *((1,) * (len(x_shape) - 1)))


def noise_like(shape: Sequence[int], device: torch.device | str, repeat: bool = False) -> torch.Tensor:
    """Return standard normal noise; with `repeat` all items of the batch share it."""
    if repeat:
        return torch.randn((1, *shape[1:]), device=device).repeat(shape[0], *((1,) * (len(shape) - 1)))
    return torch.randn(tuple(shape), device=device)
