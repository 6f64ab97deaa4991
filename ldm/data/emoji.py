"""Emoji drawings on coloured backgrounds, with captions: a small data set that ships with the code.

The drawings and their names are in `data/emoji` (see its README and `scripts/build_emoji_data.py`).
A *pair* is one drawing on one background colour. A fixed tenth of the pairs is held out from training.
Training shows the drawing and the colour of a held-out pair in other pairs, so held-out pairs measure composition.

Shapes: `rgba` (S, S, 4) uint8 with straight alpha; images (S, S, 3) float32 in [-1, 1].
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from ldm.config.assets import ROOT
from ldm.errors import UserError, did_you_mean
from ldm.io.images import decode_image
from ldm.io.text import read_lines

DEFAULT_ROOT = ROOT / "data" / "emoji"
SIZES = (64, 128)
SHEET_COLUMNS = 40

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "red": (215, 10, 30),
    "orange": (255, 125, 0),
    "yellow": (255, 235, 0),
    "green": (0, 160, 60),
    "blue": (20, 70, 230),
    "purple": (150, 30, 180),
}
COLOURS = tuple(BACKGROUNDS)


@dataclass(frozen=True)
class Drawings:
    """All drawings at one size, in code-point order; the index of a drawing is its class label.

    Attributes:
        rgba: (N, size, size, 4) uint8, read-only, straight alpha, and zero where fully transparent.
        codepoints: the Unicode code point of each drawing.
        unicode_names: the Unicode name of each drawing.
        cldr_names: the CLDR short name of each drawing.
    """

    rgba: np.ndarray
    codepoints: tuple[int, ...]
    unicode_names: tuple[str, ...]
    cldr_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.codepoints)


def load_drawings(size: int = 64, root: str | Path | None = None) -> Drawings:
    """Return the drawings at `size` (64 or 128) pixels, which are read once per process.

    Raises:
        UserError: the size is unknown, or the data folder is missing or incomplete.
    """
    if size not in SIZES:
        raise UserError(
            f"emoji drawings exist in {' and '.join(map(str, SIZES))} px, not {size}; set size to one of these"
        )
    return _load_drawings(size, DEFAULT_ROOT if root is None else Path(root))


@lru_cache(maxsize=4)
def _load_drawings(size: int, root: Path) -> Drawings:
    names = read_names(root)
    path = root / f"drawings-{size}.webp"
    if not path.is_file():
        raise UserError(f'there is no file "{path}"; rebuild the emoji data with scripts/build_emoji_data.py')
    rgba = split_sheet(np.asarray(decode_image(path)), len(names), size)
    rgba.flags.writeable = False
    codepoints, unicode_names, cldr_names = zip(*names, strict=True)
    return Drawings(rgba, codepoints, unicode_names, cldr_names)


def read_names(root: str | Path | None = None) -> list[tuple[int, str, str]]:
    """Return (code point, Unicode name, CLDR short name) of every drawing, both names in lower case.

    Raises:
        UserError: `names.tsv` is missing from the data folder.
    """
    path = (DEFAULT_ROOT if root is None else Path(root)) / "names.tsv"
    if not path.is_file():
        raise UserError(
            f'"{path.parent}" is not the emoji data (names.tsv is missing); set root to the folder data/emoji'
        )
    rows = [line.split("\t") for line in read_lines(path, "list of emoji names")[1:]]
    return [(int(codepoint.removeprefix("U+"), 16), unicode_name, cldr) for codepoint, unicode_name, cldr in rows]


def join_sheet(rgba: np.ndarray) -> np.ndarray:
    """Arrange drawings (N, S, S, 4) row by row on a contact sheet of `SHEET_COLUMNS` columns."""
    count, size = rgba.shape[:2]
    rows = -(-count // SHEET_COLUMNS)
    tiles = np.zeros((rows * SHEET_COLUMNS, size, size, 4), np.uint8)
    tiles[:count] = rgba
    grid = tiles.reshape(rows, SHEET_COLUMNS, size, size, 4)
    return grid.transpose(0, 2, 1, 3, 4).reshape(rows * size, SHEET_COLUMNS * size, 4)


def split_sheet(sheet: np.ndarray, count: int, size: int) -> np.ndarray:
    """Split a contact sheet into its first `count` drawings (count, S, S, 4), the inverse of `join_sheet`.

    Raises:
        UserError: the shape of the sheet does not fit `count` drawings of this size.
    """
    rows = -(-count // SHEET_COLUMNS)
    if sheet.shape != (rows * size, SHEET_COLUMNS * size, 4):
        raise UserError(
            f"the {size} px sheet of emoji drawings has shape {sheet.shape}, which does not fit the {count} names; "
            "rebuild the emoji data with scripts/build_emoji_data.py"
        )
    grid = sheet.reshape(rows, size, SHEET_COLUMNS, size, 4).transpose(0, 2, 1, 3, 4)
    return grid.reshape(-1, size, size, 4)[:count]


def caption(name: str, colour: str | None = None) -> str:
    """Return a caption such as `"rocket on a blue background"`, or the name alone without a colour."""
    return name if colour is None else f"{name} on a {colour} background"


def held_out_colour(index: int) -> str | None:
    """Return the background of drawing `index` that is held out from training, or None.

    Four of every five neighbouring drawings lose one of the eight backgrounds. A hash chooses the drawing that keeps
    all of them and the background of each other drawing. This holds out 4 of 40 pairs, exactly a tenth, and never
    more than one colour of a drawing. SHA-256 makes the choice the same everywhere.
    """
    if index % 5 == _hash(f"emoji/five/{index // 5}") % 5:
        return None
    return COLOURS[_hash(f"emoji/drawing/{index}") % len(COLOURS)]


def is_held_out(index: int, colour: str) -> bool:
    """Return whether the pair of drawing `index` and this background is held out from training."""
    return colour == held_out_colour(index)


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")


def premultiply(rgba: np.ndarray) -> np.ndarray:
    """Multiply colours by alpha, (…, 4) float32 in 0…255, so that pixels can be averaged."""
    pixels = rgba.astype(np.float32)
    pixels[..., :3] *= pixels[..., 3:] / 255
    return pixels


def place(rgba: np.ndarray, scale: float, shift_x: float, shift_y: float, size: int) -> np.ndarray:
    """Place a scaled and shifted drawing on a transparent canvas.

    Side and position are rounded to whole pixels, so a shift never blurs. Parts outside the canvas are cut off.

    Args:
        rgba: (S, S, 4) uint8.
        scale: side of the drawing as a fraction of the canvas.
        shift_x, shift_y: offset of the centre to the right and down, as fractions of `size`.
        size: side of the canvas in pixels.

    Returns:
        (size, size, 4) float32 in 0…255, premultiplied.
    """
    side = max(1, round(size * scale))
    if side == rgba.shape[0]:
        drawing = premultiply(rgba)
    else:  # Pillow's premultiplied mode is "RGBa"; a filter without negative lobes leaves no bright fringes
        resized = Image.fromarray(rgba).convert("RGBa").resize((side, side), Image.Resampling.HAMMING)
        drawing = np.asarray(resized).astype(np.float32)
    left, top = (round((size - side) / 2 + shift * size) for shift in (shift_x, shift_y))
    if side == size and left == 0 and top == 0:
        return drawing
    canvas = np.zeros((size, size, 4), np.float32)
    x0, x1, y0, y1 = max(left, 0), min(left + side, size), max(top, 0), min(top + side, size)
    if x0 < x1 and y0 < y1:
        canvas[y0:y1, x0:x1] = drawing[y0 - top : y1 - top, x0 - left : x1 - left]
    return canvas


def over(canvas: np.ndarray, colour: str) -> np.ndarray:
    """Composite a premultiplied canvas (S, S, 4) over a background: (S, S, 3) float32 in [-1, 1]."""
    transparency = 1 - canvas[..., 3:] / 255
    image = canvas[..., :3] + transparency * np.array(BACKGROUNDS[colour], np.float32)
    image *= np.float32(1 / 127.5)
    image -= 1
    return np.clip(image, -1, 1, out=image)


def compose(
    rgba: np.ndarray, colour: str, scale: float = 1.0, shift_x: float = 0.0, shift_y: float = 0.0, size: int = 64
) -> np.ndarray:
    """Composite a drawing over a coloured background, (size, size, 3) float32 in [-1, 1]; arguments as in `place`."""
    return over(place(rgba, scale, shift_x, shift_y, size), colour)


def select_pairs(drawings: Drawings, held_out: bool, names: Sequence[str] | None = None) -> list[tuple[int, str]]:
    """Return the (drawing, colour) pairs that are held out, or all other pairs.

    Args:
        drawings: the drawings to choose from.
        held_out: return the held-out pairs; otherwise the pairs for training.
        names: select only these drawings, by Unicode or CLDR name.

    Raises:
        UserError: no drawing has one of the names.
    """
    known = {name: i for column in (drawings.unicode_names, drawings.cldr_names) for i, name in enumerate(column)}
    for name in names or ():
        if name not in known:
            raise UserError(f'there is no emoji drawing "{name}"{did_you_mean(name, known)}; see data/emoji/names.tsv')
    indices = range(len(drawings)) if names is None else sorted({known[name] for name in names})
    return [(i, colour) for i in indices for colour in COLOURS if is_held_out(i, colour) == held_out]


class _EmojiPairs(Dataset):
    """Base class of the emoji data sets: a list of (drawing, colour) pairs.

    Items: `image` (S, S, 3) float32 in [-1, 1]; `mask` (S, S, 1) float32, 1 where the drawing covers at least half of
    the pixel; `caption`; `class_label`, the index of the drawing; `human_label`, its CLDR short name; `background` and
    `background_label`, the name of the colour and its index in `COLOURS`.
    """

    def __init__(self, pairs: list[tuple[int, str]], drawings: Drawings, size: int) -> None:
        if size < 1:
            raise UserError(f"size of the emoji data must be positive, not {size}")
        self.pairs = pairs
        self.drawings = drawings
        self.size = size

    def __len__(self) -> int:
        return len(self.pairs)

    def _item(self, index: int, colour: str, text: str, canvas: np.ndarray) -> dict[str, Any]:
        return {
            "image": over(canvas, colour),
            "mask": (canvas[..., 3:] >= 127.5).astype(np.float32),
            "caption": text,
            "class_label": index,
            "human_label": self.drawings.cldr_names[index],
            "background": colour,
            "background_label": COLOURS.index(colour),
        }


class EmojiTrain(_EmojiPairs):
    """Training pairs at a random scale and position, captioned with one of the drawing's two names.

    All randomness comes from PyTorch's global generator, which a data loader seeds in each worker.

    Args:
        size: side of the image in pixels.
        root: the data folder (default: `data/emoji`).
        name_only_prob: probability of a caption without the background.
        scale: range of the drawing's side, as fractions of `size`.
        shift: largest shift in each direction, as a fraction of `size`; shifts never cut a drawing off.
        crop: side of a random square crop of the image, to train a first stage on crops.
        names: use only these drawings, by Unicode or CLDR name.

    Raises:
        UserError: there is no data in `root`, a name is unknown, or a parameter is out of range.
    """

    def __init__(
        self,
        size: int = 64,
        root: str | Path | None = None,
        name_only_prob: float = 0.1,
        scale: tuple[float, float] = (0.85, 1.0),
        shift: float = 0.06,
        crop: int | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        drawings = load_drawings(_source_size(size), root)
        super().__init__(select_pairs(drawings, False, names), drawings, size)
        if crop is not None and not 1 <= crop <= size:
            raise UserError(f"crop must lie between 1 and size ({size}), not {crop}")
        if len(scale) != 2 or not 0 < scale[0] <= scale[1]:
            raise UserError(f"scale must be two positive numbers, the smaller first, not {scale}")
        if not 0 <= name_only_prob <= 1:
            raise UserError(f"name_only_prob must lie between 0 and 1, not {name_only_prob}")
        self.name_only_prob, self.scale, self.shift, self.crop = name_only_prob, tuple(scale), shift, crop

    def __getitem__(self, item: int) -> dict[str, Any]:
        index, colour = self.pairs[item]
        scale, x, y, name, name_only, crop_x, crop_y = torch.rand(7).tolist()
        low, high = self.scale
        scale = low + (high - low) * scale
        reach = max(0.0, min(self.shift, (1 - scale) / 2))
        shift_x, shift_y = ((2 * u - 1) * reach for u in (x, y))
        canvas = place(self.drawings.rgba[index], scale, shift_x, shift_y, self.size)
        if self.crop is not None:
            left, top = (int(u * (self.size - self.crop + 1)) for u in (crop_x, crop_y))
            canvas = canvas[top : top + self.crop, left : left + self.crop]
        names = self.drawings.unicode_names if name < 0.5 else self.drawings.cldr_names
        text = caption(names[index], None if name_only < self.name_only_prob else colour)
        return self._item(index, colour, text, canvas)


class EmojiValidation(_EmojiPairs):
    """Pairs without augmentation: the drawing centred at full size, captioned with its CLDR short name and the colour.

    Args:
        size: side of the image in pixels.
        root: the data folder (default: `data/emoji`).
        split: "held_out" for the pairs that training never shows, "seen" for all other pairs.
        names: use only these drawings, by Unicode or CLDR name.

    Raises:
        UserError: there is no data in `root`, or a name or the split is unknown.
    """

    def __init__(
        self,
        size: int = 64,
        root: str | Path | None = None,
        split: str = "held_out",
        names: Sequence[str] | None = None,
    ) -> None:
        if split not in ("held_out", "seen"):
            raise UserError(f'split of the emoji data must be "held_out" or "seen", not "{split}"')
        drawings = load_drawings(_source_size(size), root)
        super().__init__(select_pairs(drawings, split == "held_out", names), drawings, size)

    def __getitem__(self, item: int) -> dict[str, Any]:
        index, colour = self.pairs[item]
        canvas = place(self.drawings.rgba[index], 1.0, 0.0, 0.0, self.size)
        return self._item(index, colour, caption(self.drawings.cldr_names[index], colour), canvas)


def _source_size(size: int) -> int:
    """Return the smallest stored size of at least `size`, or the largest stored size."""
    return next((stored for stored in SIZES if stored >= size), SIZES[-1])
