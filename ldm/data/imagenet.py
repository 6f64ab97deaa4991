"""ImageNet (ILSVRC 2012) from a folder of synset folders: pictures with classes, and pairs for super-resolution."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ldm.config.assets import locate
from ldm.data.image_files import PictureFiles, fit_square, images_below, to_image
from ldm.data.superresolution import SuperResolution
from ldm.errors import UserError, did_you_mean

SYNSET = re.compile(r"n\d{8}")
# Files of "n01440764 tench, Tinca tinca" lines: the published name, and Kaggle's.
NAME_FILES = ("synset_human.txt", "LOC_synset_mapping.txt")
CONFIG_KEYS = ("size", "random_crop", "sub_indices", "keep_orig_class_label")


class ImageNetBase(PictureFiles):
    """Square pictures with their class.

    Items: `image` (size, size, 3) float32 in [-1, 1]; `class_label`, the place of the synset among the sorted ones;
    `human_label`, its name from a `synset_human.txt` beside the synset folders, or the synset itself; `synsets`,
    `relpath`, `file_path_`.

    Args:
        config: `size`, side in pixels (by default pictures stay as they are); `random_crop`, cut the square
            anywhere along the longer side (training) or from the middle (validation); `sub_indices`, such as
            "0-9, 17", only these classes, which are then numbered anew unless `keep_orig_class_label`.
        process_images: open the pictures; otherwise items have no `image`.
        data_root: a folder of synset folders, or one with `ILSVRC2012_train` and `ILSVRC2012_validation` in it;
            by default `~/.cache/autoencoders/data`, or `autoencoders/data` in `$XDG_CACHE_HOME`.

    Raises:
        UserError: no pictures there, or a value or key of `config` that cannot be.
    """

    name: ClassVar[str]
    crops_at_random: ClassVar[bool] = False

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
        self.size = config.get("size") or None
        self.random_crop = config.get("random_crop", self.crops_at_random)
        self.process_images = process_images
        folder = self._folder(data_root)
        names = [name for name in images_below(folder) if SYNSET.fullmatch(name.partition("/")[0])]
        if not names:
            raise UserError(f'{type(self).__name__}: the synset folders in "{folder}" hold no pictures')
        synsets = sorted({name.partition("/")[0] for name in names})
        labels = {synset: index for index, synset in enumerate(synsets)}
        if config.get("sub_indices"):
            chosen = parse_indices(config["sub_indices"], len(synsets))
            labels = {synsets[old]: old for old in chosen}
            if not config.get("keep_orig_class_label", False):
                labels = {synset: new for new, synset in enumerate(labels)}
            names = [name for name in names if name.partition("/")[0] in labels]
        human = read_synset_names(folder)
        each = [name.partition("/")[0] for name in names]
        entries = {
            "relpath": names,
            "synsets": each,
            "class_label": [labels[synset] for synset in each],
            "human_label": [human.get(synset, synset) for synset in each],
        }
        super().__init__([folder / name for name in names], entries)

    def _folder(self, data_root: str | None) -> Path:
        """The folder of synset folders."""
        if data_root is None:
            cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
            candidates = [cache / "autoencoders" / "data" / self.name / "data"]
        else:
            root = locate(Path(data_root).expanduser())
            candidates = [root / self.name / "data", root / self.name, root]
        for folder in candidates:
            if folder.is_dir() and any(SYNSET.fullmatch(each.name) for each in folder.iterdir()):
                return folder
        where = f'"{candidates[0]}"' if data_root is None else f'"{data_root}"'
        raise UserError(
            f"{type(self).__name__}: there are no synset folders such as n01440764 in {where}; "
            "unpack ImageNet there, or set data_root"
        )

    def image(self, pixels: np.ndarray) -> np.ndarray:
        """A square of the picture, resized."""
        return to_image(pixels if self.size is None else fit_square(pixels, self.size, self.random_crop))

    def __getitem__(self, index: int) -> dict[str, Any]:
        return super().__getitem__(index) if self.process_images else self.entries(index)


class ImageNetTrain(ImageNetBase):
    """The training pictures."""

    name = "ILSVRC2012_train"
    crops_at_random = True


class ImageNetValidation(ImageNetBase):
    """The validation pictures, sorted into synset folders as the training pictures are."""

    name = "ILSVRC2012_validation"


class ImageNetSR(SuperResolution):
    """Pairs of `image` and `LR_image`; see `SuperResolution` for the arguments, `ImageNetBase` for `data_root`."""

    source: ClassVar[type[ImageNetBase]]

    def __init__(
        self,
        size: int | None = None,
        degradation: str | None = None,
        downscale_f: int = 4,
        min_crop_f: float = 0.5,
        max_crop_f: float = 1.0,
        random_crop: bool = True,
        data_root: str | None = None,
    ) -> None:
        pictures = self.source(process_images=False, data_root=data_root)
        super().__init__(pictures, size, degradation, downscale_f, min_crop_f, max_crop_f, random_crop)


class ImageNetSRTrain(ImageNetSR):
    """Pairs made of the training pictures."""

    source = ImageNetTrain


class ImageNetSRValidation(ImageNetSR):
    """Pairs made of the validation pictures."""

    source = ImageNetValidation


def parse_indices(text: str, count: int) -> list[int]:
    """`"0-2, 7"` as [0, 1, 2, 7], below `count`.

    Raises:
        UserError: it says something else.
    """
    indices: set[int] = set()
    for part in str(text).split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        if match is None or int(match[2] or match[1]) >= count:
            raise UserError(f'sub_indices "{text}" must be numbers and ranges below {count}, such as "0-9, 17"')
        indices.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return sorted(indices)


def read_synset_names(folder: Path) -> dict[str, str]:
    """Synset → name, from a file in the folder of synset folders or up to two above; empty without one."""
    for place in (folder, folder.parent, folder.parent.parent):
        for file in NAME_FILES:
            if (place / file).is_file():
                lines = (place / file).read_text(encoding="utf-8").splitlines()
                return dict(line.split(maxsplit=1) for line in lines if " " in line.strip())
    return {}
