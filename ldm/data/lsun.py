"""LSUN (arXiv:1506.03365): bedrooms, churches and cats, read from folders of images and the published lists."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

from ldm.data.image_files import ListedImages, crop_square, pil_method, to_image


class LSUNBase(ListedImages):
    """Base class of the LSUN data sets: the central square of each image, resized and randomly mirrored.

    Items: `image` (size, size, 3) float32 in [-1, 1], `relative_file_path_` and `file_path_`.

    Args:
        txt_file, data_root: see `ListedImages`.
        size: side of the image in pixels (default: the smaller side of the file).
        interpolation: name of a resampling filter of Pillow.
        flip_p: probability of mirroring an image, from PyTorch's global generator.

    Raises:
        UserError: the images are missing, or the interpolation is unknown.
    """

    def __init__(
        self,
        txt_file: str | None = None,
        data_root: str | None = None,
        size: int | None = None,
        interpolation: str = "bicubic",
        flip_p: float = 0.5,
    ) -> None:
        self.method = pil_method(interpolation)
        self.size = size
        self.flip_p = flip_p
        super().__init__(txt_file, data_root)

    def image(self, pixels: np.ndarray) -> np.ndarray:
        """Return the central square, resized, and mirrored with probability `flip_p`."""
        square = Image.fromarray(crop_square(pixels, min(pixels.shape[:2])))
        if self.size is not None:
            square = square.resize((self.size, self.size), self.method)
        pixels = np.asarray(square)
        return to_image(pixels[:, ::-1] if torch.rand(()) < self.flip_p else pixels)


class _Validation(LSUNBase):
    """Base class of the validation sets, which mirror no image by default."""

    def __init__(self, flip_p: float = 0.0, **params: Any) -> None:
        super().__init__(flip_p=flip_p, **params)


class LSUNChurchesTrain(LSUNBase):
    """Training set of outdoor churches."""

    list_file, folder = "data/lsun/church_outdoor_train.txt", "data/lsun/churches"


class LSUNChurchesValidation(_Validation):
    """Validation set of outdoor churches."""

    list_file, folder = "data/lsun/church_outdoor_val.txt", "data/lsun/churches"


class LSUNBedroomsTrain(LSUNBase):
    """Training set of bedrooms."""

    list_file, folder = "data/lsun/bedrooms_train.txt", "data/lsun/bedrooms"


class LSUNBedroomsValidation(_Validation):
    """Validation set of bedrooms."""

    list_file, folder = "data/lsun/bedrooms_val.txt", "data/lsun/bedrooms"


class LSUNCatsTrain(LSUNBase):
    """Training set of cats."""

    list_file, folder = "data/lsun/cat_train.txt", "data/lsun/cats"


class LSUNCatsValidation(_Validation):
    """Validation set of cats."""

    list_file, folder = "data/lsun/cat_val.txt", "data/lsun/cats"
