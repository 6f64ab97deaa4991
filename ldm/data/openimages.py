"""OpenImages (arXiv:1811.00982), read from folders: crops for first stages, and pairs for super-resolution."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from ldm.data.absent import AbsentDataset
from ldm.data.image_files import ListedImages, crop_square, resize_smaller_side, to_image
from ldm.data.superresolution import SuperResolution


class FullOpenImagesBase(ListedImages):
    """Base class of the OpenImages data sets: square crops of the images.

    Items: `image` (S, S, 3) float32 in [-1, 1], `relative_file_path_` and `file_path_`.

    Args:
        size: resize the smaller side to this many pixels first (default: keep the size of the file).
        crop_size: S (default: `size`, or the smaller side). Smaller images are enlarged.
        txt_file, data_root: see `ListedImages`; any folder of images works.

    Raises:
        UserError: the images are missing.
    """

    random_crop: bool = False

    def __init__(
        self,
        size: int | None = None,
        crop_size: int | None = None,
        txt_file: str | None = None,
        data_root: str | None = None,
    ) -> None:
        self.size = size
        self.crop_size = crop_size
        super().__init__(txt_file, data_root)

    def image(self, pixels: np.ndarray) -> np.ndarray:
        """Return a square crop, at a random position in training."""
        if self.size is not None:
            pixels = resize_smaller_side(pixels, self.size, "area")
        side = self.crop_size or min(pixels.shape[:2])
        if min(pixels.shape[:2]) < side:
            pixels = resize_smaller_side(pixels, side)
        return to_image(crop_square(pixels, side, self.random_crop))


class FullOpenImagesTrain(FullOpenImagesBase):
    """Training images, cropped at random positions."""

    folder = "data/openimages/train"
    random_crop = True


class FullOpenImagesValidation(FullOpenImagesBase):
    """Validation images, cropped at the centre."""

    folder = "data/openimages/validation"


class SuperresOpenImagesAdvanced(SuperResolution):
    """Super-resolution pairs of OpenImages.

    Args:
        args, params: see `SuperResolution`.
        txt_file, data_root: see `ListedImages`.
    """

    source: ClassVar[type[FullOpenImagesBase]]

    def __init__(self, *args: Any, txt_file: str | None = None, data_root: str | None = None, **params: Any) -> None:
        super().__init__(self.source(txt_file=txt_file, data_root=data_root), *args, **params)


class SuperresOpenImagesAdvancedTrain(SuperresOpenImagesAdvanced):
    """Super-resolution pairs of the training images."""

    source = FullOpenImagesTrain


class SuperresOpenImagesAdvancedValidation(SuperresOpenImagesAdvanced):
    """Super-resolution pairs of the validation images."""

    source = FullOpenImagesValidation


class OpenImagesBBoxTrain(AbsentDataset):
    """Images with tokens of bounding boxes for layout-to-image models, for training."""

    provided = 'OpenImages images under "image" and tokens of their boxes under "coordinates_bbox"'
    instead = "set target to a data set of your own with these entries"


class OpenImagesBBoxValidation(OpenImagesBBoxTrain):
    """Images with tokens of bounding boxes for layout-to-image models, for validation."""
