"""PSNR, SSIM and LPIPS of pairs of images, computed by torchmetrics and the LPIPS network of training."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.evaluation.scores import Figure
from ldm.io.checkpoint.reading import read_state_dict
from ldm.modules.losses.lpips import LPIPS

LIMIT = 100.0  # largest PSNR in dB; equal images have no finite one
RANGE = 2.0  # of values in [-1, 1]
SMALLEST = 16  # side in pixels, which SSIM and LPIPS need
VGG16 = "features."  # prefix of the names in torchvision's weights
PERCEPTUAL = "loss.perceptual_loss."  # prefix of LPIPS in the checkpoint of a first stage


class PairScores:
    """Scores of pairs of images that arrive in batches.

    Args:
        lpips: the network of LPIPS; None leaves LPIPS out.
        device: the device of the scores.

    Attributes:
        values: metric → the score of each pair.
    """

    def __init__(self, lpips: LPIPS | None, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.lpips = None if lpips is None else lpips.to(self.device)
        names = ("psnr", "ssim") if lpips is None else ("psnr", "ssim", "lpips")
        self.values: dict[str, list[float]] = {name: [] for name in names}

    def add(self, originals: Tensor, results: Tensor) -> None:
        """Add pairs of images, both (B, 3, H, W) float32 in [-1, 1].

        Raises:
            UserError: the images are too small, or have values that are not finite.
        """
        from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

        if min(originals.shape[2:]) < SMALLEST:
            raise UserError(f"SSIM and LPIPS need images of at least {SMALLEST} px; enlarge them with --size")
        if not torch.isfinite(results).all():
            raise UserError("some results have values that are not finite; check the weights, or use float32")
        originals, results = originals.to(self.device), results.to(self.device)
        ratios = peak_signal_noise_ratio(results, originals, data_range=RANGE, dim=(1, 2, 3), reduction="none")
        self.values["psnr"] += ratios.clamp(max=LIMIT).tolist()
        similarity = structural_similarity_index_measure(results, originals, data_range=RANGE, reduction="none")
        self.values["ssim"] += cast(Tensor, similarity).reshape(-1).tolist()
        if self.lpips is not None:
            with torch.inference_mode():
                distances = self.lpips(originals, results)
            self.values["lpips"] += distances.flatten().tolist()

    def figures(self, where: np.ndarray | None = None) -> dict[str, Figure]:
        """Return the mean and the deviation of each score over the pairs, or over those with True in `where`."""
        found = {}
        for name, values in self.values.items():
            chosen = np.asarray(values) if where is None else np.asarray(values)[where]
            if len(chosen):
                found[name] = Figure(float(chosen.mean()), float(chosen.std()))
        return found


def as_tensor(images: np.ndarray | Sequence[np.ndarray]) -> Tensor:
    """Return images (B, H, W, 3) uint8 as (B, 3, H, W) float32 in [-1, 1]."""
    from ldm.io.pixels import to_batch

    return to_batch(list(images))


def load_lpips(path: str | Path | None = None) -> LPIPS:
    """Return the network of LPIPS.

    Args:
        path: weights: those of torchvision's VGG16, or LPIPS in a file of its own or in the checkpoint of a first
            stage. Default: torchvision's VGG16, which is downloaded on first use.

    Raises:
        UserError: the weights are missing, or cannot be downloaded.
    """
    lpips = LPIPS()
    if path is None:
        try:
            lpips.prepare()
        except UserError as error:
            reason = str(error).removesuffix(", or train without it (perceptual_weight: 0)")
            raise UserError(f"{reason}, or name its weights with --lpips-weights, or use --no-lpips") from None
        return lpips
    weights = _lpips_weights(read_state_dict(path))
    missing = [name for name in lpips.state_dict() if name not in weights and not name.startswith("scaling_layer.")]
    if missing:
        raise UserError(
            f'"{path}" has neither the weights of VGG16 nor of LPIPS: "{missing[0]}" is missing; check --lpips-weights'
        )
    try:
        lpips.load_state_dict({name: value for name, value in weights.items() if name in lpips.state_dict()}, False)
    except RuntimeError:
        raise UserError(f'"{path}" has weights of other shapes than those of LPIPS; check --lpips-weights') from None
    lpips.prepare()
    return lpips


def _lpips_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights by the names of `LPIPS`."""
    if any(name.startswith(VGG16) for name in weights):
        from ldm.modules.losses.lpips import VGG16Features, channel_weights

        names = [name for name, _ in VGG16Features().named_parameters()]
        found = {f"net.{name}": weights.get(f"{VGG16}{name.partition('.')[2]}") for name in names}
        return {**channel_weights(), **{name: value for name, value in found.items() if value is not None}}
    return {name.removeprefix(PERCEPTUAL): value for name, value in weights.items()}


def lpips_protocol(lpips: LPIPS) -> dict[str, Any]:
    """Return the facts about LPIPS that a figure depends on; the hash is that of its weights in order."""
    digest = hashlib.sha256()
    for _, weight in sorted(lpips.named_parameters()):
        digest.update(weight.detach().cpu().numpy().tobytes())
    return {"network": "LPIPS 0.1, VGG16", "sha256": digest.hexdigest()}
