import os
import tarfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ldm.errors import UserError
from ldm.io.download import fetch
from ldm.training.collate import Collate
from taming.data.helper_types import Annotation

__all__ = [
    "Annotation",
    "custom_collate",
    "download_url",
    "download_urls",
    "get_root",
    "is_prepared",
    "mark_prepared",
    "prompt_download",
    "quadratic_crop",
    "reporthook",
    "unpack",
]


def custom_collate(batch: list[Any]) -> Any:
    """Return the batch of items; lists of annotations stay lists, because images have different numbers of them.

    Raises:
        UserError: the items cannot be batched.
    """
    return Collate("the data set")(batch)


def unpack(path: str) -> None:
    """Unpack a `.tar`, `.tar.gz` or `.zip` file into its folder.

    Entries that would be written outside the folder, and links to other places, are refused.

    Raises:
        NotImplementedError: the file has another suffix.
    """
    folder = os.path.dirname(path)
    if path.endswith((".tar", ".tar.gz", ".tgz")):
        with tarfile.open(path) as archive:
            archive.extractall(folder, filter="data")
    elif path.endswith(".zip"):
        with zipfile.ZipFile(path) as archive:
            archive.extractall(folder)
    else:
        raise NotImplementedError(f'cannot unpack "{path}": it is neither a .tar, a .tar.gz nor a .zip')


def reporthook(bar: Any) -> Callable[..., None]:
    """Return a function for `urllib.request.urlretrieve` that shows the progress in a bar of tqdm."""
    last = 0

    def update(b: int = 1, bsize: int = 1, tsize: int | None = None) -> None:
        nonlocal last
        if tsize is not None:
            bar.total = tsize
        bar.update((b - last) * bsize)
        last = b

    return update


def get_root(name: str) -> str:
    """Return the folder `data/<name>`, which is created if it is missing."""
    root = os.path.join("data", name)
    os.makedirs(root, exist_ok=True)
    return root


def is_prepared(root: str) -> bool:
    """Return whether `mark_prepared` has marked the folder."""
    return Path(root, ".ready").exists()


def mark_prepared(root: str) -> None:
    """Mark the folder as complete, with a file `.ready`."""
    Path(root, ".ready").touch()


def prompt_download(file_: str, source: str, target_dir: str, content_dir: str | None = None) -> str:
    """Ask the user to put a file into a folder until it is there.

    Args:
        file_: name of the file.
        source: where to get it.
        target_dir: folder for it.
        content_dir: folder of its content, which may be there instead.

    Returns:
        The path of the file.

    Raises:
        UserError: there is no terminal to ask.
    """
    path = os.path.join(target_dir, file_)
    while not os.path.exists(path):
        if content_dir is not None and os.path.exists(content_dir):
            break
        where = f'"{path}"' + (f' or its content at "{content_dir}"' if content_dir is not None else "")
        try:
            input(f'Download "{file_}" from {source}, put it at {where}, and press Enter. ')
        except EOFError:
            raise UserError(f'"{file_}" is missing: download it from {source} and put it at {where}') from None
    return path


def download_url(file_: str, url: str, target_dir: str) -> str:
    """Download `url` to the file `file_` of a folder, and return its path."""
    path = os.path.join(target_dir, file_)
    os.makedirs(target_dir, exist_ok=True)
    fetch(url, Path(path), file_)
    return path


def download_urls(urls: Mapping[str, str], target_dir: str) -> dict[str, str]:
    """Download several files, given as name → link, and return name → path."""
    return {name: download_url(name, url, target_dir) for name, url in urls.items()}


def quadratic_crop(x: np.ndarray, bbox: Sequence[float], alpha: float = 1.0) -> np.ndarray:
    """Crop a square around a box, with its longer side times `alpha`; pixels outside are mirrored.

    Args:
        x: (H, W, C).
        bbox: (left, top, right, bottom) in pixels.
        alpha: side of the square, as a multiple of the longer side of the box.
    """
    height, width = x.shape[:2]
    centre = np.array([0.5 * (bbox[0] + bbox[2]), 0.5 * (bbox[1] + bbox[3])])
    side = max(2, int(alpha * max(bbox[2] - bbox[0], bbox[3] - bbox[1])))
    margin = min(*(centre - side), *(np.array([width, height]) - centre - side))
    if margin < 0:
        padding = int(np.ceil(-margin))
        x = np.pad(x, [(padding, padding), (padding, padding), *[(0, 0)] * (x.ndim - 2)], mode="reflect")
        centre = centre + padding
    left, top = (int(position - side / 2) for position in centre)
    return x[top : top + side, left : left + side]
