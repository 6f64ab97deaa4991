"""Development kit of ImageNet (ILSVRC 2012), whose archive states the synset of each validation image."""

from __future__ import annotations

import io
from pathlib import Path, PurePosixPath
from typing import Any

from ldm.config.distribution import install_hint
from ldm.errors import UserError
from ldm.io.tar_archives import files_of, open_tar
from ldm.io.text import decode

DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
NUMBERS, SYNSETS = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"


def read_devkit(path: Path) -> dict[str, str]:
    """Return the synset of each validation image, such as `ILSVRC2012_val_00000001.JPEG`.

    The kit numbers the images in their order, and the classes in an order of its own.

    Args:
        path: the archive.

    Raises:
        UserError: the archive is damaged or lacks a file, or the package scipy is missing.
    """
    contents: dict[str, bytes] = {}
    with open_tar(path) as archive:
        for entry in files_of(archive, path):
            name = PurePosixPath(entry.name).name
            source = archive.extractfile(entry) if name in (NUMBERS, SYNSETS) else None
            if source is not None:
                contents[name] = source.read()
    for name in (NUMBERS, SYNSETS):
        if name not in contents:
            raise UserError(f'the archive "{path}" does not contain {name}; get it again')
    synsets = _read_synsets(contents[SYNSETS], path)
    try:
        numbers = [int(line) for line in decode(contents[NUMBERS]).split()]
        return {f"ILSVRC2012_val_{i:08}.JPEG": synsets[number] for i, number in enumerate(numbers, 1)}
    except (ValueError, KeyError) as error:
        raise UserError(f'{NUMBERS} in "{path}" is damaged ({error}); get it again') from None


def _read_synsets(data: bytes, path: Path) -> dict[int, str]:
    """Return the synset of each number from a file of MATLAB.

    Raises:
        UserError: the file is damaged, or the package scipy is missing.
    """
    try:
        from scipy.io import loadmat
    except ModuleNotFoundError:
        raise UserError(f'"{path}" needs the package scipy; install it with {install_hint("datasets")}') from None
    try:
        table: Any = loadmat(io.BytesIO(data), squeeze_me=True)["synsets"]
        return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in table if int(row["num_children"]) == 0}
    except Exception as error:  # damaged files raise many types of errors
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f'{SYNSETS} in "{path}" is damaged ({reason}); get it again') from None
