"""Time the features of FID and IS of a folder of images, beside torch-fidelity's own extraction.

python -m benchmarks.features --json features.json

Both read the same PNG files and compute the same Inception-v3 with the same random weights, in the same batches. The
distance of the Gaussians is not timed: it does not depend on the number of images.
"""

from __future__ import annotations

import logging
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.options import make_parser
from ldm.cli.command import command
from ldm.cli.options import positive_int

if TYPE_CHECKING:
    from ldm.evaluation.network import FeatureNetwork

SIDE, TINY_SIDE, TINY_COUNT = 256, 32, 3


def make_images(folder: Path, count: int, side: int) -> None:
    """Write PNG files of smooth shapes with fine noise."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    for number in range(count):
        shapes = Image.fromarray(random.integers(0, 256, (9, 9, 3), dtype=np.uint8))
        pixels = np.asarray(shapes.resize((side, side), Image.Resampling.BICUBIC)).astype(np.int16)
        pixels = pixels + random.integers(-12, 13, (side, side, 1), dtype=np.int16)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number:05}.png")


def random_network(folder: Path, device: str) -> FeatureNetwork:
    """Return torch-fidelity's Inception-v3 with random weights, through a file as users have it."""
    from unittest import mock

    import torch
    from torch_fidelity import feature_extractor_inceptionv3 as inception

    from ldm.evaluation.network import load_network

    extractor = inception.FeatureExtractorInceptionV3
    with (
        mock.patch.object(inception, "load_state_dict_from_url", lambda url, progress: {}),
        mock.patch.object(extractor, "load_state_dict", lambda self, weights: None),
    ):
        torch.save(extractor("random", ["2048"]).state_dict(), folder / "inception.pth")
    return load_network(folder / "inception.pth", device)


def with_torch_fidelity(folder: Path, network: FeatureNetwork, batch: int) -> None:
    """Compute the features by torch-fidelity."""
    from torch_fidelity.datasets import ImagesPathDataset
    from torch_fidelity.utils import get_featuresdict_from_dataset

    images = ImagesPathDataset([str(path) for path in sorted(folder.glob("*.png"))])
    get_featuresdict_from_dataset(images, network.module, batch, network.device.type == "cuda", False, False)


def with_ldm(folder: Path, network: FeatureNetwork, batch: int) -> None:
    """Compute the features as `ldm evaluate samples` does for FID and IS."""
    from ldm.evaluation.features import collect
    from ldm.evaluation.image_sets import ImageFolder

    collect(ImageFolder(folder), network, batch, keep_logits=True, progress=False)


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = make_parser("features", "Time the features of FID and IS.", rounds=3)
    parser.add_argument("--count", type=positive_int, default=64, metavar="N", help="images (default: %(default)s)")
    parser.add_argument("--batch", type=positive_int, default=32, metavar="N", help="images at once (default: 32)")
    args = parser.parse_args(argv)

    from benchmarks.timing import Report, begin, contest

    logging.getLogger("ldm").setLevel(logging.WARNING)
    device, report = begin(args), Report("features", args)
    count = TINY_COUNT if args.tiny else args.count
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "images"
        folder.mkdir()
        make_images(folder, count, TINY_SIDE if args.tiny else SIDE)
        network = random_network(Path(root), str(device))
        runs: Mapping[str, Callable[[], object]] = {
            "torch-fidelity": partial(with_torch_fidelity, folder, network, args.batch),
            "ldm": partial(with_ldm, folder, network, args.batch),
        }
        seconds = contest(runs, args.rounds, device)
    for name, times in seconds.items():
        base = zip(seconds["torch-fidelity"], times, strict=True)
        cells = {
            "what": name,
            "images / s": f"{count / statistics.median(times):.1f}",
            "min - max": f"{count / max(times):.1f} - {count / min(times):.1f}",
            "times as fast": f"{statistics.median(b / t for b, t in base):.2f}",
        }
        report.add(cells, times)
    report.finish()


if __name__ == "__main__":
    sys.exit(main())
