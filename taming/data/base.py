from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data.faceshq import ConcatDatasetWithIndex
from ldm.data.image_files import ImageFiles, fit_square, read_pixels, to_image

__all__ = ["ConcatDatasetWithIndex", "ImagePaths", "NumpyPaths"]


class ImagePaths(ImageFiles):
    """Data set of image files: `image` float32 in [-1, 1], `file_path_` and the entries of `labels`.

    Args:
        paths: the image files.
        size: side of the square image in pixels; None keeps the size of the file.
        random_crop: crop at a random position along the longer side; otherwise at the centre.
        labels: entry → its value for each file.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        size: int | None = None,
        random_crop: bool = False,
        labels: Mapping[str, Sequence[Any]] | None = None,
    ) -> None:
        super().__init__([Path(path) for path in paths], labels or {})
        self.labels["file_path_"] = [str(path) for path in paths]
        self.size = size
        self.random_crop = random_crop

    def preprocess_image(self, image_path: str | Path) -> np.ndarray:
        """Return the image in a file, (size, size, 3) float32 in [-1, 1]."""
        pixels = read_pixels(Path(image_path))
        return to_image(fit_square(pixels, self.size, self.random_crop) if self.size else pixels)

    def read(self, index: int) -> np.ndarray:
        """Return the image of an item; `preprocess_image` reads it."""
        return self.preprocess_image(self.labels["file_path_"][index])

    def __getitem__(self, i: int) -> dict[str, Any]:
        index, image = self.readable(i)
        return {**self.entries(index), "image": image}


class NumpyPaths(ImagePaths):
    """Data set of `.npy` files with images (3, H, W), (1, 3, H, W) or (H, W, 3) in uint8."""
