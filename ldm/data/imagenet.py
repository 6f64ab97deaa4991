"""ImageNet (ILSVRC 2012), read from synset folders: images with classes, and pairs for super-resolution."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import yaml

from ldm.compat import published_names
from ldm.config.assets import locate
from ldm.data.image_files import ImageFiles, fit_square, images_below, to_image
from ldm.data.superresolution import SuperResolution
from ldm.errors import UserError, did_you_mean
from ldm.io.folders import log_passed_over
from ldm.io.text import read_lines

__getattr__ = published_names(__name__)

SYNSET = re.compile(r"n\d{8}")
# Files with lines such as "n01440764 tench, Tinca tinca": the published name and Kaggle's name.
NAME_FILES = ("synset_human.txt", "LOC_synset_mapping.txt")
CONFIG_KEYS = ("size", "random_crop", "sub_indices", "keep_orig_class_label")


class ImageNetBase(ImageFiles):
    """Base class of the ImageNet data sets: square images with their class.

    Items: `image` (size, size, 3) float32 in [-1, 1]; `class_label`, the index of the synset in sorted order;
    `human_label`, its name from a `synset_human.txt` beside the synset folders, or the synset itself; `synsets`,
    `relpath`, `file_path_`.

    Args:
        config: the keys
            `size`, side of the image in pixels (default: keep the size of the file);
            `random_crop`, crop at a random position along the longer side, the default in training, or at the centre;
            `sub_indices`, such as "0-9, 17", use only these classes;
            `keep_orig_class_label`, keep the class labels of `sub_indices` instead of counting them from 0.
        process_images: read the images; otherwise items have no `image`.
        data_root: a folder of synset folders, or a folder with `ILSVRC2012_train` and `ILSVRC2012_validation`
            (default: `~/.cache/autoencoders/data`, or `autoencoders/data` in `$XDG_CACHE_HOME`).

    Raises:
        UserError: there are no images, or a key or value of `config` is invalid.
    """

    name: ClassVar[str]
    random_crop: bool = False

    def __init__(
        self,
        config: Mapping[str, Any] | None = None,
        process_images: bool = True,
        data_root: str | None = None,
    ) -> None:
        config = dict(config or {})
        for key in config:
            if key not in CONFIG_KEYS:
                raise UserError(f'{type(self).__name__}: config has no "{key}"{did_you_mean(key, CONFIG_KEYS)}')
        self.config = config
        self.size = config.get("size") or None
        self.random_crop = config.get("random_crop", self.random_crop)
        self.process_images = process_images
        folder = self._folder(data_root)
        found = images_below(folder)
        names = [name for name in found if SYNSET.fullmatch(name.partition("/")[0])]
        if not names:
            raise UserError(f'{type(self).__name__}: the synset folders in "{folder}" contain no images')
        log_passed_over(folder, "images of synsets", sorted({*found} - {*names}))
        synsets = sorted({name.partition("/")[0] for name in names})
        labels = {synset: index for index, synset in enumerate(synsets)}
        if config.get("sub_indices"):
            labels = {synsets[index]: index for index in parse_indices(config["sub_indices"], len(synsets))}
            if not config.get("keep_orig_class_label", False):
                labels = {synset: index for index, synset in enumerate(labels)}
            names = [name for name in names if name.partition("/")[0] in labels]
        human_labels = read_synset_names(folder)
        synset_of_image = [name.partition("/")[0] for name in names]
        self.synset2idx = labels
        self.relpaths, self.synsets = names, synset_of_image
        self.class_labels = [labels[synset] for synset in synset_of_image]
        self.human_labels = [human_labels.get(synset, synset) for synset in synset_of_image]
        self.abspaths = [str(folder / name) for name in names]
        entries: dict[str, Sequence[Any]] = {
            "relpath": self.relpaths,
            "synsets": self.synsets,
            "class_label": self.class_labels,
            "human_label": self.human_labels,
        }
        super().__init__([folder / name for name in names], entries)

    def _folder(self, data_root: str | None) -> Path:
        """Return the folder that contains the synset folders."""
        if data_root is None:
            cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
            candidates = [cache / "autoencoders" / "data" / self.name / "data"]
        else:
            root = locate(Path(data_root).expanduser())
            candidates = [root / self.name / "data", root / self.name, root]
        for folder in candidates:
            if folder.is_dir() and any(SYNSET.fullmatch(path.name) for path in folder.iterdir()):
                return folder
        where = f'"{candidates[0]}"' if data_root is None else f'"{data_root}"'
        raise UserError(
            f"{type(self).__name__}: there are no synset folders such as n01440764 in {where}; "
            "unpack ImageNet there, or set data_root"
        )

    def image(self, pixels: np.ndarray) -> np.ndarray:
        """Return a square crop, resized to `size`."""
        return to_image(pixels if self.size is None else fit_square(pixels, self.size, self.random_crop))

    def __getitem__(self, index: int) -> dict[str, Any]:
        return super().__getitem__(index) if self.process_images else self.entries(index)


class _Split(ImageNetBase):
    """Base class of the splits, whose parameters have the published order."""

    def __init__(
        self,
        process_images: bool = True,
        data_root: str | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(config, process_images, data_root)


class ImageNetTrain(_Split):
    """Training images."""

    name = "ILSVRC2012_train"
    random_crop = True


class ImageNetValidation(_Split):
    """Validation images, sorted into synset folders like the training images."""

    name = "ILSVRC2012_validation"


class ImageNetSR(SuperResolution):
    """Super-resolution pairs of ImageNet.

    Args:
        args, params: see `SuperResolution`.
        data_root: see `ImageNetBase`.
    """

    source: ClassVar[type[_Split]]

    def __init__(self, *args: Any, data_root: str | None = None, **params: Any) -> None:
        self.data_root = data_root
        super().__init__(self.get_base(), *args, **params)

    def get_base(self) -> Any:
        """Return the data set of the image files, whose items have their `file_path_`."""
        return self.source(process_images=False, data_root=self.data_root)


class ImageNetSRTrain(ImageNetSR):
    """Super-resolution pairs of the training images."""

    source = ImageNetTrain


class ImageNetSRValidation(ImageNetSR):
    """Super-resolution pairs of the validation images."""

    source = ImageNetValidation


def parse_indices(text: str, count: int) -> list[int]:
    """Parse indices below `count`, such as `"0-2, 7"`, which becomes [0, 1, 2, 7].

    Raises:
        UserError: the text is not a list of such indices and ranges.
    """
    indices: set[int] = set()
    for part in str(text).split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        if match is None or int(match[2] or match[1]) >= count:
            raise UserError(f'sub_indices "{text}" must be indices and ranges below {count}, such as "0-9, 17"')
        indices.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return sorted(indices)


def synset2idx(path_to_yaml: str = "data/index_synset.yaml") -> dict[str, int]:
    """Return the index of each synset, from a YAML file with lines such as `0: n01440764`.

    Raises:
        UserError: the file is missing, or is not such a list.
    """
    return {synset: index for index, synset in read_index_of_synsets(path_to_yaml).items()}


def read_index_of_synsets(path: str | Path) -> dict[int, str]:
    """Read a YAML file with the synset of each index.

    Raises:
        UserError: the file is missing, or is not such a list.
    """
    file = locate(path)
    if not file.is_file():
        raise UserError(f'there is no file "{path}" with the synset of each index; put it there')
    try:
        synsets = yaml.safe_load("\n".join(read_lines(file, "list of synsets")))
    except yaml.YAMLError:
        synsets = None
    if not isinstance(synsets, dict):
        raise UserError(f'"{path}" does not list synsets; it needs lines such as "0: n01440764"')
    return {int(index): str(synset) for index, synset in synsets.items()}


def read_synset_names(folder: Path) -> dict[str, str]:
    """Read the names of the synsets from a file in `folder` or up to two folders above; empty without a file."""
    for parent in (folder, folder.parent, folder.parent.parent):
        for name in NAME_FILES:
            if (parent / name).is_file():
                lines = read_lines(parent / name, "list of synset names")
                return dict(line.split(maxsplit=1) for line in lines if " " in line.strip())
    return {}
