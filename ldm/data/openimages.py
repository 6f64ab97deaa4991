"""OpenImages (arXiv:1811.00982) from folders of pictures: crops for first stages, and pairs for super-resolution."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from ldm.data.absent import AbsentDataset
from ldm.data.image_files import ListedPictures, crop_square, resize_smaller_side, to_image
from ldm.data.superresolution import SuperResolution


class FullOpenImagesBase(ListedPictures):
    """Squares cut from pictures.

    Items: `image` (S, S, 3) float32 in [-1, 1], `relative_file_path_` and `file_path_`.

    Args:
        size: the smaller side is resized to it first; by default pictures stay as they are.
        crop_size: S; by default `size`, or the smaller side. Pictures that are smaller are enlarged.
        txt_file, data_root: see `ListedPictures`; any folder of pictures will do.

    Raises:
        UserError: the pictures are not there.
    """

    crops_at_random: ClassVar[bool] = False

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
        """A square of the picture, from anywhere in training."""
        if self.size is not None:
            pixels = resize_smaller_side(pixels, self.size, "area")
        side = self.crop_size or min(pixels.shape[:2])
        if min(pixels.shape[:2]) < side:
            pixels = resize_smaller_side(pixels, side)
        return to_image(crop_square(pixels, side, self.crops_at_random))


class FullOpenImagesTrain(FullOpenImagesBase):
    """The training pictures, cut anywhere."""

    folder = "data/openimages/train"
    crops_at_random = True


class FullOpenImagesValidation(FullOpenImagesBase):
    """The validation pictures, cut from the middle."""

    folder = "data/openimages/validation"


class SuperresOpenImagesAdvanced(SuperResolution):
    """Pairs of `image` and `LR_image`; see `SuperResolution`, and `ListedPictures` for the last two arguments."""

    source: ClassVar[type[FullOpenImagesBase]]

    def __init__(
        self,
        size: int | None = None,
        degradation: str | None = None,
        downscale_f: int = 4,
        min_crop_f: float = 0.5,
        max_crop_f: float = 1.0,
        random_crop: bool = True,
        txt_file: str | None = None,
        data_root: str | None = None,
    ) -> None:
        pictures = self.source(txt_file=txt_file, data_root=data_root)
        super().__init__(pictures, size, degradation, downscale_f, min_crop_f, max_crop_f, random_crop)


class SuperresOpenImagesAdvancedTrain(SuperresOpenImagesAdvanced):
    """Pairs made of the training pictures."""

    source = FullOpenImagesTrain


class SuperresOpenImagesAdvancedValidation(SuperresOpenImagesAdvanced):
    """Pairs made of the validation pictures."""

    source = FullOpenImagesValidation


class OpenImagesBBoxTrain(AbsentDataset):
    """Pictures with the tokens of their boxes, for layout-to-image models."""

    served = 'OpenImages pictures under "image" and tokens of their boxes under "coordinates_bbox"'
    instead = "set target to a data set of your own with these entries"


class OpenImagesBBoxValidation(OpenImagesBBoxTrain):
    """The same for validation."""
