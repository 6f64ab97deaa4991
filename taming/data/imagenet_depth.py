from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import numpy as np
from torch.utils.data import Dataset

from ldm.config.assets import locate
from ldm.data.image_files import existing_folder, read_list, read_pixels, to_image
from ldm.data.imagenet import ImageNetBase
from ldm.errors import UserError
from ldm.io.images import decode_image
from taming.data.imagenet_splits import ImageNetTrain, ImageNetValidation
from taming.data.preprocessing import get_preprocessor, rescale

__all__ = [
    "BaseWithDepth",
    "DRINExamples",
    "ImageNetTrainWithDepth",
    "ImageNetValidationWithDepth",
    "RINTrainWithDepth",
    "RINValidationWithDepth",
    "read_depth",
    "rgba_to_depth",
]

# Animals, the classes of "restricted ImageNet" in the published experiments.
RIN_INDICES = "30-32, 33-37, 151-268, 281-285, 80-100, 365-382, 389-397, 118-121, 300-319"


def rgba_to_depth(x: np.ndarray) -> np.ndarray:
    """Return the depth (H, W) float32 whose bytes are the channels of an image (H, W, 4) uint8."""
    if x.dtype != np.uint8 or x.ndim != 3 or x.shape[2] != 4:
        raise UserError(f"a depth map has four channels of 8 bits, not the shape {x.shape} and dtype {x.dtype}")
    return np.ascontiguousarray(x).view(np.float32)[..., 0]


def read_depth(path: str | Path) -> np.ndarray:
    """Read a depth map, (H, W) float32 from -1 to 1.

    Raises:
        UserError: the file is missing, or is not an image with four channels.
    """
    image = decode_image(path, "depth map", "give a PNG with four channels")
    if image.mode != "RGBA":
        raise UserError(f'the depth map "{path}" has the mode {image.mode}, not RGBA; its pixels are bytes of float32')
    depth = rgba_to_depth(np.asarray(image))
    if not np.isfinite(depth).all():
        raise UserError(f'the depth map "{path}" has values that are not finite; its pixels are bytes of float32')
    return 2.0 * (depth - depth.min()) / max(1e-8, depth.max() - depth.min()) - 1.0


class BaseWithDepth(Dataset):
    """Base class of images of ImageNet with a depth map `depth`, (H, W) float32 from -1 to 1.

    Args:
        config: unused, as published.
        size: side of the squares; the smaller side is resized to it.
        random_crop: crop at a random position, and with `size` mirror half of the time; otherwise at the centre.
        crop_size: side of the squares without resizing, if there is no `size`. Smaller images are enlarged.
        root: folder of the depth maps (default: `data/imagenet_depth`).
    """

    DEFAULT_DEPTH_ROOT = "data/imagenet_depth"
    folder: ClassVar[str]

    def __init__(
        self,
        config: Any = None,
        size: int | None = None,
        random_crop: bool = False,
        crop_size: int | None = None,
        root: str | None = None,
    ) -> None:
        self.config = config
        self.base_dset = self.get_base_dset()
        self.preprocessor = get_preprocessor(size, random_crop, crop_size=crop_size)
        self.crop_size = crop_size
        if root is not None:
            self.DEFAULT_DEPTH_ROOT = root
        existing_folder(self.DEFAULT_DEPTH_ROOT, type(self).__name__)

    def get_base_dset(self) -> ImageNetBase:
        """Return the data set of the images; subclasses define it."""
        raise NotImplementedError

    def get_depth_path(self, e: dict[str, Any]) -> str:
        """Return the path of the depth map of an item."""
        root = locate(Path(self.DEFAULT_DEPTH_ROOT).expanduser())
        return str(root / self.folder / PurePosixPath(e["relpath"]).with_suffix(".png"))

    def preprocess_depth(self, path: str | Path) -> np.ndarray:
        """Return the depth map in a file."""
        return read_depth(path)

    def __len__(self) -> int:
        return len(self.base_dset)

    def __getitem__(self, i: int) -> dict[str, Any]:
        item = dict(self.base_dset[i])
        arrays = {"image": item["image"], "depth": self.preprocess_depth(self.get_depth_path(item))}
        if arrays["depth"].shape != item["image"].shape[:2]:
            path = self.get_depth_path(item)
            raise UserError(f'the depth map "{path}" has another size than "{item["file_path_"]}"; replace it')
        if self.crop_size and min(arrays["depth"].shape) < self.crop_size:
            arrays = {name: rescale(x, self.crop_size) for name, x in arrays.items()}
        return {**item, **self.preprocessor(**arrays)}


class ImageNetTrainWithDepth(BaseWithDepth):
    """Training images with depth maps; `sub_indices` selects classes, see `ImageNetBase`."""

    folder = "train"

    def __init__(self, random_crop: bool = True, sub_indices: str | None = None, **kwargs: Any) -> None:
        self.sub_indices = sub_indices
        super().__init__(random_crop=random_crop, **kwargs)

    def get_base_dset(self) -> ImageNetBase:
        """Return the training images."""
        return ImageNetTrain({"sub_indices": self.sub_indices} if self.sub_indices else None)


class ImageNetValidationWithDepth(BaseWithDepth):
    """Validation images with depth maps; `sub_indices` selects classes, see `ImageNetBase`."""

    folder = "val"

    def __init__(self, sub_indices: str | None = None, **kwargs: Any) -> None:
        self.sub_indices = sub_indices
        super().__init__(**kwargs)

    def get_base_dset(self) -> ImageNetBase:
        """Return the validation images."""
        return ImageNetValidation({"sub_indices": self.sub_indices} if self.sub_indices else None)


class RINTrainWithDepth(ImageNetTrainWithDepth):
    """Training images of animals with depth maps."""

    def __init__(
        self, config: Any = None, size: int | None = None, random_crop: bool = True, crop_size: int | None = None
    ) -> None:
        super().__init__(random_crop, RIN_INDICES, config=config, size=size, crop_size=crop_size)


class RINValidationWithDepth(ImageNetValidationWithDepth):
    """Validation images of animals with depth maps."""

    def __init__(
        self, config: Any = None, size: int | None = None, random_crop: bool = False, crop_size: int | None = None
    ) -> None:
        super().__init__(RIN_INDICES, config=config, size=size, random_crop=random_crop, crop_size=crop_size)


class DRINExamples(Dataset):
    """Published examples of images with depth maps, squares of 256 pixels.

    `data/drin_examples.txt` lists the images in `data/drin_images`; their maps are in `data/drin_depth`.
    """

    def __init__(self) -> None:
        self.preprocessor = get_preprocessor(256)
        images, maps = (existing_folder(f"data/{name}", "DRINExamples") for name in ("drin_images", "drin_depth"))
        names = read_list("data/drin_examples.txt", "DRINExamples")
        self.image_paths = [str(images / name) for name in names]
        self.depth_paths = [str(maps / PurePosixPath(name).with_suffix(".png")) for name in names]

    def preprocess_image(self, image_path: str | Path) -> np.ndarray:
        """Return the square in an image file, (256, 256, 3) float32 in [-1, 1]."""
        return to_image(self.preprocessor(image=read_pixels(Path(image_path)))["image"])

    def preprocess_depth(self, path: str | Path) -> np.ndarray:
        """Return the square in a depth map, (256, 256) float32."""
        return self.preprocessor(depth=read_depth(path))["depth"]

    def __len__(self) -> int:
        return len(self.image_paths)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {
            "image": self.preprocess_image(self.image_paths[i]),
            "depth": self.preprocess_depth(self.depth_paths[i]),
        }
