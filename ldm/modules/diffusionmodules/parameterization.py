"""What a denoising network may predict: the target of its training, and how its answer is read.

With x_t = √ᾱ x_start + √(1 - ᾱ) ε, a network of the parameterization

    eps   predicts ε                           (arXiv:2006.11239)
    x0    predicts x_start
    v     predicts √ᾱ ε - √(1 - ᾱ) x_start     (arXiv:2202.00512, appendix D)

Shapes: x_t, x_start, noise and predictions (B, C, H, W); alpha, which is ᾱ at each item's step, (B, 1, 1, 1).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

PARAMETERIZATIONS = ("eps", "x0", "v")


class Prediction(NamedTuple):
    """What a network says of x_t, as the noise in it and as what lies under the noise."""

    eps: torch.Tensor
    x_start: torch.Tensor


def training_target(
    parameterization: str, x_start: torch.Tensor, noise: torch.Tensor, alpha: torch.Tensor
) -> torch.Tensor:
    """What the network should predict of x_start and the noise added to it."""
    if parameterization == "v":
        return alpha.sqrt() * noise - (1 - alpha).sqrt() * x_start
    return x_start if parameterization == "x0" else noise


def interpret(parameterization: str, output: torch.Tensor, x_t: torch.Tensor, alpha: torch.Tensor) -> Prediction:
    """Both forms of the network's `output` for x_t."""
    signal, spread = alpha.sqrt(), (1 - alpha).sqrt()
    if parameterization == "v":
        return Prediction(signal * output + spread * x_t, signal * x_t - spread * output)
    if parameterization == "x0":
        return Prediction((x_t - signal * output) / spread, output)
    return Prediction(output, (x_t - spread * output) / signal)
