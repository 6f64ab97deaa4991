"""Files of ImageNet (ILSVRC 2012): the published folders, which its archives are unpacked into, and its lists.

The folder of a split has the published layout:

    ILSVRC2012_train/
        data/n01440764/n01440764_10026.JPEG ...
        filelist.txt             the images, such as n01440764/n01440764_10026.JPEG
        .ready                   the folder is complete, and filelist.txt lists its images
        synset_human.txt         n01440764 tench, Tinca tinca
        index_synset.yaml        0: n01440764
        validation_synset.txt    ILSVRC2012_val_00000001.JPEG n01751748   (validation)
"""

from __future__ import annotations

import logging
import re
import shutil
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from ldm.config.assets import locate
from ldm.data.image_files import images_below
from ldm.data.imagenet_devkit import DEVKIT, read_devkit
from ldm.errors import UserError
from ldm.io.files import atomic_folder, atomic_path, locked
from ldm.io.folders import log_passed_over
from ldm.io.tar_archives import check_space, extract, files_of, open_tar
from ldm.io.text import read_lines

logger = logging.getLogger(__name__)

SYNSET = re.compile(r"n\d{8}")
# Files with lines such as "n01440764 tench, Tinca tinca": the published name and Kaggle's name.
NAME_FILES = ("synset_human.txt", "LOC_synset_mapping.txt")
# Files with the synset of each validation image: the published list, Kaggle's, the script that moves the images to
# folders, and the development kit.
VALIDATION_LISTS = ("validation_synset.txt", "LOC_val_solution.csv", "valprep.sh", DEVKIT)
SHOWN = 3  # names that a message lists


@dataclass(frozen=True)
class Split:
    """Names and numbers of a published split.

    Attributes:
        name: its folder.
        archive: its archive.
        length: number of images.
    """

    name: str
    archive: str
    length: int


TRAIN = Split("ILSVRC2012_train", "ILSVRC2012_img_train.tar", 1_281_167)
VALIDATION = Split("ILSVRC2012_validation", "ILSVRC2012_img_val.tar", 50_000)
CLASSES = 1000


class Layout:
    """Folder of a split in the published layout.

    Attributes:
        root: the folder.
        data: the folder of the synset folders.
        file_list: the list of the images.
    """

    def __init__(self, root: Path, split: Split) -> None:
        self.root, self.split = root, split
        self.data, self.file_list = root / "data", root / "filelist.txt"

    @property
    def is_ready(self) -> bool:
        """Return whether the folder is complete."""
        return (self.root / ".ready").is_file() and self.data.is_dir()

    def archives(self) -> list[Path]:
        """Return the archives to unpack: that of the split, or those of single classes; empty if there are none."""
        whole = [path for folder in (self.root, self.root.parent) if (path := folder / self.split.archive).is_file()]
        if whole or self.split is VALIDATION:
            return whole[:1]
        classes: dict[str, Path] = {}
        for folder in (self.root, self.data):
            if folder.is_dir():
                found = (path for path in folder.glob("n*.tar") if SYNSET.fullmatch(path.stem))
                classes.update({path.stem: path for path in found})
        return [classes[synset] for synset in sorted(classes)]

    def prepare(self) -> None:
        """Unpack the archives and list the images, unless that is done or there are none.

        Another process that does the same is waited for. An interrupted run is continued.

        Raises:
            UserError: an archive is damaged, a list is missing, or the folder cannot be written.
            DiskFullError: the disk is full.
        """
        if self.is_ready or not self.archives():
            return
        with locked(self.root / ".preparing", f'another process unpacks "{self.root}"', wait=True):
            if self.is_ready:
                return
            logger.info('unpacking %s in "%s"', self.split.name, self.root)
            if self.split is TRAIN:
                self._unpack_train()
            else:
                self._unpack_validation()
            self._finish()

    def relpaths(self) -> list[str] | None:
        """Return the images that the file list names, relative to `data`; None without a complete list.

        Raises:
            UserError: the list is not text.
        """
        if not self.is_ready or not self.file_list.is_file():
            return None
        return [line.strip() for line in read_lines(self.file_list, "list of images") if line.strip()]

    def _finish(self) -> None:
        """Write the file list and the marker."""
        names = [name for name in images_below(self.data) if SYNSET.fullmatch(name.partition("/")[0])]
        if not names:
            raise UserError(f'the archive of {self.split.name} in "{self.root}" contains no images; get it again')
        with atomic_path(self.file_list) as temporary:
            temporary.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
        classes = len({name.partition("/")[0] for name in names})
        if (classes, len(names)) != (CLASSES, self.split.length):
            logger.warning(
                "%s has %d classes and %d images; the complete set has %d classes and %d images",
                *(self.split.name, classes, len(names), CLASSES, self.split.length),
            )
        with atomic_path(self.root / ".ready") as temporary:
            temporary.touch()

    def _unpack_train(self) -> None:
        """Unpack the archive of the training images, which has one archive for each class, or the latter."""
        for leftover in self.data.glob(".*.tmp") if self.data.is_dir() else ():
            shutil.rmtree(leftover, ignore_errors=True)
        whole = [path for path in self.archives() if path.name == self.split.archive]
        if not whole:
            with _progress(self.archives(), "classes", "class") as archives:
                for path in archives:
                    self._unpack_class(path.stem, path, None)
            return
        path = whole[0]
        with open_tar(path) as archive:
            entries = list(files_of(archive, path))
            classes = {_class_of(entry): entry for entry in entries if _class_of(entry)}
            log_passed_over(path, "archives of classes", [entry.name for entry in entries if not _class_of(entry)])
            missing = [entry for synset, entry in classes.items() if not (self.data / synset).is_dir()]
            check_space(self.data, sum(entry.size for entry in missing), f'unpacking "{path.name}"')
            with _progress(missing, "classes", "class") as bar:
                for entry in bar:
                    self._unpack_class(_class_of(entry), path, archive.extractfile(entry))

    def _unpack_class(self, synset: str, path: Path, source: Any) -> None:
        """Unpack the archive of a class, completely or not at all; a folder that exists stays as it is."""
        folder = self.data / synset
        if folder.is_dir():
            return
        where = path if source is None else path / f"{synset}.tar"
        with open_tar(where, source) as archive, atomic_folder(folder) as temporary:
            for entry in files_of(archive, where):
                extract(archive, entry, temporary / PurePosixPath(entry.name).name)

    def _unpack_validation(self) -> None:
        """Unpack the archive of the validation images to the folders of their synsets."""
        path = self.archives()[0]
        list_file, synsets = read_validation_synsets(self.root)
        with open_tar(path) as archive:
            entries = {PurePosixPath(entry.name).name: entry for entry in files_of(archive, path)}
            known = {name: entry for name, entry in entries.items() if name in synsets}
            if not known:
                raise UserError(f'"{list_file}" lists no image of "{path.name}"; get the list that belongs to it')
            _log_difference(f'"{path.name}" has %s that "{list_file.name}" lacks', entries.keys() - synsets.keys())
            _log_difference(f'"{list_file.name}" lists %s that "{path.name}" lacks', synsets.keys() - entries.keys())
            targets = {name: self.data / synsets[name] / name for name in known}
            missing = sum(entry.size for name, entry in known.items() if not targets[name].is_file())
            check_space(self.data, missing, f'unpacking "{path.name}"')
            with _progress(known, "images", "image") as names:
                for name in names:
                    extract(archive, known[name], targets[name])


def read_validation_synsets(folder: Path) -> tuple[Path, dict[str, str]]:
    """Return the list of the validation images in `folder` or the one above, and the synset of each image.

    Raises:
        UserError: there is no such list, or a line is invalid.
    """
    places = (parent / name for name in VALIDATION_LISTS for parent in (folder, folder.parent))
    path = next((path for path in places if path.is_file()), None)
    if path is None:
        raise UserError(
            f"the classes of the validation images are unknown: put {VALIDATION_LISTS[0]}, with lines such as "
            f'"ILSVRC2012_val_00000001.JPEG n01751748", or {", ".join(VALIDATION_LISTS[1:])} into "{folder}"'
        )
    if path.name == DEVKIT:
        return path, read_devkit(path)
    synsets = {}
    for number, line in enumerate(read_lines(path, "list of synsets"), 1):
        words = line.replace(",", " ").split()
        if path.suffix == ".sh":
            words = [words[1], words[2].rstrip("/")] if len(words) == 3 and words[0] == "mv" else []
        if not words or words[0] == "ImageId":  # the header of Kaggle's list
            continue
        if len(words) < 2 or not SYNSET.fullmatch(words[1]) or "/" in words[0]:
            raise UserError(f'"{path}", line {number}, must be such as "ILSVRC2012_val_00000001.JPEG n01751748"')
        name = words[0] if PurePosixPath(words[0]).suffix else f"{words[0]}.JPEG"
        synsets[name] = words[1]
    return path, synsets


def read_synset_names(folder: Path) -> dict[str, str]:
    """Read the names of the synsets from a file in `folder` or up to two folders above; empty without a file."""
    path = find_beside(folder, NAME_FILES)
    lines = [] if path is None else read_lines(path, "list of synset names")
    return dict(line.split(maxsplit=1) for line in lines if " " in line.strip())


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
    if not isinstance(synsets, dict) or not all(isinstance(index, int) for index in synsets):
        raise UserError(f'"{path}" does not list synsets; it needs lines such as "0: n01440764"')
    return {index: str(synset) for index, synset in synsets.items()}


def read_label_numbers(path: Path) -> dict[str, int]:
    """Read the number of each label from the published `imagenet1000_clsidx_to_labels.txt`.

    Its lines are such as `{0: 'tench, Tinca tinca',`.
    """
    lines = (re.fullmatch(r"\W*(\d+)\s*:\s*(.*?)\s*,?\s*}?\s*", line) for line in read_lines(path, "list of labels"))
    return {match[2].strip("'\""): int(match[1]) for match in lines if match}


def find_beside(folder: Path, names: Iterable[str]) -> Path | None:
    """Return the first file with one of `names` in `folder` or up to two folders above; None without one."""
    parents = (folder, folder.parent, folder.parent.parent)
    return next((parent / name for parent in parents for name in names if (parent / name).is_file()), None)


def _class_of(entry: tarfile.TarInfo) -> str:
    """Return the synset whose archive an entry is, such as `n01440764.tar`; empty for another entry."""
    name = PurePosixPath(entry.name)
    return name.stem if name.suffix == ".tar" and SYNSET.fullmatch(name.stem) else ""


def _log_difference(message: str, names: Iterable[str]) -> None:
    """Log a warning with the number and the first of `names`, if there are any."""
    names = sorted(names)
    if names:
        noun = "1 image" if len(names) == 1 else f"{len(names)} images"
        shown = ", ".join([*names[:SHOWN], *(["…"] if len(names) > SHOWN else [])])
        logger.warning("%s: %s", message % noun, shown)


@contextmanager
def _progress(items: Iterable[Any], what: str, unit: str) -> Iterator[Any]:
    """Show the progress through `items` in a terminal."""
    from tqdm import tqdm

    with tqdm(items, desc=f"unpacking {what}", unit=unit, disable=None, leave=False) as bar:
        yield bar
