from collections.abc import Sized
from typing import Any, cast

from torch.utils.data import Dataset

from ldm.data.image_files import read_list
from taming.data.base import ConcatDatasetWithIndex, ImagePaths, NumpyPaths

__all__ = ["ConcatDatasetWithIndex", "CustomBase", "CustomTest", "CustomTrain", "ImagePaths", "NumpyPaths"]


class CustomBase(Dataset):
    """Base class of data sets of the images that a text file lists, with the published parameters."""

    data: Dataset

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __len__(self) -> int:
        return len(cast(Sized, self.data))

    def __getitem__(self, i: int) -> Any:
        return self.data[i]


class CustomTrain(CustomBase):
    """Square images of `size` pixels; `training_images_list_file` has one path a line."""

    def __init__(self, size: int, training_images_list_file: str) -> None:
        super().__init__()
        self.data = ImagePaths(read_list(training_images_list_file, "CustomTrain"), size)


class CustomTest(CustomBase):
    """Square images of `size` pixels; `test_images_list_file` has one path a line."""

    def __init__(self, size: int, test_images_list_file: str) -> None:
        super().__init__()
        self.data = ImagePaths(read_list(test_images_list_file, "CustomTest"), size)
