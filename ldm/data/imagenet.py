"""ImageNet (ILSVRC 2012): images with classes, and pairs for super-resolution."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch.utils.data import Dataset, Subset

from ldm.compat import published_names
from ldm.config.assets import locate
from ldm.data.image_files import ImageFiles, JoinedPaths, fit_square, images_below, read_list, to_image
from ldm.data.imagenet_files import (
    NAME_FILES,
    SYNSET,
    TRAIN,
    VALIDATION,
    Layout,
    Split,
    find_beside,
    read_index_of_synsets,
    read_label_numbers,
    read_synset_names,
)
from ldm.data.superresolution import SuperResolution
from ldm.errors import UserError, did_you_mean
from ldm.io.folders import log_passed_over
from ldm.io.index_lists import PICKLE_SUFFIXES, read_indices

__getattr__ = published_names(__name__)

logger = logging.getLogger(__name__)

IGNORED = frozenset({"n06596364_9591.JPEG"})  # a file that the published package leaves out
CONFIG_KEYS = ("size", "random_crop", "sub_indices", "keep_orig_class_label", "ignore")
SECTIONS = {TRAIN: "ImageNetTrain", VALIDATION: "ImageNetValidation"}  # keys of `config` for one class, as published
INDEX_SUFFIXES = (*PICKLE_SUFFIXES, ".npy", ".txt")


class ImageNetBase(ImageFiles):
    """Base class of the ImageNet data sets: square images with their class.

    Items: `image` (size, size, 3) float32 in [-1, 1]; `class_label`, the index of the synset in sorted order;
    `human_label`, its name from a `synset_human.txt` beside the synset folders, or the synset itself; `synsets`,
    `relpath`, `file_path_`.

    The images are in folders of synsets, such as n01440764, or in the archives as published, which are unpacked at
    the first use; see `ldm.data.imagenet_files`. A folder that was prepared has a list of its images, `filelist.txt`.

    Args:
        config: the keys
            `size`, side of the image in pixels (default: keep the size of the file);
            `random_crop`, crop at a random position along the longer side, the default in training, or at the centre;
            `sub_indices`, such as "0-9, 17", use only these classes;
            `keep_orig_class_label`, keep the class labels of `sub_indices` instead of counting them from 0;
            `ignore`, names of files to leave out, or a text file with one name a line.
            As published, `ImageNetTrain: {random_crop: false}` applies to that class.
        process_images: read the images; otherwise items have no `image`.
        data_root: a folder of synset folders or archives, or a folder with `ILSVRC2012_train` and
            `ILSVRC2012_validation` (default: `~/.cache/autoencoders/data`, or `autoencoders/data` in
            `$XDG_CACHE_HOME`).

    Attributes:
        relpaths, abspaths, synsets, class_labels, human_labels: lists with one entry for each image.
        synset2idx: the label of each synset.
        root, datadir, txt_filelist: paths of the published layout.
        human_dict, idx2syn, human2integer: paths of the lists of names, of synsets and of labels, which may not exist.
        human2integer_dict: the number of each label.

    Raises:
        UserError: there are no images, an archive is damaged, or a key or value of `config` is invalid.
    """

    split: ClassVar[Split]
    random_crop: bool = False

    def __init__(
        self,
        config: Mapping[str, Any] | None = None,
        process_images: bool = True,
        data_root: str | None = None,
    ) -> None:
        self.config = config = self._checked(config or {})
        self.size = config.get("size") or None
        self.random_crop = config.get("random_crop", self.random_crop)
        self.keep_orig_class_label = config.get("keep_orig_class_label", False)
        self.process_images = process_images
        self.data_root = data_root
        folder, found = self._find(data_root)
        names = [name for name in found if SYNSET.fullmatch(name.partition("/")[0])]
        if not names:
            raise UserError(f'{type(self).__name__}: the synset folders in "{folder}" contain no images')
        log_passed_over(folder, "images of synsets", sorted({*found} - {*names}))
        self._set_paths(folder)
        self._number_synsets(names)
        self.relpaths = self._filter_relpaths(names)
        if not self.relpaths:
            raise UserError(f'{type(self).__name__}: ignore and sub_indices leave no image of "{folder}"')
        self.synsets = [name.partition("/")[0] for name in self.relpaths]
        human_labels = read_synset_names(folder)
        self.class_labels = [self.synset2idx[synset] for synset in self.synsets]
        self.human_labels = [human_labels.get(synset, synset) for synset in self.synsets]
        self._set_label_numbers()
        entries: dict[str, Sequence[Any]] = {
            "relpath": self.relpaths,
            "synsets": self.synsets,
            "class_label": self.class_labels,
            "human_label": self.human_labels,
        }
        super().__init__(JoinedPaths(folder, self.relpaths), entries)

    @property
    def name(self) -> str:
        """Folder of the split."""
        return self.split.name

    @property
    def expected_length(self) -> int:
        """Number of images of the complete split."""
        return self.split.length

    @property
    def abspaths(self) -> list[str]:
        """Paths of the images."""
        return [str(path) for path in self.paths]

    @property
    def data(self) -> ImageNetBase:
        """The items, as published."""
        return self

    def _checked(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the configuration with the entries for this class.

        Raises:
            UserError: a key is unknown.
        """
        name = type(self).__name__
        merged = {key: value for key, value in config.items() if key not in SECTIONS.values()}
        own = config.get(SECTIONS[self.split], {})
        if not isinstance(own, Mapping):
            raise UserError(f"{name}: {SECTIONS[self.split]} in config is not a mapping such as {{random_crop: false}}")
        merged.update(own)
        for key in merged:
            if key not in CONFIG_KEYS:
                raise UserError(f'{name}: config has no "{key}"{did_you_mean(key, CONFIG_KEYS)}')
        return merged

    def _find(self, data_root: str | None) -> tuple[Path, list[str]]:
        """Return the folder that contains the synset folders, and the images in it; archives are unpacked first."""
        if data_root is None:
            cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
            layout = Layout(cache / "autoencoders" / "data" / self.name, self.split)
            candidates = [layout.data]
        else:
            root = locate(Path(data_root).expanduser())
            layout = Layout(root if root.name == self.name else root / self.name, self.split)
            candidates = [layout.data, root / self.name / "data", root / self.name, root]
        layout.prepare()
        names = layout.relpaths()
        if names is not None:
            return layout.data, names
        for folder in candidates:
            if folder.is_dir() and any(SYNSET.fullmatch(path.name) for path in folder.iterdir() if path.is_dir()):
                return folder, images_below(folder)
        where = f'"{candidates[0]}"' if data_root is None else f'"{data_root}"'
        raise UserError(
            f"{type(self).__name__}: there are no synset folders such as n01440764 in {where}; "
            f'unpack ImageNet there, or set data_root, or put {self.split.archive} into "{layout.root}"'
        )

    def _set_paths(self, folder: Path) -> None:
        """Set the published attributes with paths."""
        root = folder.parent if folder.name == "data" else folder
        self.root, self.datadir, self.txt_filelist = str(root), str(folder), str(root / "filelist.txt")
        self.human_dict = str(find_beside(folder, NAME_FILES) or root / NAME_FILES[0])
        self.idx2syn = str(find_beside(folder, ["index_synset.yaml"]) or root / "index_synset.yaml")
        labels = "imagenet1000_clsidx_to_labels.txt"
        self.human2integer = str(find_beside(folder, [labels]) or root / labels)

    def _number_synsets(self, names: Sequence[str]) -> None:
        """Set the label of each synset: its place in the order of names, or its number among the chosen ones.

        The numbers of `sub_indices` are those of `index_synset.yaml` if there is one.
        """
        synsets = sorted({name.partition("/")[0] for name in names})
        numbers = dict(enumerate(synsets))
        if os.path.isfile(self.idx2syn):
            numbers = read_index_of_synsets(self.idx2syn)
        if self.config.get("sub_indices"):
            chosen = parse_indices(self.config["sub_indices"], max(numbers, default=-1) + 1)
            absent = [index for index in chosen if index not in numbers]
            if absent:
                raise UserError(f'"{self.idx2syn}" has no synset for the index {absent[0]} of sub_indices; complete it')
            numbers = {index: numbers[index] for index in chosen}
            synsets = sorted({*synsets} & {*numbers.values()})
        if self.keep_orig_class_label:
            known = {synset: index for index, synset in numbers.items()}
            missing = [synset for synset in synsets if synset not in known]
            if missing:
                raise UserError(f'"{self.idx2syn}" does not list {missing[0]}, the synset of a folder; complete it')
            self.synset2idx = {synset: known[synset] for synset in synsets}
        else:
            self.synset2idx = {synset: index for index, synset in enumerate(synsets)}

    def _filter_relpaths(self, relpaths: Sequence[str]) -> list[str]:
        """Return the images of the chosen synsets, without the files to leave out."""
        ignored = self.config.get("ignore") or ()
        ignored = read_list(ignored, "ignore") if isinstance(ignored, str) else [str(name) for name in ignored]
        without = {*IGNORED, *ignored}
        kept = [name for name in relpaths if name not in without and name.rpartition("/")[2] not in without]
        if len(kept) < len(relpaths):
            logger.info("left out %d of %d images by their names", len(relpaths) - len(kept), len(relpaths))
        return [name for name in kept if name.partition("/")[0] in self.synset2idx]

    def _set_label_numbers(self) -> None:
        """Set the number of each label, from the published file if there is one."""
        path = Path(self.human2integer)
        found = dict(zip(self.human_labels, self.class_labels, strict=True))
        self.human2integer_dict = read_label_numbers(path) if path.is_file() else found

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

    split = TRAIN
    random_crop = True


class ImageNetValidation(_Split):
    """Validation images, sorted into synset folders like the training images."""

    split = VALIDATION


class ImageNetSR(SuperResolution):
    """Super-resolution pairs of ImageNet.

    Args:
        args, params: see `SuperResolution`.
        data_root: see `ImageNetBase`.
        indices: a file with the indices of the images to use, in the order of `filelist.txt`; see
            `ldm.io.index_lists.read_indices`. Without `data_root` and `indices`, the published file, such as
            `data/imagenet_train_hr_indices.p` (or `.npy` or `.txt`), applies if it exists.
    """

    source: ClassVar[type[_Split]]
    index_file: ClassVar[str]

    def __init__(self, *args: Any, data_root: str | None = None, indices: str | None = None, **params: Any) -> None:
        self.data_root, self.indices = data_root, indices
        super().__init__(self.get_base(), *args, **params)

    def get_base(self) -> Dataset:
        """Return the data set of the image files, whose items have their `file_path_`."""
        images = self.source(process_images=False, data_root=self.data_root)
        path = self._index_file()
        if path is None:
            return images
        indices = read_indices(path)
        if len(indices) == 0 or indices.max() >= len(images):
            problem = (
                f"has the index {indices.max()}, but there are {len(images)} images" if len(indices) else "is empty"
            )
            raise UserError(f'{type(self).__name__}: "{path}" {problem}; give the list that belongs to the images')
        logger.info('%s: "%s" selects %d of %d images', type(self).__name__, path, len(indices), len(images))
        return Subset(images, indices.tolist())

    def _index_file(self) -> Path | None:
        """Return the file with the indices to use, or None."""
        if self.indices is not None:
            return locate(Path(self.indices).expanduser())
        if self.data_root is not None:
            return None
        found = (locate(f"{self.index_file}{suffix}") for suffix in INDEX_SUFFIXES)
        return next((path for path in found if path.is_file()), None)


class ImageNetSRTrain(ImageNetSR):
    """Super-resolution pairs of the training images."""

    source = ImageNetTrain
    index_file = "data/imagenet_train_hr_indices"


class ImageNetSRValidation(ImageNetSR):
    """Super-resolution pairs of the validation images."""

    source = ImageNetValidation
    index_file = "data/imagenet_val_hr_indices"


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
