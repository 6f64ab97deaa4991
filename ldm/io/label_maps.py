"""Read label maps, which give every pixel a label, from image files.

A grey or palette image holds the labels themselves, as numbers from 0. A colour image needs a palette: a file that
assigns a label to each colour, with lines such as

    #87ceeb 156 sky

where the name is optional, or as JSON, {"#87ceeb": 156}.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.errors import UserError
from ldm.io.text import read_text

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

LABEL_MODES = ("1", "L", "P", "I", "I;16", "I;16B")  # Pillow's modes of images that hold numbers
MAX_LABEL = 65535  # of a palette


def read_palette(path: Path) -> dict[str, int]:
    """Return the label of each colour, "#rrggbb", of a palette file.

    Raises:
        UserError: The file is missing, or has another format.
    """
    form = 'write lines such as "#87ceeb 156 sky", or JSON {"#87ceeb": 156}'
    try:
        text = read_text(path, "palette", form)
        if path.suffix.lower() == ".json":
            pairs = [(str(colour), label) for colour, label in json.loads(text).items()]
        else:
            lines = [line.split() for line in text.split("\n") if line.strip()]
            pairs = [(words[0], int(words[1])) for words in lines]
    except (ValueError, IndexError, AttributeError, RecursionError):
        raise UserError(f'the palette "{path}" is damaged; {form}') from None
    palette: dict[str, int] = {}
    for colour, label in pairs:
        if not re.fullmatch(r"#[0-9a-fA-F]{6}", colour) or type(label) is not int or not 0 <= label <= MAX_LABEL:
            raise UserError(f'the palette "{path}" has no valid colour and label in "{colour} {label}"; {form}')
        if palette.setdefault(colour.lower(), label) != label:
            raise UserError(f'the palette "{path}" assigns two labels to {colour}; keep one')
    if not palette:
        raise UserError(f'the palette "{path}" is empty; {form}')
    return palette


def read_label_map(path: Path, palette: Mapping[str, int] | None = None, option: str = "--palette") -> np.ndarray:
    """Return the labels (H, W) int64 of a label map.

    Args:
        path: an image file.
        palette: the label of each colour; it also applies to the colours of a palette image.
        option: name of the option or parameter that sets the palette, in messages.

    Raises:
        UserError: The file is missing or is not an image, or a colour has no label.
    """
    import numpy as np

    from ldm.io.images import decode_image

    image = without_alpha(decode_image(path, "label map", "give a PNG of labels"))
    coloured = image.mode not in LABEL_MODES or (image.mode == "P" and palette is not None)
    pixels = np.asarray(image.convert("RGB") if coloured else image)
    if not coloured:
        return pixels.astype(np.int64)
    if palette is None:
        raise UserError(f'the label map "{path}" is a colour image; give the label of each colour with {option}')
    return _labels_of_colours(path, pixels, palette)


def without_alpha(image: Image) -> Image:
    """Return a grey image without its alpha channel, and any other image unchanged: transparent pixels have labels."""
    return image.getchannel("L") if image.mode == "LA" else image


def _labels_of_colours(path: Path, pixels: np.ndarray, palette: Mapping[str, int]) -> np.ndarray:
    import numpy as np

    red, green, blue = np.moveaxis(pixels.astype(np.int64), -1, 0)
    colours, indices, counts = np.unique(red << 16 | green << 8 | blue, return_inverse=True, return_counts=True)
    names = [f"#{colour:06x}" for colour in colours]
    unknown = [i for i, name in enumerate(names) if name not in palette]
    if unknown:
        most = max(unknown, key=lambda i: counts[i])
        raise UserError(
            f'the palette lacks {len(unknown)} of the colours of the label map "{path}", most frequently {names[most]} '
            f"in {counts[most]} pixels; add them, or save the map as a PNG without anti-aliasing"
        )
    return np.array([palette[name] for name in names])[indices].reshape(red.shape)


def resize_nearest(labels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return a label map (H, W) resized to (height, width) by nearest-neighbour interpolation.

    Each position takes the label at its centre.
    """
    import numpy as np

    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(int) for new, old in zip((height, width), labels.shape, strict=True)
    )
    return labels[rows[:, None], columns]
