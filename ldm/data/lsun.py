"""LSUN (arXiv:1506.03365): bedrooms, churches and cats, read from folders of images or from the databases of LMDB."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image

from ldm.config.assets import locate
from ldm.data.image_files import ImageFiles, JoinedPaths, ListedImages, crop_square, pil_method, read_list, to_image
from ldm.data.unreadable import shown_names
from ldm.errors import UserError
from ldm.io.images import open_image
from ldm.io.lmdb_reader import LmdbReader, is_database

logger = logging.getLogger(__name__)


class LSUNBase(ListedImages):
    """Base class of the LSUN data sets: the central square of each image, resized and randomly mirrored.

    Items: `image` (size, size, 3) float32 in [-1, 1], `relative_file_path_` and `file_path_`.

    The images are files, or values in a database as LSUN is distributed, such as `bedroom_train_lmdb`. A database is
    used if `data_root` is one, or has one with the published name in it; and without `data_root`, if the published
    folder does not exist and the database is beside it, e.g. `data/lsun/bedroom_train_lmdb`. The name of a file in
    `txt_file`, without its suffix, is the key of an image. Without a list, all images of the database are used.

    Args:
        txt_file, data_root: see `ListedImages`.
        size: side of the image in pixels (default: the smaller side of the file).
        interpolation: name of a resampling filter of Pillow.
        flip_p: probability of mirroring an image, from PyTorch's global generator.

    Raises:
        UserError: the images are missing, or the interpolation is unknown.
    """

    databases: ClassVar[tuple[str, ...]] = ()  # published names
    listed_databases: ClassVar[tuple[str, ...]] = ()  # those of other splits, in which the images of a list may be
    is_one_database: ClassVar[bool] = False  # one for training and validation
    database: LmdbReader | None = None

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
        listed = txt_file
        if data_root is None and txt_file is None and self.list_file is not None and locate(self.list_file).is_file():
            listed = self.list_file
        databases = self._find_databases(data_root, has_list=listed is not None)
        if not databases:
            super().__init__(txt_file, data_root)
        elif listed is None:
            if self.is_one_database:
                logger.warning(
                    '%s: "%s" has no split; without txt_file, training and validation use the same images',
                    *(type(self).__name__, databases[0]),
                )
            self.database = LmdbReader(databases[0])
            self._use_keys(self.database.keys(), None)
        else:
            self._open_listed(databases, listed)

    def _find_databases(self, data_root: str | None, has_list: bool) -> list[Path]:
        """Return the folders of the databases that may be used, in order of preference; empty to read image files."""
        root = data_root or self.folder
        if root is None:
            return []
        folder = locate(Path(root).expanduser())
        names = self.databases + (self.listed_databases if has_list else ())
        places = [folder, *(folder / name for name in names)]
        if data_root is None and not folder.is_dir():
            places += [locate(Path(root).parent / name) for name in names]
        return [path for path in places if is_database(path)]

    def _open_listed(self, databases: Sequence[Path], listed: str) -> None:
        """Use the images of a list, from the first database that contains any of them.

        Raises:
            UserError: the list or a database cannot be read, or too many images are missing.
        """
        lines = np.array(read_list(listed, type(self).__name__), dtype=str)
        wanted = np.array([PurePosixPath(line).stem.encode() for line in lines.tolist()], dtype=bytes)
        for path in databases:
            self.database = LmdbReader(path)
            found = np.isin(wanted, self.database.keys())
            if found.any():
                break
        self._check_listed(listed, lines, found)
        self._use_keys(wanted[found], lines[found].tolist())

    def _use_keys(self, keys: np.ndarray, names: Sequence[str] | None) -> None:
        """Use the images with these keys in the database.

        Raises:
            UserError: there are none.
        """
        if self.database is None or len(keys) == 0:
            path = "" if self.database is None else self.database.path
            raise UserError(f'{type(self).__name__}: the database "{path}" contains no image; check data_root')
        texts = _Texts(keys)
        labels = {"relative_file_path_": texts if names is None else names}
        ImageFiles.__init__(self, JoinedPaths(self.database.path, texts), labels)
        self.keys_in_database = keys
        self.unreadable.is_checked = True  # a database is complete, or cannot be opened

    def _check_listed(self, listed: str, lines: np.ndarray, found: np.ndarray) -> None:
        """Log the images of a list that the database lacks.

        Raises:
            UserError: their share is larger than `max_unreadable`.
        """
        missing = lines[~found].tolist()
        if not missing:
            return
        problem = f'{len(missing)} of {len(lines)} images of "{listed}" are not in the database'
        if len(missing) > (self.max_unreadable or 0.0) * len(lines):
            raise UserError(
                f'{type(self).__name__}: {problem} "{self.database.path if self.database else ""}" '
                f"({shown_names(missing)}); choose another list, or set data_root alone to use all its images"
            )
        logger.warning("%s: %s: %s", type(self).__name__, problem, shown_names(missing))

    def read(self, index: int) -> np.ndarray:
        """Read the pixels (H, W, 3) uint8 of an item.

        Raises:
            UserError: the file is missing or is not an image.
        """
        if self.database is None:
            return super().read(index)
        data = self.database.get(bytes(self.keys_in_database[index]))
        if data is None:
            raise UserError(f'there is no image "{self.paths[index]}"; check the database')
        return np.asarray(open_image(self.paths[index], data=data))

    def image(self, pixels: np.ndarray) -> np.ndarray:
        """Return the central square, resized, and mirrored with probability `flip_p`."""
        square = Image.fromarray(crop_square(pixels, min(pixels.shape[:2])))
        if self.size is not None:
            square = square.resize((self.size, self.size), self.method)
        pixels = np.asarray(square)
        return to_image(pixels[:, ::-1] if torch.rand(()) < self.flip_p else pixels)


class _Texts(Sequence[str]):
    """Keys of a database as texts; a database has millions of them."""

    def __init__(self, keys: np.ndarray) -> None:
        self.keys = keys

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: Any) -> Any:
        return self.keys[index].decode(errors="backslashreplace")


class _Validation(LSUNBase):
    """Base class of the validation sets, which mirror no image by default."""

    def __init__(self, flip_p: float = 0.0, **params: Any) -> None:
        super().__init__(flip_p=flip_p, **params)


class LSUNChurchesTrain(LSUNBase):
    """Training set of outdoor churches."""

    list_file, folder = "data/lsun/church_outdoor_train.txt", "data/lsun/churches"
    databases = ("church_outdoor_train_lmdb",)


class LSUNChurchesValidation(_Validation):
    """Validation set of outdoor churches."""

    list_file, folder = "data/lsun/church_outdoor_val.txt", "data/lsun/churches"
    databases, listed_databases = ("church_outdoor_val_lmdb",), ("church_outdoor_train_lmdb",)


class LSUNBedroomsTrain(LSUNBase):
    """Training set of bedrooms."""

    list_file, folder = "data/lsun/bedrooms_train.txt", "data/lsun/bedrooms"
    databases = ("bedroom_train_lmdb",)


class LSUNBedroomsValidation(_Validation):
    """Validation set of bedrooms."""

    list_file, folder = "data/lsun/bedrooms_val.txt", "data/lsun/bedrooms"
    databases, listed_databases = ("bedroom_val_lmdb",), ("bedroom_train_lmdb",)


class LSUNCatsTrain(LSUNBase):
    """Training set of cats."""

    list_file, folder = "data/lsun/cat_train.txt", "data/lsun/cats"
    databases, is_one_database = ("cat", "cat_lmdb"), True


class LSUNCatsValidation(_Validation):
    """Validation set of cats."""

    list_file, folder = "data/lsun/cat_val.txt", "data/lsun/cats"
    databases, is_one_database = ("cat", "cat_lmdb"), True
