"""Faces: CelebA-HQ (arXiv:1710.10196) and FFHQ (arXiv:1812.04948), from folders of pictures or arrays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ldm.data.image_files import ListedPictures, fit_square, to_image


class FacesBase(ListedPictures):
    """Square pictures of faces.

    Items: `image` (size, size, 3) float32 in [-1, 1], `relative_file_path_` and `file_path_`.

    Args:
        size: side in pixels.
        keys: only these entries of the items.
        txt_file, data_root: see `ListedPictures`.

    Raises:
        UserError: the pictures are not there.
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
        """The middle square, resized."""
        return to_image(fit_square(pixels, self.size))


class CelebAHQTrain(FacesBase):
    """CelebA-HQ's training faces, published as arrays `imgHQ00000.npy`; pictures work too."""

    list_file, folder = "data/celebahqtrain.txt", "data/celebahq"


class CelebAHQValidation(FacesBase):
    """CelebA-HQ's validation faces."""

    list_file, folder = "data/celebahqvalidation.txt", "data/celebahq"


class FFHQTrain(FacesBase):
    """FFHQ's training faces."""

    list_file, folder = "data/ffhqtrain.txt", "data/ffhq"


class FFHQValidation(FacesBase):
    """FFHQ's validation faces."""

    list_file, folder = "data/ffhqvalidation.txt", "data/ffhq"
