"""Face data sets CelebA-HQ (arXiv:1710.10196) and FFHQ (arXiv:1812.04948), read from folders of images or arrays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ldm.data.image_files import ListedImages, fit_square, to_image


class FacesBase(ListedImages):
    """Base class of the face data sets: square images.

    Items: `image` (size, size, 3) float32 in [-1, 1], `relative_file_path_` and `file_path_`.

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
