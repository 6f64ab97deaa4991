"""Input files of commands: listing them, checking that they are unchanged, and naming the results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldm.config.assets import locate
from ldm.errors import UserError
from ldm.io.files import sha256

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def named_files(option: str, names: Sequence[str], suffixes: Sequence[str]) -> list[Path]:
    """Return the files that an option names; a folder stands for its files with one of the suffixes, by name.

    Missing files are included: reading them raises an error after the files before them are done.

    Raises:
        UserError: A folder holds no such file.
    """
    found: list[Path] = []
    for name in names:
        path = locate(name)
        found += _files_in(path, option, suffixes) if path.is_dir() else [path]
    return found


def images_in(folder: Path, option: str = "--indir") -> list[Path]:
    """Return the image files in `folder`, by name.

    Raises:
        UserError: There is no such folder, or no image in it.
    """
    folder = locate(folder)
    if not folder.is_dir():
        raise UserError(f'{option} "{folder}": there is no such folder; check the path')
    return _files_in(folder, option, IMAGE_SUFFIXES)


def _files_in(folder: Path, option: str, suffixes: Sequence[str]) -> list[Path]:
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in suffixes and path.is_file())
    if not found:
        raise UserError(f'{option} "{folder}" holds no {", ".join(suffixes)}; name a file, or another folder')
    return found


def file_input(key: str, path: Path | None) -> dict[str, Any]:
    """Return the input `key` with the path of a file, or None, and the SHA-256 of a readable file."""
    if path is None:
        return {key: None}
    try:
        return {key: str(path), f"{key}_sha256": sha256(path)}
    except OSError:
        return {key: str(path)}


def unchanged(key: str, inputs: dict[str, Any]) -> Path:
    """Return the path of the file in `inputs` under `key`.

    Raises:
        UserError: The file differs from the recorded one.
    """
    path = Path(inputs[key])
    recorded = inputs.get(f"{key}_sha256")
    if recorded is not None and path.is_file() and sha256(path) != recorded:
        raise UserError(f'"{path}" has changed since the image was sampled; restore the old file')
    return path


def check_apart(outdir: str, images: Sequence[Path]) -> None:
    """Raise an error if results would go to the folder of the input images, where they could replace one.

    Raises:
        UserError: They would.
    """
    for path in images:
        if path.parent.resolve() == Path(outdir).resolve():
            raise UserError(f'--outdir "{outdir}" is the folder of the input "{path.name}"; name another')


def result_names(images: Sequence[Path]) -> list[str]:
    """Return the names of results before `.png`: the stems of the inputs, or whole names if several share a stem."""
    stems = [path.stem for path in images]
    return [path.stem if stems.count(path.stem) == 1 else path.name for path in images]


def read_lines(path: str) -> list[str]:
    """Return the lines of a file of prompts that are not blank.

    Raises:
        UserError: The file is missing, is not text, or has no prompt.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise UserError(f'there is no prompt file "{path}"; check the path') from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'cannot read the prompt file "{path}": {error}; give UTF-8 text') from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f'the prompt file "{path}" is empty; write one prompt a line')
    return prompts


def check_text(option: str, text: str) -> None:
    """Raise an error if a text from the command line cannot be stored in a file.

    Raises:
        UserError: Its bytes are not valid characters.
    """
    if text != text.encode(errors="ignore").decode():
        raise UserError(f"{option} is not valid text; give it in UTF-8")
