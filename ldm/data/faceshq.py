"""Face data sets CelebA-HQ (arXiv:1710.10196) and FFHQ (arXiv:1812.04948), read from folders of images or arrays."""

from __future__ import annotations

import bisect
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch.utils.data import ConcatDataset, Dataset

from ldm.data.image_files import ARRAY_SUFFIX, ListedImages, crop_square, fit_square, to_image
from ldm.errors import UserError

logger = logging.getLogger(__name__)

SUFFIXES = (ARRAY_SUFFIX, ".png", ".jpg", ".jpeg", ".webp")  # of copies of the images, in order of preference


class FacesBase(ListedImages):
    """Base class of the face data sets: square images.

    Items: `image` (size, size, 3) float32 in [-1, 1], `relative_file_path_` and `file_path_`.

    A list may name the images in another format than that of the files: `imgHQ00000.npy`, as the published lists of
    CelebA-HQ do, stands for `imgHQ00000.png` if the folder has that file instead.

    Args:
        size: side of the image in pixels.
        keys: return only these entries of the items.
        txt_file, data_root: see `ListedImages`.

    Raises:
        UserError: the images are missing.
    """

    def __init__(
        self,
        size: int,
        keys: Sequence[str] | None = None,
        txt_file: str | None = None,
        data_root: str | None = None,
    ) -> None:
        self.size = size
        super().__init__(txt_file, data_root, keys)
        if not self.paths[0].is_file():
            self.paths = self._in_other_format(self.paths)

    def _in_other_format(self, paths: Sequence[Path]) -> Sequence[Path]:
        """Return the paths with the suffix that the first file has, or as they are if it does not exist at all."""
        found = (suffix for suffix in SUFFIXES if paths[0].with_suffix(suffix).is_file())
        suffix = next(found, None)
        if suffix is None:
            return paths
        logger.info('%s: the list names "%s", and the files are %s', type(self).__name__, paths[0].name, suffix)
        return [path if path.is_file() else path.with_suffix(suffix) for path in paths]

    @property
    def data(self) -> FacesBase:
        """The items, as published."""
        return self

    def image(self, pixels: np.ndarray) -> np.ndarray:
        """Return the central square, resized to `size`."""
        return to_image(fit_square(pixels, self.size))


class CelebAHQTrain(FacesBase):
    """Training set of CelebA-HQ, as the published arrays `imgHQ00000.npy` or as image files."""

    list_file, folder = "data/celebahqtrain.txt", "data/celebahq"


class CelebAHQValidation(FacesBase):
    """Validation set of CelebA-HQ."""

    list_file, folder = "data/celebahqvalidation.txt", "data/celebahq"


class FFHQTrain(FacesBase):
    """Training set of FFHQ."""

    list_file, folder = "data/ffhqtrain.txt", "data/ffhq"


class FFHQValidation(FacesBase):
    """Validation set of FFHQ."""

    list_file, folder = "data/ffhqvalidation.txt", "data/ffhq"


class ConcatDatasetWithIndex(ConcatDataset):
    """Concatenation of data sets whose items are pairs of an item and the index of its data set."""

    def __getitem__(self, idx: int) -> tuple[Any, int]:
        return super().__getitem__(idx), bisect.bisect_right(self.cumulative_sizes, idx % len(self))


class FacesHQ(Dataset):
    """CelebA-HQ and FFHQ together.

    Items: those of the two data sets, and `class`, 0 for CelebA-HQ and 1 for FFHQ; with `coord` also `coord`
    (crop_size, crop_size, 1) float64, the position of each pixel before the crop in row-major order, from 0 to 1.

    Args:
        size: side of the images in pixels.
        keys: return only these entries of the items, besides `class` and `coord`.
        crop_size: side of a square crop, at a random position in training and at the centre otherwise.
        coord: return `coord`, which needs `crop_size`.

    Raises:
        UserError: the images are missing, or the crop is larger than they are.
    """

    parts: ClassVar[tuple[type[FacesBase], type[FacesBase]]]
    random_crop: ClassVar[bool] = False

    def __init__(
        self, size: int, keys: Sequence[str] | None = None, crop_size: int | None = None, coord: bool = False
    ) -> None:
        if crop_size is not None and crop_size > size:
            raise UserError(f"{type(self).__name__}: crop_size {crop_size} is larger than size {size}; lower it")
        self.data = ConcatDatasetWithIndex([part(size=size, keys=keys) for part in self.parts])
        self.crop_size = crop_size
        self.coord = coord

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> dict[str, Any]:
        item, number = self.data[i]
        if self.crop_size is not None and "image" in item:
            height, width = item["image"].shape[:2]
            positions = np.arange(height * width).reshape(height, width, 1) / (height * width)
            both = crop_square(np.concatenate([item["image"], positions], axis=-1), self.crop_size, self.random_crop)
            item["image"] = both[..., :-1].astype(np.float32)
            if self.coord:
                item["coord"] = both[..., -1:]
        return {**item, "class": number}


class FacesHQTrain(FacesHQ):
    """Training sets of CelebA-HQ and FFHQ, cropped at random positions."""

    parts = (CelebAHQTrain, FFHQTrain)
    random_crop = True


class FacesHQValidation(FacesHQ):
    """Validation sets of CelebA-HQ and FFHQ, cropped at the centre."""

    parts = (CelebAHQValidation, FFHQValidation)
