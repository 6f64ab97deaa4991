"""Features of a set of images: streamed statistics, and the features and logits that some metrics keep."""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from ldm.errors import UserError
from ldm.evaluation.image_sets import ImageSet, size_of
from ldm.evaluation.moments import Gaussian, Moments
from ldm.evaluation.network import FeatureNetwork
from ldm.io.npz import Rows as NpzRows
from ldm.io.npz import array_shapes, read_array, write_npz

logger = logging.getLogger(__name__)

PART = 5_000  # images after which the features are written, to go on from there
MOST_PARTS = 20
KEPT = 50_000  # most features that are kept


@dataclass(frozen=True)
class SetFeatures:
    """Features of a set of images.

    Attributes:
        gaussian: mean and covariance of the features of all images; None for a single image.
        count: number of images; None if it is not known.
        size: size of the images, such as "256 × 256"; None if it is not known.
        digest: SHA-256 of the SHA-256 of the pixels of each image, or of the file that the statistics come from.
        features: features (K, D) float32 of evenly spaced images; None if they were not kept.
        logits: logits (N, C) float32 of all images, in a file; None if they were not kept.
        origin: "images", or "statistics" if `gaussian` was read from a file.
    """

    gaussian: Gaussian | None
    count: int | None
    size: str | None
    digest: str
    features: np.ndarray | None = None
    logits: np.ndarray | None = None
    origin: str = "images"

    @property
    def dimension(self) -> int | None:
        """Number of features of an image."""
        if self.gaussian is not None:
            return len(self.gaussian.mu)
        return None if self.features is None else self.features.shape[1]


class Rows:
    """Float32 rows in a temporary file, so that they need no memory."""

    def __init__(self) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the array on it)
        self._count = self._columns = 0

    def add(self, rows: np.ndarray) -> None:
        """Add rows (B, D)."""
        self._columns = rows.shape[1]
        self._count += len(rows)
        self._file.write(np.ascontiguousarray(rows, np.float32).tobytes())

    def array(self) -> np.ndarray:
        """Return the rows as an array on the file."""
        self._file.flush()
        return np.memmap(self._file, np.float32, "r", shape=(self._count, self._columns))


def kept_indices(count: int, most: int) -> np.ndarray:
    """Return up to `most` evenly spaced indices below `count`."""
    return np.arange(count) if count <= most else np.linspace(0, count - 1, most).round().astype(np.int64)


class Collector:
    """Features of images that arrive in batches.

    Args:
        network: the feature network.
        kept: keep the features of the images with these indices; None keeps none.
        keep_logits: keep the logits of all images in a temporary file.
        name: name of the set in messages.
    """

    def __init__(
        self, network: FeatureNetwork, kept: np.ndarray | None, keep_logits: bool, name: str = "the images"
    ) -> None:
        self.network, self.name = network, name
        self._moments = Moments()
        self._kept = kept
        self._features: list[np.ndarray] = []
        self._logits = Rows() if keep_logits else None
        self._digests: list[bytes] = []
        self.count = 0
        self.size: str | None = None

    def following(self) -> Collector:
        """Return a collector of the images that follow those of this one."""
        kept = None if self._kept is None else self._kept[self._kept >= self.count] - self.count
        return Collector(self.network, kept, self._logits is not None, self.name)

    def add(self, images: np.ndarray) -> None:
        """Add images (B, H, W, 3) uint8.

        Raises:
            UserError: the network returns no logits although they are needed, or values that are not finite.
        """
        if self.size is None:
            self.size = size_of(images[0])
        self._digests += [hashlib.sha256(np.ascontiguousarray(image).tobytes()).digest() for image in images]
        features, logits = self.network(images)
        self._moments.add(features)
        if self._kept is not None:
            first, last = np.searchsorted(self._kept, [self.count, self.count + len(images)])
            self._features.append(features[self._kept[first:last] - self.count])
        if self._logits is not None:
            if logits is None:
                raise UserError("IS needs logits, which the module of --features does not return; leave out is")
            self._logits.add(logits)
        self.count += len(images)

    def result(self) -> SetFeatures:
        """Return the features of all images."""
        gaussian = self._moments.gaussian() if self.count > 1 else None
        features = None if self._kept is None else np.concatenate(self._features)
        logits = None if self._logits is None else self._logits.array()
        digest = hashlib.sha256(b"".join(self._digests)).hexdigest()
        return SetFeatures(gaussian, self.count, self.size, digest, features, logits)

    def save(self, path: Path) -> None:
        """Write the features of the images to a file that `load` reads."""
        gaussian = self._moments.partial()
        arrays = {
            "mu": gaussian.mu,
            "sigma": gaussian.sigma,
            "size": np.frombuffer(str(self.size).encode(), np.uint8),
            "digests": np.frombuffer(b"".join(self._digests), np.uint8).reshape(-1, hashlib.sha256().digest_size),
        }
        if self._kept is not None:
            arrays["features"] = np.concatenate(self._features)
        if self._logits is not None:
            arrays["logits"] = self._logits.array()
        write_npz(path, {name: NpzRows.of(np.ascontiguousarray(array)) for name, array in arrays.items()})

    def load(self, path: Path) -> None:
        """Add the images whose features `save` wrote.

        Raises:
            UserError: the file is damaged, or the images have another size.
        """
        arrays = {name: read_array(path, name) for name in array_shapes(path)}
        size = arrays["size"].tobytes().decode()
        if self.size not in (None, size):
            raise UserError(f"the images of {self.name} have different sizes: {self.size} and {size}; use --size")
        self.size = size
        self._digests += [each.tobytes() for each in arrays["digests"]]
        self._moments.merge(Gaussian(arrays["mu"], arrays["sigma"], len(arrays["digests"])))
        if self._kept is not None:
            self._features.append(arrays["features"])
        if self._logits is not None:
            self._logits.add(arrays["logits"])
        self.count += len(arrays["digests"])


def collect(
    images: ImageSet,
    network: FeatureNetwork,
    batch_size: int,
    *,
    most_kept: int = 0,
    keep_logits: bool = False,
    progress: bool = True,
    folder: Path | None = None,
) -> SetFeatures:
    """Return the features of a set of images.

    Args:
        images: the images.
        network: the feature network.
        batch_size: images at once.
        most_kept: keep the features of up to this many evenly spaced images.
        keep_logits: keep the logits of all images in a temporary file.
        progress: show a progress bar.
        folder: folder for the features of parts of a large set, from which an interrupted computation goes on. The
            parts are deleted at the end. It must belong to these images and this network alone.

    Raises:
        UserError: an image cannot be read, or has another size or form than the others.
    """
    from tqdm import tqdm

    kept = kept_indices(len(images), most_kept) if most_kept else None
    part = max(PART, -(-len(images) // MOST_PARTS))
    folder = folder if part < len(images) else None
    total = Collector(network, kept, keep_logits, images.name)
    done = [] if folder is None else _read_parts(total, folder, part)
    with tqdm(
        total=len(images), initial=total.count, desc="features", unit="image", disable=None if progress else True
    ) as bar:
        current = total.following() if folder is not None else total
        for names, pixels in images.batches(batch_size, total.count, part):
            current.add(pixels)
            bar.update(len(names))
            if folder is not None and (current.count == part or total.count + current.count == len(images)):
                path = folder / f"{total.count}.npz"
                current.save(path)
                total.load(path)
                done.append(path)
                current = total.following()
    result = total.result()
    for path in done:
        path.unlink(missing_ok=True)
    if folder is not None:
        with suppress(OSError):
            folder.rmdir()
    return result


def _read_parts(total: Collector, folder: Path, part: int) -> list[Path]:
    """Add the parts that an interrupted computation has written, and return their files."""
    done = []
    while (path := folder / f"{total.count}.npz").is_file():
        try:
            if array_shapes(path)["digests"][0][0] != part:
                break
            total.load(path)
        except (UserError, KeyError):
            break  # a damaged part is computed again
        done.append(path)
    if done:
        logger.info("going on after %d images of %s", total.count, total.name)
    return done


def check_sizes(sizes: Sequence[tuple[str, str | None]]) -> None:
    """Raise an error if sets of images, by name, have different sizes; those of statistics are None.

    Raises:
        UserError: two sizes differ.
    """
    known = [(name, size) for name, size in sizes if size is not None]
    for name, size in known[1:]:
        if size != known[0][1]:
            raise UserError(
                f"{known[0][0]} has images of {known[0][1]} and {name} of {size}; figures of different sizes cannot "
                "be compared: give a reference of the same size, or use --size"
            )
