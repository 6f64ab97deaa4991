"""Reconstructions of a first stage: their scores, the use of its codebook, and the scale of its latents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.evaluation.features import Collector, SetFeatures
from ldm.evaluation.image_sets import ImageSet
from ldm.evaluation.moments import ChannelMoments
from ldm.evaluation.network import FeatureNetwork
from ldm.evaluation.pairs import PairScores, as_tensor
from ldm.modules.losses.lpips import LPIPS


class CodebookUse:
    """Use of the entries of a codebook.

    Args:
        size: number of entries.
    """

    def __init__(self, size: int) -> None:
        self.counts = np.zeros(size, np.int64)

    def add(self, indices: Tensor) -> None:
        """Add indices of any shape."""
        self.counts += np.bincount(indices.flatten().cpu().numpy(), minlength=len(self.counts))

    def findings(self) -> dict[str, Any]:
        """Return the number and the share of entries that are used, and the perplexity of their frequencies."""
        shares = self.counts[self.counts > 0] / self.counts.sum()
        used = len(shares)
        perplexity = float(np.exp(-(shares * np.log(shares)).sum()))
        return {"entries": len(self.counts), "used": used, "share": used / len(self.counts), "perplexity": perplexity}


@dataclass(frozen=True)
class Encoded:
    """Result of a first stage for a batch.

    Attributes:
        latents: latents (B, C, h, w) on which a diffusion model is trained: of a posterior its mean, and of a
            quantizer its input.
        variances: variances of the posterior, of the same shape; None without one.
        indices: indices of the codebook; None without one.
        images: reconstructions (B, 3, H, W) in [-1, 1].
    """

    latents: Tensor
    variances: Tensor | None
    indices: Tensor | None
    images: Tensor


@torch.inference_mode()
def reconstruct_batch(stage: Any, images: Tensor) -> Encoded:
    """Encode images (B, 3, H, W) in [-1, 1] with a first stage and decode them again; of a posterior its mean."""
    from ldm.models.autoencoder import VQModel, VQModelInterface

    x = images.to(stage.device, stage.get_last_layer().dtype)
    if isinstance(stage, VQModel):
        latents = stage.encode_to_prequant(x)
        quantized, _, (_, _, indices) = stage.quantize(latents)
        as_they_are = {"force_not_quantize": True} if isinstance(stage, VQModelInterface) else {}
        decoded, variances = stage.decode(quantized, **as_they_are), None
    else:
        posterior = stage.encode(x)
        latents, variances, indices = posterior.mode(), posterior.var, None
        decoded = stage.decode(latents)
    return Encoded(latents.float(), variances, indices, decoded.float().clamp(-1.0, 1.0))


@dataclass(frozen=True)
class Reconstructed:
    """Findings about a first stage on a set of images.

    Attributes:
        pairs: scores of the pairs of originals and reconstructions.
        features: features of the originals and of the reconstructions; None without a feature network.
        names: names of the images.
        size: size of the images.
        latents: mean and deviation of each channel of the latents, and the scale factor that they suggest.
        codebook: use of the codebook; None without one.
    """

    pairs: PairScores
    features: tuple[SetFeatures, SetFeatures] | None
    names: list[str]
    size: str
    latents: dict[str, Any]
    codebook: dict[str, Any] | None


def evaluate_first_stage(
    stage: Any,
    images: ImageSet,
    network: FeatureNetwork | None,
    lpips: LPIPS | None,
    batch_size: int,
    most_kept: int = 0,
    progress: bool = True,
) -> Reconstructed:
    """Measure a first stage on a set of images.

    Args:
        stage: the autoencoder.
        images: the images.
        network: the feature network of rFID; None leaves it out.
        lpips: the network of LPIPS; None leaves it out.
        batch_size: images at once.
        most_kept: keep the features of up to this many reconstructions.
        progress: show a progress bar.

    Raises:
        UserError: an image cannot be read, or has a size that the first stage cannot encode.
    """
    from tqdm import tqdm

    from ldm.evaluation.features import kept_indices
    from ldm.io.pixels import to_uint8

    pairs, channels = PairScores(lpips, stage.device), ChannelMoments()
    names: list[str] = []
    size = ""
    codebook = CodebookUse(stage.quantize.re_embed) if hasattr(stage, "quantize") else None
    kept = kept_indices(len(images), most_kept) if most_kept else None
    collectors = [] if network is None else [Collector(network, each, False) for each in (None, kept)]
    with tqdm(total=len(images), desc="reconstructions", unit="image", disable=None if progress else True) as bar:
        for batch, pixels in images.batches(batch_size):
            if not names:
                size = _checked_size(stage, pixels)
            originals = as_tensor(pixels)
            encoded = reconstruct_batch(stage, originals)
            pairs.add(originals, encoded.images)
            variances = None if encoded.variances is None else encoded.variances.float().cpu().numpy()
            channels.add(encoded.latents.cpu().numpy(), variances)
            if codebook is not None and encoded.indices is not None:
                codebook.add(encoded.indices)
            for collector, each in zip(collectors, (pixels, to_uint8(encoded.images)), strict=False):
                collector.add(each)
            names += batch
            bar.update(len(batch))
    features = (collectors[0].result(), collectors[1].result()) if collectors else None
    use = None if codebook is None else codebook.findings()
    return Reconstructed(pairs, features, names, size, latent_findings(channels), use)


def latent_findings(channels: ChannelMoments) -> dict[str, Any]:
    """Return the statistics of latents, and the scale factor for which their deviation is 1 (paper, appendix G)."""
    deviation = channels.total_deviation()
    return {
        "mean": channels.mean().tolist(),
        "deviation": channels.deviation().tolist(),
        "total_deviation": deviation,
        "scale_factor": 1.0 / deviation if deviation else None,
    }


def _checked_size(stage: Any, pixels: np.ndarray) -> str:
    from ldm.evaluation.image_sets import size_of

    factor = 2 ** (len(stage.encoder.down) - 1)
    if pixels.shape[1] % factor or pixels.shape[2] % factor:
        raise UserError(
            f"the first stage needs sides that are multiples of {factor}, not {size_of(pixels[0])}; use --size"
        )
    if stage.in_channels != 3:
        raise UserError(f"the first stage encodes {stage.in_channels} channels; the metrics are for images with 3")
    return size_of(pixels[0])
