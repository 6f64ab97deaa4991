"""Parameterizations of a denoising network: training targets and conversion of predictions.

With x_t = √ᾱ x_start + √(1 - ᾱ) ε, the parameterizations predict

    eps   ε                           (arXiv:2006.11239)
    x0    x_start
    v     √ᾱ ε - √(1 - ᾱ) x_start     (arXiv:2202.00512, appendix D)

Where ᾱ = 0 (zero terminal SNR, arXiv:2305.08891), x_t is the noise itself. x0 and v determine x_start there, eps does
not.

Shapes: x_t, x_start, noise and predictions (B, C, H, W); alpha (B, 1, 1, 1), the value of ᾱ at each item's timestep.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from ldm.errors import UserError

PARAMETERIZATIONS = ("eps", "x0", "v")


class Prediction(NamedTuple):
    """Prediction for x_t, both as the noise and as the clean latent."""

    eps: torch.Tensor
    x_start: torch.Tensor


def training_target(
    parameterization: str, x_start: torch.Tensor, noise: torch.Tensor, alpha: torch.Tensor
) -> torch.Tensor:
    """Return the training target for `x_start` and the added `noise`."""
    if parameterization == "v":
        return alpha.sqrt() * noise - (1 - alpha).sqrt() * x_start
    return x_start if parameterization == "x0" else noise


def check_signal(parameterization: str, alphas_cumprod: torch.Tensor | np.ndarray) -> None:
    """Raise an error if the network predicts the noise at timesteps with ᾱ = 0, where the noise determines no x_start.

    Args:
        parameterization: prediction of the network.
        alphas_cumprod: ᾱ (S,) at the timesteps, in the dtype that sampling uses.

    Raises:
        UserError: the parameterization is "eps", and ᾱ is 0 at a timestep.
    """
    has_values = not getattr(alphas_cumprod, "is_meta", False)
    if parameterization == "eps" and has_values and bool((alphas_cumprod == 0).any()):
        raise UserError(
            'the noise schedule reaches ᾱ = 0 (zero terminal SNR), where a network with parameterization "eps" '
            'predicts no image; use parameterization "v" or "x0"'
        )


def interpret(parameterization: str, output: torch.Tensor, x_t: torch.Tensor, alpha: torch.Tensor) -> Prediction:
    """Convert the network's `output` for `x_t` to both forms of the prediction."""
    signal, spread = alpha.sqrt(), (1 - alpha).sqrt()
    if parameterization == "v":
        return Prediction(signal * output + spread * x_t, signal * x_t - spread * output)
    if parameterization == "x0":
        return Prediction((x_t - signal * output) / spread, output)
    return Prediction(output, (x_t - spread * output) / signal)
