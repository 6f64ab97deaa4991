"""Compose images: grids, contact sheets, rendered text and boxes."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ldm.io.pixels import to_batch, to_uint8

PADDING = 2  # pixels around each image of a grid
SHEET_GROUPS = 256  # groups of images that a sheet shows at most
SHEET_SIDE = 1024  # longest side of an image in a sheet, in pixels
SHEET_PIXELS = 40_000_000  # of a sheet: 120 MB

# Colours of boxes, in the order of their labels. Each is dark enough to read on white.
BOX_COLOURS = ("crimson", "royalblue", "darkgreen", "darkorange", "purple", "teal", "saddlebrown", "deeppink")


def make_grid(x: Tensor | np.ndarray, nrow: int = 8, padding: int = PADDING) -> np.ndarray:
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
    return _arrange(list(images), nrow, padding)


def make_sheet(rows: Sequence[Sequence[np.ndarray]], columns: int = 1) -> np.ndarray:
    """Arrange groups of images, `columns` groups per row, on a black background; smaller images are centred.

    Args:
        rows: groups of the same number of images, each `(H, W, 3)` uint8 of any size.
        columns: groups per row.

    Returns:
        `(H', W', 3)` uint8.
    """
    return _arrange([image for row in rows for image in row], columns * len(rows[0]), PADDING)


def _arrange(images: Sequence[np.ndarray], nrow: int, padding: int) -> np.ndarray:
    """Return images (H, W, 3) uint8 in cells of the largest height and width, each in the centre of its cell."""
    height, width = (max(image.shape[axis] for image in images) for axis in (0, 1))
    if len(images) == 1:
        return images[0]
    columns, rows = _cells(len(images), nrow)
    grid = np.zeros((rows * (height + padding) + padding, columns * (width + padding) + padding, 3), np.uint8)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        top = padding + row * (height + padding) + (height - image.shape[0]) // 2
        left = padding + column * (width + padding) + (width - image.shape[1]) // 2
        grid[top : top + image.shape[0], left : left + image.shape[1]] = image
    return grid


def _cells(count: int, nrow: int) -> tuple[int, int]:
    """Return the columns and rows of a grid of `count` images."""
    columns = min(nrow, count)
    return columns, -(-count // columns)


class ContactSheet:
    """Sheet of the images of a run, collected one group at a time, in bounded memory.

    The sheet has at most `SHEET_PIXELS` pixels. Images are shrunk as soon as those of the whole run would not fit.

    Args:
        count: groups that the run is expected to have.
        columns: groups per row.
    """

    def __init__(self, count: int, columns: int = 1) -> None:
        self.count, self.columns = min(count, SHEET_GROUPS), columns
        self.side = SHEET_SIDE  # longest side of an image
        self.rows: list[list[np.ndarray]] = []

    def add(self, group: Sequence[np.ndarray]) -> None:
        """Add the images of a group, `(H, W, 3)` uint8; groups after the first `SHEET_GROUPS` are left out."""
        if len(self.rows) == SHEET_GROUPS:
            return
        self.rows.append([shrink(image, self.side) for image in group])
        side = self._fitting_side()
        if side < self.side:
            self.side = side
            self.rows = [[shrink(image, side) for image in row] for row in self.rows]

    def _fitting_side(self) -> int:
        """Return the longest side at which a sheet of the expected number of groups is not too large."""
        sizes = {image.shape[:2] for row in self.rows for image in row}
        per_group = len(self.rows[0])
        columns, rows = _cells(max(self.count, len(self.rows)) * per_group, self.columns * per_group)
        side = self.side
        while True:
            shrunk = [_shrunk_size(size, side) for size in sizes]
            height, width = (max(size[axis] for size in shrunk) + PADDING for axis in (0, 1))
            pixels = rows * height * columns * width
            if pixels <= SHEET_PIXELS or side == 1:
                return side
            side = max(1, min(side - 1, int(side * math.sqrt(SHEET_PIXELS / pixels))))

    def image(self) -> np.ndarray:
        """Return the sheet, `(H', W', 3)` uint8."""
        return make_sheet(self.rows, self.columns)


def shrink(image: np.ndarray, side: int) -> np.ndarray:
    """Average `image` (H, W, 3) uint8 down to sides of at most `side` pixels; a smaller image is returned unchanged."""
    from PIL import Image

    height, width = size = _shrunk_size(image.shape[:2], side)
    if size == image.shape[:2]:
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BOX))


def _shrunk_size(size: tuple[int, ...], side: int) -> tuple[int, ...]:
    """Return the height and width of an image of `size` whose longest side is reduced to `side`."""
    if max(size) <= side:
        return size
    factor = side / max(size)
    return tuple(max(1, round(length * factor)) for length in size)


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
        image = Image.new("RGB", (wh[0], wh[1]), "white")
        wrapped = "\n".join(textwrap.wrap(str(text), letters))
        ImageDraw.Draw(image).text((0, 0), wrapped, fill="black", font=font)
        images.append(np.array(image))
    return to_batch(images)


def draw_boxes(
    wh: tuple[int, int],
    boxes: Sequence[Sequence[float]],
    labels: Sequence[str],
    size: int = 10,
    background: np.ndarray | None = None,
) -> Tensor:
    """Draw outlines of boxes, each with its label in the upper left corner.

    Args:
        wh: width and height in pixels.
        boxes: (left, top, right, bottom) of each box in [0, 1]; parts outside are cut off.
        labels: label of each box; equal labels have the same colour.
        size: font size in pixels.
        background: image (H, W, 3) uint8 to draw on, with white behind the labels; white by default.

    Returns:
        `(3, H, W)` float32 in [-1, 1].
    """
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", (wh[0], wh[1]), "white") if background is None else Image.fromarray(background)
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
        corner = (max(x0, 0) + 2, max(y0, 0) + 1)
        if background is not None:
            draw.rectangle(draw.textbbox(corner, label, font=font), fill="white")
        draw.text(corner, label, fill=colour, font=font)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1.0
