"""Compose images: grids, contact sheets, rendered text and boxes."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ldm.io.pixels import to_batch, to_uint8

# Colours of boxes, in the order of their labels. Each is dark enough to read on white.
BOX_COLOURS = ("crimson", "royalblue", "darkgreen", "darkorange", "purple", "teal", "saddlebrown", "deeppink")


def make_grid(x: Tensor | np.ndarray, nrow: int = 8, padding: int = 2) -> np.ndarray:
    """Arrange images in rows of `nrow` on a black background.

    Args:
        x: `(B, C, H, W)` in [-1, 1], or `(B, H, W, C)` uint8.
        nrow: images per row.
        padding: pixels around each image; a single image gets none.

    Returns:
        `(H', W', 3)` uint8.
    """
    images = to_uint8(x)
    if images.ndim != 4 or len(images) == 0:
        raise ValueError(f"a grid needs images of shape (B, C, H, W), got {tuple(x.shape)}")
    images = np.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images[..., :3]
    if len(images) == 1:
        return images[0]
    count, height, width, _ = images.shape
    columns = min(nrow, count)
    rows = -(-count // columns)
    grid = np.zeros((rows * (height + padding) + padding, columns * (width + padding) + padding, 3), np.uint8)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        top, left = padding + row * (height + padding), padding + column * (width + padding)
        grid[top : top + height, left : left + width] = image
    return grid


def make_sheet(rows: Sequence[Sequence[np.ndarray]], columns: int = 1) -> np.ndarray:
    """Arrange groups of images, `columns` groups per row, on a black background; smaller images are centred.

    Args:
        rows: groups of the same number of images, each `(H, W, 3)` uint8 of any size.
        columns: groups per row.

    Returns:
        `(H', W', 3)` uint8.
    """
    images = [image for row in rows for image in row]
    height, width = (max(image.shape[axis] for image in images) for axis in (0, 1))
    cells = np.zeros((len(images), height, width, 3), np.uint8)
    for cell, image in zip(cells, images, strict=True):
        top, left = (height - image.shape[0]) // 2, (width - image.shape[1]) // 2
        cell[top : top + image.shape[0], left : left + image.shape[1]] = image
    return make_grid(cells, columns * len(rows[0]))


def shrink(image: np.ndarray, side: int) -> np.ndarray:
    """Average `image` (H, W, 3) uint8 down to sides of at most `side` pixels; a smaller image is returned unchanged."""
    from PIL import Image

    if max(image.shape[:2]) <= side:
        return image
    factor = side / max(image.shape[:2])
    height, width = (max(1, round(length * factor)) for length in image.shape[:2])
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BOX))


def log_txt_as_img(wh: tuple[int, int], xc: Sequence[str], size: int = 10) -> Tensor:
    """Render texts as images, black on white, wrapped to the width.

    Args:
        wh: width and height in pixels.
        xc: B texts.
        size: font size in pixels.

    Returns:
        `(B, 3, H, W)` float32 in [-1, 1].
    """
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size)
    letters = max(1, int(wh[0] / font.getlength("n")))
    images = []
    for text in xc:
        image = Image.new("RGB", tuple(wh), "white")
        wrapped = "\n".join(textwrap.wrap(str(text), letters))
        ImageDraw.Draw(image).text((0, 0), wrapped, fill="black", font=font)
        images.append(np.array(image))
    return to_batch(images)


def draw_boxes(wh: tuple[int, int], boxes: Sequence[Sequence[float]], labels: Sequence[str], size: int = 10) -> Tensor:
    """Draw outlines of boxes on white, each with its label in the upper left corner.

    Args:
        wh: width and height in pixels.
        boxes: (left, top, right, bottom) of each box in [0, 1]; parts outside are cut off.
        labels: label of each box; equal labels have the same colour.
        size: font size in pixels.

    Returns:
        `(3, H, W)` float32 in [-1, 1].
    """
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", tuple(wh), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size)
    order = sorted(set(labels))
    colours = [BOX_COLOURS[order.index(label) % len(BOX_COLOURS)] for label in labels]
    corners = []
    for left, top, right, bottom in boxes:
        (x0, x1), (y0, y1) = sorted((left, right)), sorted((top, bottom))
        corners.append([round(value * (n - 1)) for value, n in zip((x0, y0, x1, y1), (*wh, *wh), strict=True)])
    for box, colour in zip(corners, colours, strict=True):
        draw.rectangle(box, outline=colour)
    for (x0, y0, *_), colour, label in zip(
        corners, colours, labels, strict=True
    ):  # text last, so that no line covers it
        draw.text((max(x0, 0) + 2, max(y0, 0) + 1), label, fill=colour, font=font)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1.0
