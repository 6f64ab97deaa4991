"""Names of shards: patterns such as `{00000..00331}.tar`, folders and web addresses, and opening one."""

from __future__ import annotations

import glob
import logging
import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import BinaryIO, cast

from ldm.config import targets
from ldm.config.assets import locate
from ldm.data.unreadable import shown_names
from ldm.errors import UserError
from ldm.io.download import check_link, open_url
from ldm.io.tar import READ_SIZE, BadTar

logger = logging.getLogger(__name__)

PIPE = "pipe:"
MAX_SHARDS = 10_000_000
RANGE = re.compile(r"(\d+)\.\.(\d+)")
BRACES = re.compile(r"\{([^{}]*)\}")
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")
BROKEN_PIPE = (0, -13, 141)  # exit statuses of a command whose output was read as far as necessary


def find_shards(shards: str | Sequence[str], base: str, name: str, max_unreadable: float) -> list[str]:
    """Return the shards that patterns name, in order, without absent files.

    Args:
        shards: a pattern or several. `{000..123}` stands for numbers, `{a,b}` for alternatives, `*` for the files of a
            folder, and `::` separates patterns.
        base: folder or address that precedes each pattern.
        name: name of the data set in messages.
        max_unreadable: largest share of absent files.

    Raises:
        UserError: an address is refused, a folder or too many files are missing, or no shard is left.
    """
    texts = [shards] if isinstance(shards, str) else shards
    if not isinstance(texts, Sequence) or not texts or not all(isinstance(text, str) and text for text in texts):
        raise UserError(f'{name}: shards must be a pattern such as "{{00000..00331}}.tar", or a list of patterns')
    patterns = [part for text in texts for part in text.split("::")]
    urls = [url for pattern in patterns for url in expand(os.path.join(base, pattern))]
    kinds = {_kind(url, name) for url in urls}
    if kinds != {"file"}:
        if "file" in kinds:
            raise UserError(f"{name}: shards mixes files and addresses; give one kind")
        return urls
    files = [file for url in urls for file in _existing(url, name)]
    if not files:
        raise UserError(f'{name}: no file matches "{urls[0]}"; check tar_base and shards')
    return _without_absent(files, name, max_unreadable)


def expand(pattern: str) -> list[str]:
    """Return the names that a pattern with braces stands for: `{000..123}` are numbers, `{a,b}` alternatives.

    Raises:
        UserError: the pattern stands for too many names.
    """
    parts = BRACES.split(pattern)
    choices = [_alternatives(part) if i % 2 else [part] for i, part in enumerate(parts)]
    count = 1
    for choice in choices:
        count *= len(choice)
    if count > MAX_SHARDS:
        raise UserError(f'"{pattern}" stands for more than {MAX_SHARDS:,} shards; check its ranges')
    return ["".join(chosen) for chosen in product(*choices)]


def _alternatives(text: str) -> Sequence[str]:
    match = RANGE.fullmatch(text)
    if match is None:
        return text.split(",") if "," in text else [f"{{{text}}}"]
    first, last = int(match[1]), int(match[2])
    step = 1 if last >= first else -1
    width = max(map(len, match.groups())) if any(part.startswith("0") for part in match.groups()) else 0
    count = abs(last - first) + 1
    if count > MAX_SHARDS:
        raise UserError(f'"{{{text}}}" stands for more than {MAX_SHARDS:,} shards; check its range')
    return [f"{number:0{width}}" for number in range(first, last + step, step)]


def _kind(url: str, name: str) -> str:
    """Return the kind of a shard's name: "file", "web" or "pipe".

    Raises:
        UserError: it names a command that is not allowed, or a service that is not supported.
    """
    if url.startswith(PIPE):
        if not targets.is_allowed("pipe"):
            raise UserError(
                f"{name}: {targets.shown(url)} runs a shell command; download the shards and name their folder, or, if "
                "you trust this configuration, give --allow-target pipe"
            )
        return "pipe"
    match = SCHEME.match(url)
    if match is None or url.startswith("file:"):
        return "file"
    if match[1] in ("http", "https"):
        check_link(url)
        return "web"
    raise UserError(f"{name}: cannot read {targets.shown(url)}; give a folder, or an address with https://")


def _existing(url: str, name: str) -> list[str]:
    """Return the path of a shard, or the files that its pattern matches; the folder is looked up in the repository too.

    Raises:
        UserError: the folder does not exist.
    """
    path = Path(url.removeprefix("file://").removeprefix("file:")).expanduser()
    if glob.has_magic(str(path.parent)):
        return sorted(glob.glob(str(path)))
    folder = locate(path.parent)
    if not folder.is_dir():
        raise UserError(f'{name}: there is no folder "{path.parent}"; check tar_base and shards')
    full = folder / path.name
    return sorted(glob.glob(str(full))) if glob.has_magic(path.name) and not full.is_file() else [str(full)]


def _without_absent(files: list[str], name: str, max_unreadable: float) -> list[str]:
    """Return the files that exist. Each folder is listed once, because there can be hundreds of thousands of files."""
    present = {folder: set(os.listdir(folder)) for folder in {os.path.dirname(file) for file in files}}
    absent = [file for file in files if os.path.basename(file) not in present[os.path.dirname(file)]]
    if not absent:
        return files
    found = f"{name}: {len(absent)} of {len(files)} shards do not exist: {shown_names(absent)}"
    if len(absent) > max_unreadable * len(files):
        raise UserError(f'{found}; correct the range in shards, or give "*.tar" for all files of the folder')
    logger.warning("%s; they are left out", found)
    missing = set(absent)
    return [file for file in files if file not in missing]


@contextmanager
def open_shard(url: str) -> Iterator[BinaryIO]:
    """Open a shard: a file, a web address, or the output of a command that `find_shards` has accepted.

    Raises:
        OSError: it cannot be opened.
        BadTar: the command has failed.
    """
    if url.startswith(PIPE):
        with _piped(url.removeprefix(PIPE)) as output:
            yield output
    elif url.startswith(("http:", "https:")):
        with open_url(url) as response:
            yield response
    else:
        with open(url, "rb") as file:
            yield cast(BinaryIO, file)


@contextmanager
def _piped(command: str) -> Iterator[BinaryIO]:
    process = subprocess.Popen(command, shell=True, stdout=subprocess.PIPE)
    output = cast(BinaryIO, process.stdout)
    try:
        yield output
        output.read(READ_SIZE)  # the padding of the archive
    except BaseException:
        process.terminate()
        raise
    finally:
        output.close()
        status = process.wait()
    if status not in BROKEN_PIPE:
        raise BadTar(f"the command failed with exit status {status}")
