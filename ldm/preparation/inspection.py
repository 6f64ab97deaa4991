"""Inspection of image files: sizes, modes, damaged files, and exact copies."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from ldm.data.image_files import ARRAY_SUFFIX, read_pixels
from ldm.data.rows import in_threads
from ldm.data.unreadable import shown_names
from ldm.errors import UserError
from ldm.io.image_formats import readable_formats
from ldm.io.images import as_rgb, decode_image
from ldm.io.pillow_messages import hidden

MIN_SIDE = 512  # a JPEG whose smaller side is at least twice as long is decoded at a reduced size
BLOCK = 8  # files that a thread takes at once
COPIES_SHOWN = 3  # groups of equal images that a line lists


@dataclass(frozen=True)
class ImageFacts:
    """Facts about an image file.

    Attributes:
        width, height: size in pixels, after the rotation in its metadata.
        mode: mode of Pillow in which the file stores its pixels, such as "RGB", "L" or "CMYK".
        kind: format of the file, such as "JPEG".
        digest: hash of the pixels; equal for exact copies.
        fault: reason why the file cannot be read; empty if it can.
    """

    width: int = 0
    height: int = 0
    mode: str = ""
    kind: str = ""
    digest: str = ""
    fault: str = ""

    @property
    def side(self) -> int:
        """Length of the smaller side."""
        return min(self.width, self.height)


def inspect_file(path: Path) -> ImageFacts:
    """Decode an image file and return the facts about it."""
    try:
        if path.suffix.lower() == ARRAY_SUFFIX:
            pixels = read_pixels(path)
            return ImageFacts(pixels.shape[1], pixels.shape[0], "RGB", "NumPy", _digest(pixels, pixels.shape[:2]))
        return _inspect_image(path)
    except UserError as error:
        return ImageFacts(fault=str(error))


def _inspect_image(path: Path) -> ImageFacts:
    image = decode_image(path, min_side=MIN_SIDE)
    try:
        with hidden():
            pixels = np.asarray(as_rgb(image))
    except Exception as error:  # Pillow raises many types of errors
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f'cannot read the image "{path}": {reason}') from None
    width, height = _full_size(path, image.size)
    return ImageFacts(width, height, image.mode, image.format or "", _digest(pixels, (height, width)))


def _full_size(path: Path, decoded: tuple[int, int]) -> tuple[int, int]:
    """Return the width and height in the header of a file, exchanged if the decoded image is rotated."""
    from PIL import Image

    with hidden(), Image.open(path, formats=readable_formats()) as file:
        width, height = file.size
    is_rotated = (width > height) != (decoded[0] > decoded[1]) and width != height
    return (height, width) if is_rotated else (width, height)


def _digest(pixels: np.ndarray, size: Sequence[int]) -> str:
    digest = hashlib.sha256(repr(tuple(size)).encode())
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.hexdigest()


@dataclass(frozen=True)
class Inspection:
    """Facts about the image files of a folder.

    Attributes:
        files: paths of the files, relative to the folder.
        facts: the facts about each file.
    """

    files: tuple[str, ...]
    facts: tuple[ImageFacts, ...]

    @classmethod
    def of(cls, files: Sequence[str], paths: Sequence[Path]) -> Inspection:
        """Inspect image files in threads, with a progress bar."""
        return cls(tuple(files), tuple(in_threads(inspect_file, paths, "inspecting images", BLOCK)))

    @property
    def damaged(self) -> list[int]:
        """Indices of the files that cannot be read."""
        return [index for index, facts in enumerate(self.facts) if facts.fault]

    @property
    def readable(self) -> list[ImageFacts]:
        """Facts about the files that can be read."""
        return [facts for facts in self.facts if not facts.fault]

    def smaller_than(self, size: int) -> list[int]:
        """Return the indices of the readable files whose smaller side is shorter than `size`."""
        return [index for index, facts in enumerate(self.facts) if not facts.fault and facts.side < size]

    @property
    def copies(self) -> list[list[str]]:
        """Groups of files with equal pixels."""
        groups: dict[str, list[str]] = defaultdict(list)
        for file, facts in zip(self.files, self.facts, strict=True):
            if not facts.fault:
                groups[facts.digest].append(file)
        return [group for group in groups.values() if len(group) > 1]

    def lines(self) -> Iterator[str]:
        """Yield a description of the files, one line for each finding."""
        found = self.readable
        sides = sorted((facts.width, facts.height) for facts in found)
        if found:
            smallest, largest = (choose(sides, key=lambda side: side[0] * side[1]) for choose in (min, max))
            middle = f"{median(facts.side for facts in found):.0f}"
            sizes = f"{_size(smallest)} to {_size(largest)} pixels, median of the smaller side {middle}"
            yield f"{_count(len(found), 'image')}: {sizes}"
            yield f"formats: {_listed(facts.kind for facts in found)}; modes: {_listed(facts.mode for facts in found)}"
        if self.damaged:
            names = shown_names([self.files[index] for index in self.damaged])
            yield f"left out: {_count(len(self.damaged), 'file')} that cannot be read: {names}"
        if self.copies:
            number = sum(len(group) - 1 for group in self.copies)
            groups = "; ".join(shown_names(group).replace(", ", " = ") for group in self.copies[:COPIES_SHOWN])
            more = "; …" if len(self.copies) > COPIES_SHOWN else ""
            yield f"exact copies: {_count(number, 'image')}, which stay on one side of the split: {groups}{more}"


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]} × {size[1]}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _listed(values: Iterator[str]) -> str:
    return ", ".join(f"{value} {count:,}" for value, count in Counter(values).most_common())
