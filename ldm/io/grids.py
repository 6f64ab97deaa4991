"""Compose images: grids, contact sheets, rendered text and boxes."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ldm.io.pixels import to_batch, to_uint8

if TYPE_CHECKING:
    pass

# Of boxes, by the order of their labels: dark enough to read on white.
BOX_COLOURS = ("crimson", "royalblue", "darkgreen", "darkorange", "purple", "teal", "saddlebrown", "deeppink")


def make_grid(x: Tensor | np.ndarray, nrow: int = 8, padding: int = 2) -> np.ndarray:
    """Lay pictures out in rows of `nrow` on black.

    Args:
        x: `(B, C, H, W)` in [-1, 1], or `(B, H, W, C)` uint8.
        nrow: pictures in a row.
        padding: pixels around each; a single picture gets none.

    Returns:
        `(H', W', 3)` uint8.
    """
    pictures = to_uint8(x)
    if pictures.ndim != 4 or len(pictures) == 0:
        raise ValueError(f"a grid needs pictures of shape (B, C, H, W), got {tuple(x.shape)}")
    pictures = np.repeat(pictures, 3, axis=-1) if pictures.shape[-1] == 1 else pictures[..., :3]
    if len(pictures) == 1:
        return pictures[0]
    count, height, width, _ = pictures.shape
    columns = min(nrow, count)
    rows = -(-count // columns)
    grid = np.zeros((rows * (height + padding) + padding, columns * (width + padding) + padding, 3), np.uint8)
    for index, picture in enumerate(pictures):
        row, column = divmod(index, columns)
        top, left = padding + row * (height + padding), padding + column * (width + padding)
        grid[top : top + height, left : left + width] = picture
    return grid


def make_sheet(rows: Sequence[Sequence[np.ndarray]], columns: int = 1) -> np.ndarray:
    """Groups of pictures, `columns` groups in a row, on black; smaller pictures stand in the middle of their place.

    Args:
        rows: groups of equally many pictures, each `(H, W, 3)` uint8 of any size.

    Returns:
        `(H', W', 3)` uint8.
    """
    pictures = [picture for row in rows for picture in row]
    height, width = (max(picture.shape[axis] for picture in pictures) for axis in (0, 1))
    places = np.zeros((len(pictures), height, width, 3), np.uint8)
    for place, picture in zip(places, pictures, strict=True):
        top, left = (height - picture.shape[0]) // 2, (width - picture.shape[1]) // 2
        place[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return make_grid(places, columns * len(rows[0]))


def shrink(image: np.ndarray, side: int) -> np.ndarray:
    """`image` (H, W, 3) uint8, averaged down so that no side is longer than `side`; a smaller one as it is."""
    from PIL import Image

    if max(image.shape[:2]) <= side:
        return image
    factor = side / max(image.shape[:2])
    height, width = (max(1, round(length * factor)) for length in image.shape[:2])
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BOX))


def log_txt_as_img(wh: tuple[int, int], xc: Sequence[str], size: int = 10) -> Tensor:
    """Each text as a picture, black on white, wrapped to the width.

    Args:
        wh: width and height in pixels.
        xc: B texts.
        size: of the letters, in pixels.

    Returns:
        `(B, 3, H, W)` float32 in [-1, 1].
    """
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size)
    letters = max(1, int(wh[0] / font.getlength("n")))
    pictures = []
    for text in xc:
        picture = Image.new("RGB", tuple(wh), "white")
        wrapped = "\n".join(textwrap.wrap(str(text), letters))
        ImageDraw.Draw(picture).text((0, 0), wrapped, fill="black", font=font)
        pictures.append(np.array(picture))
    return to_batch(pictures)


def draw_boxes(wh: tuple[int, int], boxes: Sequence[Sequence[float]], labels: Sequence[str], size: int = 10) -> Tensor:
    """Outlines of boxes on white, each with its label in its upper left corner.

    Args:
        wh: width and height in pixels.
        boxes: (left, top, right, bottom) of each in [0, 1]; parts outside are cut off.
        labels: what each shows; the same label has the same colour.
        size: of the letters, in pixels.

    Returns:
        `(3, H, W)` float32 in [-1, 1].
    """
    from PIL import Image, ImageDraw, ImageFont

    picture = Image.new("RGB", tuple(wh), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size)
    order = sorted(set(labels))
    colours = [BOX_COLOURS[order.index(label) % len(BOX_COLOURS)] for label in labels]
    corners = []
    for left, top, right, bottom in boxes:
        (x0, x1), (y0, y1) = sorted((left, right)), sorted((top, bottom))
        corners.append([round(value * (n - 1)) for value, n in zip((x0, y0, x1, y1), (*wh, *wh), strict=True)])
    for box, colour in zip(corners, colours, strict=True):
        draw.rectangle(box, outline=colour)
    for (x0, y0, *_), colour, label in zip(corners, colours, labels, strict=True):  # after all lines, to stay legible
        draw.text((max(x0, 0) + 2, max(y0, 0) + 1), label, fill=colour, font=font)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1.0
