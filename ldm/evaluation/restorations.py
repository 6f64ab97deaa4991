"""Restorations and their originals: in-painting with masks, and super-resolution, beside simple methods."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np

from ldm.errors import UserError
from ldm.evaluation.features import Collector, SetFeatures
from ldm.evaluation.image_sets import ImageFolder, batched, read_pixels, size_of
from ldm.evaluation.network import FeatureNetwork
from ldm.evaluation.pairs import PairScores, as_tensor
from ldm.evaluation.scores import Figure, Settings, check_count, fid, inception_score
from ldm.modules.losses.lpips import LPIPS

MASK_SUFFIX = "_mask"  # of the name of a mask beside that of its image
HARD = (0.4, 0.5)  # shares of masked pixels of the difficult images in the paper's table 7
THRESHOLD = 128  # grey level from which a mask marks a pixel


@dataclass(frozen=True)
class Item:
    """Files of one restoration: `mask` of in-painting, `small` of super-resolution."""

    name: str
    result: Path
    original: Path
    mask: Path | None = None
    small: Path | None = None


def by_name(folder: Path) -> dict[str, Path]:
    """Return the images in a folder by their relative paths without suffixes.

    Raises:
        UserError: the folder has no image, or two images of one name.
    """
    found: dict[str, Path] = {}
    for file in ImageFolder(folder).files:
        name = str(PurePosixPath(file).with_suffix(""))
        if name in found:
            raise UserError(f'"{folder}" has two images called "{name}"; give each a name of its own')
        found[name] = folder / file
    return found


def find_items(results: Path, originals: Path, masks: Path | None = None, small: Path | None = None) -> list[Item]:
    """Return the restorations in a folder with the originals, masks and small images of the same names.

    A mask may also have the name of its image with `_mask` at the end.

    Raises:
        UserError: a folder is missing, or lacks the file of a restoration.
    """
    found = by_name(results)
    others = {"original": by_name(originals)}
    if masks is not None:
        others["mask"] = {name.removesuffix(MASK_SUFFIX): path for name, path in by_name(masks).items()}
    if small is not None:
        others["small"] = by_name(small)
    folders = {"original": originals, "mask": masks, "small": small}
    for kind, paths in others.items():
        missing = [name for name in found if name not in paths]
        if missing:
            noun = {"original": "original", "mask": "mask", "small": "small image"}[kind]
            raise UserError(
                f'"{folders[kind]}" has no {noun} for {len(missing)} of {len(found)} results, such as "{missing[0]}"; '
                "give files of the same names"
            )
    return [Item(name, path, **{kind: paths[name] for kind, paths in others.items()}) for name, path in found.items()]


def read_mask(path: Path, shape: Sequence[int]) -> np.ndarray:
    """Return a mask (H, W) bool that is True where an image is restored.

    Raises:
        UserError: it cannot be read, or has another size than the image, of the shape `shape`.
    """
    from ldm.io.images import open_image

    mask = np.asarray(open_image(path).convert("L")) >= THRESHOLD
    if mask.shape != tuple(shape[:2]):
        raise UserError(f'the mask "{path}" is {size_of(mask)}, its image {shape[1]} × {shape[0]}; give equal sizes')
    return mask


# -- simple methods ----------------------------------------------------------------------------------------------


def fill_by_telea(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return an image with its masked part filled by OpenCV's in-painting (Telea, 2004)."""
    import cv2

    return cv2.inpaint(np.ascontiguousarray(image), mask.astype(np.uint8), 3, cv2.INPAINT_TELEA)


def blacken(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return an image with its masked part black, as the model receives it."""
    return np.where(mask[..., None], np.uint8(0), image)


def enlarge(small: np.ndarray, height: int, width: int, filter: str) -> np.ndarray:
    """Return an image resized by a filter of Pillow, "bicubic" or "nearest"."""
    from PIL import Image

    method = {"bicubic": Image.Resampling.BICUBIC, "nearest": Image.Resampling.NEAREST}[filter]
    return np.asarray(Image.fromarray(small).resize((width, height), method))


Filled = Callable[[np.ndarray, np.ndarray], np.ndarray]
FILLED: Mapping[str, Filled] = {"Telea": fill_by_telea, "identity": blacken}
ENLARGED: Mapping[str, str] = {"bicubic": "bicubic", "identity": "nearest"}


# -- scores ------------------------------------------------------------------------------------------------------


@dataclass
class Method:
    """Scores of one method: of all images, and of those with 40 to 50 % masked pixels.

    Args:
        network: the feature network; None leaves out FID and IS.
        lpips: the network of LPIPS; None leaves it out.
        keep_logits: keep the logits for IS.
        kept: keep the features of the images with these indices.
    """

    network: FeatureNetwork | None
    lpips: LPIPS | None
    keep_logits: bool = False
    kept: np.ndarray | None = None
    pairs: PairScores = field(init=False)
    all: Collector | None = field(init=False, default=None)
    hard: Collector | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.pairs = PairScores(self.lpips, "cpu" if self.network is None else self.network.device)
        if self.network is not None:
            self.all = Collector(self.network, self.kept, self.keep_logits)
            self.hard = Collector(self.network, None, False)

    def add(self, originals: np.ndarray, results: np.ndarray, hard: np.ndarray) -> None:
        """Add results (B, H, W, 3) uint8; `hard` marks those with 40 to 50 % masked pixels."""
        self.pairs.add(as_tensor(originals), as_tensor(results))
        if self.all is not None and self.hard is not None:
            self.all.add(results)
            if hard.any():
                self.hard.add(results[hard])


@dataclass(frozen=True)
class Restored:
    """Scores of restorations.

    Attributes:
        figures: method → metric → value; the method "" is that of the results.
        per_image: method → metric → the value of each image.
        names: names of the images.
        shares: share of masked pixels of each image; empty for super-resolution.
        size: size of the images.
        results, originals: features; None without a feature network.
    """

    figures: dict[str, dict[str, Figure]]
    per_image: dict[str, dict[str, list[float]]]
    names: list[str]
    shares: list[float]
    size: str
    results: SetFeatures | None
    originals: SetFeatures | None


@dataclass(frozen=True)
class _Batch:
    names: list[str]
    originals: np.ndarray
    methods: dict[str, np.ndarray]
    shares: list[float]


def evaluate_restorations(
    items: Sequence[Item],
    network: FeatureNetwork | None,
    lpips: LPIPS | None,
    batch_size: int,
    settings: Settings,
    *,
    kept: np.ndarray | None = None,
    progress: bool = True,
) -> Restored:
    """Measure restorations and simple methods.

    Args:
        items: the files, all for in-painting or all for super-resolution.
        network: the feature network; None leaves out FID and IS.
        lpips: the network of LPIPS; None leaves it out.
        batch_size: images at once.
        settings: settings of FID and IS; other metrics of features are ignored.
        kept: keep the features of the results with these indices.
        progress: show a progress bar.

    Raises:
        UserError: an image cannot be read, two images have different sizes, or there are too few images for a metric.
    """
    from tqdm import tqdm

    if network is not None and network.dimension is not None:
        check_count(settings, "the set of results", len(items), network.dimension)
    baselines = FILLED if items[0].mask else ENLARGED if items[0].small else {}
    with_logits = network is not None and "is" in settings.metrics
    methods = {name: Method(network, lpips, with_logits, None if name else kept) for name in ("", *baselines)}
    originals = Method(network, None)
    names: list[str] = []
    shares: list[float] = []
    size = ""
    with tqdm(total=len(items), desc="restorations", unit="image", disable=None if progress else True) as bar:
        for batch in _batches(items, batch_size):
            hard = np.array([HARD[0] <= share < HARD[1] for share in batch.shares] or [False] * len(batch.names))
            if originals.all is not None and originals.hard is not None:
                originals.all.add(batch.originals)
                if hard.any():
                    originals.hard.add(batch.originals[hard])
            for name, results in batch.methods.items():
                methods[name].add(batch.originals, results, hard)
            size = size or size_of(batch.originals[0])
            names, shares = names + batch.names, shares + batch.shares
            bar.update(len(batch.names))
    features = {name: None if each.all is None else each.all.result() for name, each in methods.items()}
    reference = None if originals.all is None else originals.all.result()
    figures = {
        name: _figures(each, features[name], originals, reference, shares, settings) for name, each in methods.items()
    }
    per_image = {name: each.pairs.values for name, each in methods.items()}
    return Restored(figures, per_image, names, shares, size, features[""], reference)


def _batches(items: Sequence[Item], batch_size: int) -> Iterator[_Batch]:
    """Yield batches of originals, results and baselines.

    Raises:
        UserError: an image cannot be read, or two images have different sizes.
    """
    shape: tuple[int, ...] | None = None
    for group in batched(items, batch_size):
        batch = _Batch([], np.empty(0), {}, [])
        originals: list[np.ndarray] = []
        methods: dict[str, list[np.ndarray]] = {}
        for item in group:
            original, result = read_pixels(item.original), read_pixels(item.result)
            shape = shape or original.shape
            for path, pixels in ((item.original, original), (item.result, result)):
                if pixels.shape != shape:
                    raise UserError(
                        f'"{path}" is {size_of(pixels)}, others are {shape[1]} × {shape[0]}; give images of one size'
                    )
            originals.append(original)
            for name, pixels in {"": result, **_baselines(item, original, batch.shares)}.items():
                methods.setdefault(name, []).append(pixels)
        stacked = {name: np.stack(images) for name, images in methods.items()}
        yield _Batch([item.name for item in group], np.stack(originals), stacked, batch.shares)


def _baselines(item: Item, original: np.ndarray, shares: list[float]) -> dict[str, np.ndarray]:
    """Return the results of the simple methods, and add the share of masked pixels to `shares`."""
    if item.mask is not None:
        mask = read_mask(item.mask, original.shape)
        shares.append(float(mask.mean()))
        return {name: fill(original, mask) for name, fill in FILLED.items()}
    if item.small is not None:
        small = read_pixels(item.small)
        height, width = original.shape[:2]
        return {name: enlarge(small, height, width, filter) for name, filter in ENLARGED.items()}
    return {}


def _figures(
    method: Method,
    features: SetFeatures | None,
    originals: Method,
    reference: SetFeatures | None,
    shares: Sequence[float],
    settings: Settings,
) -> dict[str, Figure]:
    """Return the figures of a method."""
    found: dict[str, Figure] = {}
    if features is not None and reference is not None and features.gaussian and reference.gaussian:
        found["fid"] = Figure(fid(features.gaussian, reference.gaussian))
        if features.logits is not None:
            found["is"] = inception_score(features.logits, settings.splits)
    found |= method.pairs.figures()
    where = np.array([HARD[0] <= share < HARD[1] for share in shares], bool)
    if where.any():
        scores = method.pairs.figures(where)
        found |= {"lpips_40_50": scores["lpips"]} if "lpips" in scores else {}
        if method.hard is not None and originals.hard is not None:
            pair = method.hard.result(), originals.hard.result()
            if _are_enough(pair[0], settings) and pair[0].gaussian and pair[1].gaussian:
                found["fid_40_50"] = Figure(fid(pair[0].gaussian, pair[1].gaussian))
    return found


def _are_enough(features: SetFeatures, settings: Settings) -> bool:
    """Return whether the images are enough for FID."""
    return settings.allow_few or (features.count or 0) > (features.dimension or 0)
