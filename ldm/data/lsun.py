"""LSUN (arXiv:1506.03365): bedrooms, churches and cats, from folders of pictures and the published lists."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from ldm.data.image_files import ListedPictures, crop_square, pil_method, to_image


class LSUNBase(ListedPictures):
    """Square pictures: the middle of each, resized, mirrored at random.

    Items: `image` (size, size, 3) float32 in [-1, 1], `relative_file_path_` and `file_path_`.

    Args:
        txt_file, data_root: see `ListedPictures`.
        size: side in pixels; by default that of the original's smaller side.
        interpolation: one of Pillow's methods.
        flip_p: how often a picture is mirrored, drawn from torch's global generator.

    Raises:
        UserError: the pictures are not there, or there is no such interpolation.
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
        """The middle square, resized; mirrored with probability `flip_p`."""
        square = Image.fromarray(crop_square(pixels, min(pixels.shape[:2])))
        if self.size is not None:
            square = square.resize((self.size, self.size), self.method)
        pixels = np.asarray(square)
        return to_image(pixels[:, ::-1] if torch.rand(()) < self.flip_p else pixels)


class _Validation(LSUNBase):
    def __init__(
        self,
        txt_file: str | None = None,
        data_root: str | None = None,
        size: int | None = None,
        interpolation: str = "bicubic",
        flip_p: float = 0.0,
    ) -> None:
        super().__init__(txt_file, data_root, size, interpolation, flip_p)


class LSUNChurchesTrain(LSUNBase):
    """Churches from outside."""

    list_file, folder = "data/lsun/church_outdoor_train.txt", "data/lsun/churches"


class LSUNChurchesValidation(_Validation):
    """Churches from outside; never mirrored unless asked."""

    list_file, folder = "data/lsun/church_outdoor_val.txt", "data/lsun/churches"


class LSUNBedroomsTrain(LSUNBase):
    """Bedrooms."""

    list_file, folder = "data/lsun/bedrooms_train.txt", "data/lsun/bedrooms"


class LSUNBedroomsValidation(_Validation):
    """Bedrooms; never mirrored unless asked."""

    list_file, folder = "data/lsun/bedrooms_val.txt", "data/lsun/bedrooms"


class LSUNCatsTrain(LSUNBase):
    """Cats."""

    list_file, folder = "data/lsun/cat_train.txt", "data/lsun/cats"


class LSUNCatsValidation(_Validation):
    """Cats; never mirrored unless asked."""

    list_file, folder = "data/lsun/cat_val.txt", "data/lsun/cats"
