"""Files that pictures are drawn from: which there are, whether they are what they were, and what results are called."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ldm.config.assets import locate
from ldm.errors import UserError
from ldm.io.files import sha256
from ldm.tasks.task import Inputs

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def named_files(option: str, names: Sequence[str], suffixes: Sequence[str]) -> list[Path]:
    """The files that an option names, folders standing for all files in them with one of the suffixes, by name.

    A file that is missing is named nevertheless: to be told when it is read, after others.

    Raises:
        UserError: a folder holds no such file.
    """
    found: list[Path] = []
    for name in names:
        path = locate(name)
        found += _files_in(path, option, suffixes) if path.is_dir() else [path]
    return found


def images_in(folder: Path, option: str = "--indir") -> list[Path]:
    """The picture files that lie in `folder`, by name.

    Raises:
        UserError: there is no such folder, or no picture in it.
    """
    if not folder.is_dir():
        raise UserError(f'{option} "{folder}": there is no such folder; check the path')
    return _files_in(folder, option, PICTURES)


def _files_in(folder: Path, option: str, suffixes: Sequence[str]) -> list[Path]:
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in suffixes and path.is_file())
    if not found:
        raise UserError(f'{option} "{folder}" holds no {", ".join(suffixes)}; name a file, or another folder')
    return found


def file_input(key: str, path: Path | None) -> Inputs:
    """The input `key` that names a file, or None, and the file's SHA-256 where it can be read."""
    if path is None:
        return {key: None}
    try:
        return {key: str(path), f"{key}_sha256": sha256(path)}
    except OSError:
        return {key: str(path)}


def unchanged(key: str, inputs: Inputs) -> Path:
    """The path of the file that `inputs` name under `key`.

    Raises:
        UserError: the file is another than the one that was recorded.
    """
    path = Path(inputs[key])
    recorded = inputs.get(f"{key}_sha256")
    if recorded is not None and path.is_file() and sha256(path) != recorded:
        raise UserError(f'"{path}" has changed since it was drawn from; put the old file there')
    return path


def check_apart(outdir: str, pictures: Sequence[Path]) -> None:
    """Whether results go to another folder than the pictures come from.

    Raises:
        UserError: they do not, and might take a picture's place.
    """
    for path in pictures:
        if path.parent.resolve() == Path(outdir).resolve():
            raise UserError(f'--outdir "{outdir}" is the folder of "{path.name}", which is drawn from; name another')


def result_names(pictures: Sequence[Path]) -> list[str]:
    """What results are called before `.png`: the pictures' stems, or where several share one, their whole names."""
    stems = [path.stem for path in pictures]
    return [path.stem if stems.count(path.stem) == 1 else path.name for path in pictures]
