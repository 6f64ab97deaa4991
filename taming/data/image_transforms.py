import random
from typing import Any

import numpy as np
import torch
from PIL.Image import Image as PILImage
from PIL.Image import Transpose
from torch import Tensor, nn

from taming.data.helper_types import BoundingBox, Image

__all__ = [
    "CenterCropReturnCoordinates",
    "Random2dCropReturnCoordinates",
    "RandomCrop1dReturnCoordinates",
    "RandomHorizontalFlipReturn",
    "convert_pil_to_tensor",
    "pil_to_tensor",
]


def pil_to_tensor(image: PILImage) -> Tensor:
    """Convert an image to a tensor (C, H, W) uint8."""
    pixels = np.array(image)
    return torch.from_numpy(pixels[..., None] if pixels.ndim == 2 else pixels).movedim(-1, 0)


convert_pil_to_tensor = pil_to_tensor


def _size(image: Image) -> tuple[int, int]:
    """Return the width and height of an image or a tensor (..., H, W)."""
    return (image.shape[-1], image.shape[-2]) if isinstance(image, Tensor) else image.size


def _crop(image: Any, top: int, left: int, height: int, width: int) -> tuple[BoundingBox, Any]:
    """Return the box of a part of an image, as fractions, and the part."""
    whole_width, whole_height = _size(image)
    box = left / whole_width, top / whole_height, width / whole_width, height / whole_height
    if isinstance(image, Tensor):
        return box, image[..., top : top + height, left : left + width]
    return box, image.crop((left, top, left + width, top + height))


def _as_pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """Return a size as (height, width)."""
    return (size, size) if isinstance(size, int) else (size[0], size[-1])


class RandomCrop1dReturnCoordinates(nn.Module):
    """Crop of a fixed size at a random position; returns the box of the crop, and the crop.

    Args:
        size: side of a square, or (height, width), in pixels.

    Raises:
        ValueError: when it is called with a smaller image.
    """

    def __init__(self, size: int | tuple[int, int]) -> None:
        super().__init__()
        self.size = _as_pair(size)

    def forward(self, img: Image) -> tuple[BoundingBox, Image]:
        """Return the box (left, top, width, height) of the crop, as fractions of the image, and the crop."""
        height, width = self.size
        whole_width, whole_height = _size(img)
        if height > whole_height or width > whole_width:
            raise ValueError(f"an image of {whole_width} × {whole_height} pixels has no crop of {width} × {height}")
        top = int(torch.randint(whole_height - height + 1, ()))
        left = int(torch.randint(whole_width - width + 1, ()))
        return _crop(img, top, left, height, width)


class Random2dCropReturnCoordinates(nn.Module):
    """Crop of a square of random size and position; returns the box of the crop, and the crop.

    Args:
        min_size: smallest side in pixels; a smaller image is cropped to its smaller side.
    """

    def __init__(self, min_size: int) -> None:
        super().__init__()
        self.min_size = min_size

    def forward(self, img: Image) -> tuple[BoundingBox, Image]:
        """Return the box (left, top, width, height) of the crop, as fractions of the image, and the crop."""
        width, height = _size(img)
        largest = min(width, height)
        side = largest if largest <= self.min_size else random.randint(self.min_size, largest)
        top, left = random.randint(0, height - side), random.randint(0, width - side)
        return _crop(img, top, left, side, side)


class CenterCropReturnCoordinates(nn.Module):
    """Crop at the centre; returns the box of the largest central square, and the crop.

    Args:
        size: side of a square, or (height, width), in pixels; the smaller side of images should be as large.
    """

    def __init__(self, size: int | tuple[int, int]) -> None:
        super().__init__()
        self.size = _as_pair(size)

    @staticmethod
    def get_bbox_of_center_crop(width: int, height: int) -> BoundingBox:
        """Return the box of the largest central square, as fractions of the image."""
        side = min(width, height)
        return 0.5 - side / width / 2, 0.5 - side / height / 2, side / width, side / height

    def forward(self, img: Image) -> tuple[BoundingBox, Image]:
        """Return the box of the largest central square, and the crop."""
        width, height = _size(img)
        rows, columns = self.size
        top, left = round((height - rows) / 2), round((width - columns) / 2)
        return self.get_bbox_of_center_crop(width, height), _crop(img, top, left, rows, columns)[1]


class RandomHorizontalFlipReturn(nn.Module):
    """Random mirroring from left to right; returns whether the image is mirrored, and the image.

    Args:
        p: probability of mirroring.
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.p = p

    def forward(self, img: Image) -> tuple[bool, Image]:
        """Return whether the image is mirrored, and the image."""
        if not torch.rand(1) < self.p:
            return False, img
        return True, (img.flip(-1) if isinstance(img, Tensor) else img.transpose(Transpose.FLIP_LEFT_RIGHT))
