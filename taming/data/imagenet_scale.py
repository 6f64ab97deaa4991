from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ldm.data.image_files import pil_method
from ldm.data.imagenet import ImageNetBase
from ldm.modules.image_degradation.ops import to_pixels
from taming.data.imagenet_splits import ImageNetTrain, ImageNetValidation
from taming.data.preprocessing import Preprocessor, imscale, rescale

__all__ = [
    "ImageNetEdges",
    "ImageNetEdgesTrain",
    "ImageNetEdgesValidation",
    "ImageNetScale",
    "ImageNetScaleTrain",
    "ImageNetScaleValidation",
]

EDGE_THRESHOLDS = (12.75, 25.5)  # 0.1 and 0.2 for images in [-1, 1], as by default in scikit-image


class ImageNetScale(Dataset):
    """Images of ImageNet with a version of lower resolution as `lr`, which has the size of `image`.

    Args:
        size: resize the smaller side to this many pixels; None keeps the size.
        crop_size: side of a square crop (default: `size`). Smaller images are enlarged.
        random_crop: crop at a random position; otherwise at the centre.
        up_factor: factor by which the resolution of `lr` is lower; None returns no `lr`.
        hr_factor: reduce the images by this factor first.
        keep_mode: filter that enlarges `lr` to the size of `image`: "nearest", "bilinear" or "bicubic".
    """

    def __init__(
        self,
        size: int | None = None,
        crop_size: int | None = None,
        random_crop: bool = False,
        up_factor: int | None = None,
        hr_factor: int | None = None,
        keep_mode: str = "bicubic",
    ) -> None:
        pil_method(keep_mode)
        self.base = self.get_base()
        self.size, self.random_crop = size, random_crop
        self.crop_size = size if crop_size is None else crop_size
        self.up_factor, self.hr_factor, self.keep_mode = up_factor, hr_factor, keep_mode
        self.preprocessor = Preprocessor(self.size, self.crop_size, random_crop)

    def get_base(self) -> ImageNetBase:
        """Return the data set of the images; subclasses define it."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, i: int) -> dict[str, Any]:
        example = dict(self.base[i])
        image = self._enlarged(imscale(example["image"], self.hr_factor))
        arrays = {"image": image}
        if self.up_factor is not None:
            arrays["lr"] = self.condition(image)
        return {**example, **self.preprocessor(**arrays)}

    def condition(self, image: np.ndarray) -> np.ndarray:
        """Return `lr` for an image (H, W, 3)."""
        return imscale(image, self.up_factor, keepshapes=True, keepmode=self.keep_mode)

    def _enlarged(self, image: np.ndarray) -> np.ndarray:
        """Return an image whose sides are at least `crop_size`."""
        small = self.crop_size is not None and min(image.shape[:2]) < self.crop_size
        return rescale(image, self.crop_size) if small and self.crop_size else image


class ImageNetScaleTrain(ImageNetScale):
    """Training images with a version of lower resolution."""

    def __init__(self, random_crop: bool = True, **kwargs: Any) -> None:
        super().__init__(random_crop=random_crop, **kwargs)

    def get_base(self) -> ImageNetBase:
        """Return the training images."""
        return ImageNetTrain()


class ImageNetScaleValidation(ImageNetScale):
    """Validation images with a version of lower resolution."""

    def get_base(self) -> ImageNetBase:
        """Return the validation images."""
        return ImageNetValidation()


class ImageNetEdges(ImageNetScale):
    """Images of ImageNet with their edges as `lr`, (H, W, 3) float32 of 0 and 1.

    The edges are those of Canny, after a Gaussian blur with a deviation of 2 pixels.

    Args:
        up_factor: unused, as published.
        kwargs: see `ImageNetScale`.
    """

    def __init__(self, up_factor: int = 1, **kwargs: Any) -> None:
        super().__init__(up_factor=1, **kwargs)

    def condition(self, image: np.ndarray) -> np.ndarray:
        """Return the edges of an image (H, W, 3)."""
        import cv2

        grey = cv2.cvtColor(to_pixels((image + 1.0) / 2.0), cv2.COLOR_RGB2GRAY)
        edges = cv2.Canny(cv2.GaussianBlur(grey, (0, 0), 2.0), *EDGE_THRESHOLDS, L2gradient=True)
        return np.repeat((edges > 0).astype(np.float32)[:, :, None], 3, axis=2)


class ImageNetEdgesTrain(ImageNetEdges):
    """Training images with their edges."""

    def __init__(self, random_crop: bool = True, **kwargs: Any) -> None:
        super().__init__(random_crop=random_crop, **kwargs)

    def get_base(self) -> ImageNetBase:
        """Return the training images."""
        return ImageNetTrain()


class ImageNetEdgesValidation(ImageNetEdges):
    """Validation images with their edges."""

    def get_base(self) -> ImageNetBase:
        """Return the validation images."""
        return ImageNetValidation()
