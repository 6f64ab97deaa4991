"""Time the loading of training images: files to batches of 256 × 256 crops, beside torchvision's `ImageFolder`.

python -m benchmarks.loader --json loader.json

The images are made: smooth shapes with fine noise, saved as JPEG of quality 90. Every contestant resizes the smaller
side to 256 pixels with Pillow's bicubic filter, crops a square at a random position, mirrors half of the images, and
returns float32 in [-1, 1]. The data sets with a published form of resizing do what they always do. Loader processes
stay alive between the rounds, so that their start is not timed.
"""

from __future__ import annotations

import logging
import math
import statistics
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.options import make_parser
from ldm.cli.command import command
from ldm.cli.options import positive_int

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

SIDE, BATCH = 256, 16
SHARD = "00000.tar"
TRANSFORMS: dict[str, dict[str, int]] = {
    "Resize": {"size": SIDE, "interpolation": 3},
    "RandomCrop": {"size": SIDE},
    "RandomHorizontalFlip": {},
}
# Width and height of the images, and their share of --count.
SIZES = {(500, 375): 1.0, (2000, 1500): 0.1}
TINY, TINY_COUNT = {(60, 40): 1.0}, 6


def make_images(root: Path, count: int, width: int, height: int) -> None:
    """Write JPEG files that are about as large as photographs of this size, and a shard of them."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    folder = root / "images"
    folder.mkdir(parents=True)
    for number in range(count):
        shapes = Image.fromarray(random.integers(0, 256, (9, 12, 3), dtype=np.uint8))
        pixels = np.asarray(shapes.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
        pixels = pixels + random.integers(-12, 13, (height, width, 1), dtype=np.int16)
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        image.save(folder / f"{number:05}.jpg", quality=90)
        (folder / f"{number:05}.txt").write_text(f"made image {number}", encoding="utf-8")
    with tarfile.open(root / SHARD, "w") as archive:
        for path in sorted(folder.iterdir()):
            archive.add(path, path.name)


def torchvision_folder(root: Path) -> Any:
    """Return torchvision's data set of the images below a folder."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import (
        Compose,
        InterpolationMode,
        Normalize,
        RandomCrop,
        RandomHorizontalFlip,
        Resize,
        ToTensor,
    )

    half = (0.5, 0.5, 0.5)
    resize = Resize(SIDE, InterpolationMode.BICUBIC)
    return ImageFolder(
        str(root), Compose([resize, RandomCrop(SIDE), RandomHorizontalFlip(), ToTensor(), Normalize(half, half)])
    )


def data_sets(root: Path) -> dict[str, Callable[[], Any]]:
    """Return the data sets to time, by name."""
    from ldm.data.faceshq import FacesBase
    from ldm.data.folder import FolderTrain
    from ldm.data.lsun import LSUNBase
    from ldm.data.openimages import FullOpenImagesTrain
    from ldm.data.previews.pytorch_dataset import PreviewsTrain
    from ldm.data.shards import ImageShards

    folder, shards = str(root / "images"), str(root / SHARD)
    transforms = [{"target": f"torchvision.transforms.{name}", "params": params} for name, params in TRANSFORMS.items()]
    return {
        "torchvision ImageFolder": partial(torchvision_folder, root),
        "ldm.data.folder.FolderTrain": partial(FolderTrain, folder, size=SIDE),
        "ldm.data.previews…PreviewsTrain": partial(PreviewsTrain, SIDE, folder, flip_p=0.5),
        "ldm.data.lsun.LSUNBase": partial(LSUNBase, data_root=folder, size=SIDE),
        "ldm.data.openimages.FullOpenImagesTrain": partial(FullOpenImagesTrain, SIDE, data_root=folder),
        "ldm.data.faceshq.FacesBase": partial(FacesBase, data_root=folder, size=SIDE),
        "ldm.data.shards.ImageShards": partial(ImageShards, shards, image_transforms=transforms),
    }


def loaders(root: Path, workers: int) -> Iterator[tuple[str, DataLoader]]:
    """Iterate over the loaders to time: each data set with the loader that training uses for it."""
    from torch.utils.data import DataLoader, IterableDataset

    from ldm.training.loader import ResumableLoader, seed_worker
    from ldm.training.shards import SampleCollate

    for name, build in data_sets(root).items():
        if name.startswith("torchvision"):
            yield name, DataLoader(build(), BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
        else:
            dataset, init = build(), seed_worker if workers else None
            shuffle = not isinstance(dataset, IterableDataset)
            options: dict[str, Any] = {"worker_init_fn": init, "collate_fn": SampleCollate(name)}
            options |= {"num_workers": workers, "persistent_workers": workers > 0}
            yield name, ResumableLoader(dataset, BATCH, shuffle, **options)


def read_all(loader: DataLoader) -> None:
    """Read one epoch."""
    for _ in loader:
        pass


def measure(root: Path, count: int, workers: int, rounds: int) -> Iterator[tuple[dict[str, Any], list[float]]]:
    """Iterate over the rows of a table: each data set, and its times for all images of a folder."""
    import torch

    from benchmarks.timing import contest

    runs: Mapping[str, Callable[[], object]] = {
        name: partial(read_all, loader) for name, loader in loaders(root, workers)
    }
    seconds = contest(runs, rounds, torch.device("cpu"))
    base = next(iter(seconds.values()))
    for name, times in seconds.items():
        speed = statistics.median(b / t for b, t in zip(base, times, strict=True))
        cells = {
            "workers": workers,
            "what": name,
            "images / s": f"{count / statistics.median(times):.0f}",
            "min - max": f"{count / max(times):.0f} - {count / min(times):.0f}",
            "times as fast": f"{speed:.2f}",
        }
        yield cells, times


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = make_parser("loader", "Time the loading of training images.")
    parser.add_argument(
        "--workers", type=int, nargs="+", default=(0, 1), metavar="N", help="numbers of loader processes"
    )
    parser.add_argument(
        "--count",
        type=positive_int,
        default=400,
        metavar="N",
        help="number of small images; there are a tenth as many large ones (default: %(default)s)",
    )
    args = parser.parse_args(argv)

    import torch

    from benchmarks.timing import Report

    logging.getLogger("ldm").setLevel(logging.WARNING)
    torch.set_num_threads(args.threads or 1)
    report = Report("loader", args)
    with tempfile.TemporaryDirectory() as folder:
        for (width, height), share in (TINY if args.tiny else SIZES).items():
            size, count = f"{width} × {height}", math.ceil(share * (TINY_COUNT if args.tiny else args.count))
            root = Path(folder) / size
            make_images(root, count, width, height)
            for workers in args.workers:
                for cells, times in measure(root, count, workers, args.rounds):
                    report.add({"images": size, **cells}, times)
    report.finish()


if __name__ == "__main__":
    sys.exit(main())
