"""Input files of commands: listing them, checking that they are unchanged, and naming the results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

from ldm.config.assets import locate
from ldm.errors import UserError
from ldm.io.files import folded_name, sha256
from ldm.io.folders import list_files
from ldm.io.image_formats import image_suffixes
from ldm.io.text import read_lines


def named_files(option: str, names: Sequence[str], suffixes: Sequence[str], noun: str) -> list[Path]:
    """Return the files that an option names; a folder stands for its files with one of the suffixes, by name.

    Missing files are included: reading them raises an error after the files before them are done.

    Args:
        option: the option, for error messages.
        names: files and folders.
        suffixes: suffixes in lower case.
        noun: plural name of the files, such as "images".

    Raises:
        UserError: A folder holds no such file.
    """
    found: list[Path] = []
    for name in names:
        path = locate(name)
        found += _files_in(path, option, suffixes, noun) if path.is_dir() else [path]
    return found


def images_in(folder: Path, option: str = "--indir") -> list[Path]:
    """Return the image files in `folder`, by name.

    Raises:
        UserError: There is no such folder, or no image in it.
    """
    folder = locate(folder)
    if not folder.is_dir():
        raise UserError(f'{option} "{folder}": there is no such folder; check the path')
    return _files_in(folder, option, image_suffixes(), "images")


def _files_in(folder: Path, option: str, suffixes: Sequence[str], noun: str) -> list[Path]:
    listing = list_files(folder, suffixes)
    if not listing.files:
        raise UserError(f'{option} "{folder}" holds no {noun}; name a file, or another folder')
    listing.log_others(noun)
    return listing.paths


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
        if any(_is_same_folder(each.parent, Path(outdir)) for each in (path, path.resolve())):  # of a link and its file
            raise UserError(f'--outdir "{outdir}" is the folder of the input "{path.name}"; name another')


def _is_same_folder(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:  # one of them does not exist
        return one.resolve() == other.resolve()


def result_names(images: Sequence[Path]) -> list[str]:
    """Return the names of results before `.png`: each input has its own, also where file systems ignore case.

    A name is the stem of the input, or its whole name if several share a stem, or else a numbered name.
    """
    stems = Counter(path.stem for path in images)
    names = [path.stem if stems[path.stem] == 1 else path.name for path in images]
    counts = Counter(map(folded_name, names))
    taken = {name for name, times in counts.items() if times == 1}
    for index, path in enumerate(images):
        if counts[folded_name(names[index])] > 1:
            numbered = (f"{path.name}-{number}" for number in count(2))
            names[index] = next(name for name in chain([path.name], numbered) if folded_name(name) not in taken)
            taken.add(folded_name(names[index]))
    return names


def read_prompts(path: str) -> list[str]:
    """Return the lines of a file of prompts that are not blank.

    Raises:
        UserError: The file is missing, is not text, or has no prompt.
    """
    prompts = [line.strip() for line in read_lines(path, "prompt file") if line.strip()]
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
