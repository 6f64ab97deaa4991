"""Features of a reference: computed once and cached, or read from published statistics."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np

from ldm.config.assets import downloads_root, locate
from ldm.errors import UserError
from ldm.evaluation.features import SetFeatures, collect
from ldm.evaluation.image_sets import IMAGES, STATISTICS, ImageArchive, ImageSet, has_statistics
from ldm.evaluation.libraries import versions
from ldm.evaluation.moments import Gaussian
from ldm.evaluation.network import FeatureNetwork
from ldm.io.files import sha256
from ldm.io.npz import Rows, array_shapes, read_array, write_npz

logger = logging.getLogger(__name__)

FORMAT = 1  # of the cached files
FEATURES = "feats"  # array of features in clean-fid's archives for KID


def cache_folder() -> Path:
    """Return the folder of the cached references."""
    return downloads_root() / ".cache" / "evaluation"


def cached_features(
    images: ImageSet,
    network: FeatureNetwork,
    batch_size: int,
    most_kept: int,
    folder: Path | None,
    progress: bool = True,
) -> SetFeatures:
    """Return the features of a set of images, from the cache if they were computed before.

    The key of the cache covers the files, their preparation, the network and the version of torch-fidelity.

    Args:
        images, network, batch_size, most_kept, progress: see `ldm.evaluation.features.collect`.
        folder: the cache; None caches nothing.

    Raises:
        UserError: an image cannot be read, or has another size or form than the others.
    """
    key = None if folder is None else images.key()
    if folder is None or key is None:
        return collect(images, network, batch_size, most_kept=most_kept, progress=progress)
    parts = [FORMAT, key, network.protocol(), most_kept, versions()["torch-fidelity"]]
    path = folder / f"{hashlib.sha256(json.dumps(parts).encode()).hexdigest()}.npz"
    if path.is_file():
        try:
            found = _read_cache(path)
        except (UserError, ValueError) as error:
            logger.warning(
                "computing the features of %s again, because the cached ones are damaged: %s", images.name, error
            )
        else:
            logger.info("using the cached features of %s, %s", images.name, path)
            return found
    features = collect(
        images, network, batch_size, most_kept=most_kept, progress=progress, folder=path.with_suffix(".parts")
    )
    _write_cache(path, features)
    return features


def parts_folder(images: ImageSet, network: FeatureNetwork, most_kept: int, folder: Path | None) -> Path | None:
    """Return the folder for parts of the features of samples, in the cache `folder`; None if they have no key."""
    key = None if folder is None else images.key()
    if folder is None or key is None:
        return None
    parts = ["samples", FORMAT, key, network.protocol(), most_kept, versions()["torch-fidelity"]]
    return folder / f"{hashlib.sha256(json.dumps(parts).encode()).hexdigest()}.parts"


def _write_cache(path: Path, features: SetFeatures) -> None:
    text = json.dumps({"count": features.count, "size": features.size, "digest": features.digest})
    arrays = {"facts": np.frombuffer(text.encode(), np.uint8)}
    if features.gaussian is not None:
        arrays |= {"mu": features.gaussian.mu, "sigma": features.gaussian.sigma}
    if features.features is not None:
        arrays["features"] = features.features
    write_npz(path, {name: Rows.of(array) for name, array in arrays.items()})


def _read_cache(path: Path) -> SetFeatures:
    arrays = {name: read_array(path, name) for name in array_shapes(path)}
    facts = json.loads(arrays["facts"].tobytes())
    gaussian = Gaussian(arrays["mu"], arrays["sigma"], facts["count"]) if "mu" in arrays else None
    return SetFeatures(gaussian, facts["count"], facts["size"], facts["digest"], arrays.get("features"))


def read_reference(
    path: str | Path, network: FeatureNetwork, batch_size: int, most_kept: int, folder: Path | None
) -> SetFeatures | None:
    """Return the features in a file of published statistics; None if `path` is no such file.

    The forms are those of ADM (`mu` and `sigma`, and with `arr_0` also images), of pytorch-fid and clean-fid (`mu` and
    `sigma`), and of clean-fid for KID (`feats`).

    Args:
        path: the file.
        network, batch_size, most_kept, folder: for the images of the file; see `cached_features`.

    Raises:
        UserError: the file is damaged.
    """
    found = locate(path)
    if found.suffix != ".npz" or not found.is_file():
        return None
    arrays = array_shapes(found)
    if not has_statistics(found) and FEATURES not in arrays:
        return None
    logger.info('the statistics in "%s" do not state how their images were resized and cropped', found)
    gaussian = _read_gaussian(found) if has_statistics(found) else None
    statistics = SetFeatures(gaussian, None, None, sha256(found), origin="statistics")
    if FEATURES in arrays:
        return replace(statistics, features=_checked(found, FEATURES, read_array(found, FEATURES)).astype(np.float32))
    if IMAGES in arrays and most_kept:
        images = cached_features(ImageArchive(found), network, batch_size, most_kept, folder)
        return replace(statistics, size=images.size, features=images.features)
    return statistics


def _read_gaussian(path: Path) -> Gaussian:
    mu, sigma = (_checked(path, name, read_array(path, name)).astype(np.float64) for name in STATISTICS)
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise UserError(f'the statistics in "{path}" have the shapes {mu.shape} and {sigma.shape}; give another file')
    return Gaussian(mu, sigma, None)


def _checked(path: Path, name: str, array: np.ndarray) -> np.ndarray:
    """Return an array of finite numbers.

    Raises:
        UserError: it has other values.
    """
    if array.dtype.kind not in "fiu" or not np.isfinite(array).all():
        raise UserError(f'the array "{name}" in "{path}" has values that are not finite numbers; give another file')
    return array
