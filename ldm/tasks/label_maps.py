"""Maps that give every pixel a label, in picture files.

A grey or palette picture holds the labels themselves, as numbers from 0. A colour picture needs a palette: a file that
says which colour is which label, as lines

    #87ceeb 156 sky

(names are for people), or as JSON, {"#87ceeb": 156}.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.errors import UserError

if TYPE_CHECKING:
    import numpy as np

NUMBERS = ("1", "L", "P", "I", "I;16", "I;16B")  # Pillow's modes of pictures that hold numbers
LARGEST = 65535  # label that a palette may name


def read_palette(path: Path) -> dict[str, int]:
    """Labels by their colours, "#rrggbb".

    Raises:
        UserError: the file is missing, or is not written as this module says.
    """
    form = 'write lines such as "#87ceeb 156 sky", or JSON {"#87ceeb": 156}'
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".json":
            pairs = [(str(colour), label) for colour, label in json.loads(text).items()]
        else:
            lines = [line.split() for line in text.splitlines() if line.strip()]
            pairs = [(words[0], int(words[1])) for words in lines]
    except FileNotFoundError:
        raise UserError(f'there is no palette "{path}"; check the path') from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'cannot read the palette "{path}": {error}; {form}') from None
    except (ValueError, IndexError, AttributeError, RecursionError):
        raise UserError(f'the palette "{path}" is damaged; {form}') from None
    palette: dict[str, int] = {}
    for colour, label in pairs:
        if not re.fullmatch(r"#[0-9a-fA-F]{6}", colour) or type(label) is not int or not 0 <= label <= LARGEST:
            raise UserError(f'the palette "{path}" has no colour and label in "{colour} {label}"; {form}')
        if palette.setdefault(colour.lower(), label) != label:
            raise UserError(f'the palette "{path}" gives {colour} two labels; give it one')
    if not palette:
        raise UserError(f'the palette "{path}" is empty; {form}')
    return palette


def read_label_map(path: Path, palette: Mapping[str, int] | None = None) -> np.ndarray:
    """The labels of a map, (H, W) int64.

    Args:
        palette: labels of colours; the colours of a palette picture are looked up in it, too.

    Raises:
        UserError: the file is missing or is no picture, or a colour has no label.
    """
    import numpy as np
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what Pillow reads all the same
            with Image.open(path) as file:
                image = ImageOps.exif_transpose(file)
        if image.mode == "LA":  # what is transparent has a number too
            image = image.getchannel("L")
        coloured = image.mode not in NUMBERS or (image.mode == "P" and palette is not None)
        pixels = np.asarray(image.convert("RGB") if coloured else image)
    except FileNotFoundError:
        raise UserError(f'there is no map "{path}"; check the path') from None
    except Exception as error:  # Pillow's readers raise anything on damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f'cannot read the map "{path}": {reason}; give a PNG of labels') from None
    if not coloured:
        return pixels.astype(np.int64)
    if palette is None:
        raise UserError(f'the map "{path}" is in colour; say with --palette which colour is which label')
    return _labels_of_colours(path, pixels, palette)


def _labels_of_colours(path: Path, pixels: np.ndarray, palette: Mapping[str, int]) -> np.ndarray:
    import numpy as np

    red, green, blue = np.moveaxis(pixels.astype(np.int64), -1, 0)
    colours, where, counts = np.unique(red << 16 | green << 8 | blue, return_inverse=True, return_counts=True)
    names = [f"#{colour:06x}" for colour in colours]
    unknown = [i for i, name in enumerate(names) if name not in palette]
    if unknown:
        most = max(unknown, key=lambda i: counts[i])
        raise UserError(
            f'the map "{path}" has colours that the palette lacks ({len(unknown)}), most of all {names[most]} in '
            f"{counts[most]} pixels; add them, or save the map as a PNG without smoothing"
        )
    return np.array([palette[name] for name in names])[where].reshape(red.shape)


def resize_nearest(labels: np.ndarray, height: int, width: int) -> np.ndarray:
    """A map (H, W) as (height, width): each position takes the label that lies under its middle."""
    import numpy as np

    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(int) for new, old in zip((height, width), labels.shape, strict=True)
    )
    return labels[rows[:, None], columns]
