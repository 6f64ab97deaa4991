"""Pictures: reading, saving, value ranges and grids.

Legend: B pictures, C channels, H × W pixels. Models see float tensors in [-1, 1]; files hold uint8.
"""

from __future__ import annotations

import os
import re
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ldm.files import atomic_path
from ldm.util import UserError, did_you_mean

if TYPE_CHECKING:
    from PIL.Image import Image

# Far above float32's error at 255 and far below one level: pictures survive reading and writing unchanged.
_ROUNDING = 1 / 1024
# Of boxes, by the order of their labels: dark enough to read on white.
BOX_COLOURS = ("crimson", "royalblue", "darkgreen", "darkorange", "purple", "teal", "saddlebrown", "deeppink")


def open_picture(path: str | os.PathLike[str], keep_alpha: bool = False) -> Image:
    """A picture as Pillow's RGB image: turned as the camera noted, transparent parts white, of an animation the first.

    Sixteen bits a channel become eight; more would need to know which value is white.

    Args:
        path: any file that Pillow reads.
        keep_alpha: give a picture that has transparency as RGBA instead.

    Raises:
        UserError: the file is missing, is no picture, is cut short, or has more than Pillow's limit of pixels (twice
            `PIL.Image.MAX_IMAGE_PIXELS`, 179 million).
    """
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # from half the limit on
            with Image.open(path) as file:
                image = _in_8_bits(ImageOps.exif_transpose(file), file.format)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            if keep_alpha:
                return image
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except FileNotFoundError:
        raise UserError(f'there is no picture "{path}"; check the path') from None
    except Image.DecompressionBombError:
        limit = f"{2 * Image.MAX_IMAGE_PIXELS // 10**6} million pixels"
        raise UserError(f'the picture "{path}" has more than {limit}; give a smaller one') from None
    except Exception as error:  # Pillow's readers raise anything on damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f'cannot read the picture "{path}": {reason}; give a PNG, JPEG or WebP file') from None


def _in_8_bits(image: Image, kind: str | None) -> Image:
    """Grey values of sixteen bits, which Pillow would cut off at 255, brought to eight; `kind` is the file's format."""
    from PIL import Image

    # Pillow's name for 32 bits, which neither PNG nor PGM has: there it holds 16.
    if image.mode.startswith("I;16") or (image.mode == "I" and kind in ("PNG", "PPM")):
        levels = (np.asarray(image).astype(np.uint32) * 255 + 32767) // 65535
        return Image.fromarray(levels.astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("its pixels have 32 bits, and nothing says which value is white; save it with 8 or 16")
    return image


def load_image(path: str | os.PathLike[str], size: int | tuple[int, int] | None = None) -> Tensor:
    """Read a picture as `(1, 3, H, W)` float32 in [-1, 1]; transparent parts become white.

    Args:
        path: any file that Pillow reads; a rotation noted by a camera is applied.
        size: `(height, width)`, or one number for both: the largest centred part of that shape, resized.

    Raises:
        UserError: the file is missing or is no picture.
    """
    from PIL import Image, ImageOps

    image = open_picture(path)
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    return (pixels.float() / 127.5 - 1.0).contiguous()


def chosen_size(size: tuple[int, int], height: int | None, width: int | None) -> tuple[int, int]:
    """(height, width) that was asked for; where one was not, it keeps the proportions of `size`, else `size` itself."""
    if height is None and width is None:
        return size
    if height is None:
        return max(1, round(width * size[0] / size[1])), width
    return height, width or max(1, round(height * size[1] / size[0]))


def pad_to_multiple(x: np.ndarray, multiple: int) -> np.ndarray:
    """`x` (H, W, …), mirrored at its lower and right border until both sides are multiples of `multiple`.

    Two of it at least: of a single one a network would normalise maps of one position.
    """
    missing = [(0, max(-side % multiple, 2 * multiple - side)) for side in x.shape[:2]]
    return np.pad(x, [*missing, *[(0, 0)] * (x.ndim - 2)], mode="reflect")


def to_batch(pictures: Sequence[np.ndarray]) -> Tensor:
    """Pictures `(H, W, 3)` uint8 of one size as `(B, 3, H, W)` float32 in [-1, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def batch_entry(batch: Mapping[str, Any], key: str) -> Any:
    """Entry `key` of a batch.

    Raises:
        UserError: the data set gives no such entry.
    """
    if key not in batch:
        raise UserError(f'the dataset gives no "{key}"{did_you_mean(key, batch)}; it gives {", ".join(batch)}')
    return batch[key]


def batch_images(batch: Mapping[str, Any], key: str) -> Tensor:
    """Pictures of a batch, `(B, H, W, C)` or `(B, H, W)`, as contiguous float32 `(B, C, H, W)`.

    Raises:
        UserError: the data set gives no such entry.
    """
    x = batch_entry(batch, key)
    x = x[..., None] if x.dim() == 3 else x
    return x.movedim(-1, 1).to(torch.float32, memory_format=torch.contiguous_format)


def in_random_colours(maps: Tensor, colours: Tensor | None = None) -> Tensor:
    """Maps `(B, C, H, W)` with any number of channels as pictures `(B, 3, H, W)` in [-1, 1].

    Args:
        colours: `(3, C, 1, 1)`; by default random ones, the same each time, that take nothing from the global seed.
    """
    if colours is None:
        colours = torch.randn(3, maps.shape[1], 1, 1, generator=torch.Generator().manual_seed(0))
    x = torch.nn.functional.conv2d(maps, colours.to(maps))
    low, high = x.aminmax()
    return 2.0 * (x - low) / (high - low).clamp_min(1e-12) - 1.0


def to_uint8(x: Tensor | np.ndarray) -> np.ndarray:
    """Turn values in [-1, 1] into pixels, channels last; out-of-range values are clipped, uint8 passes unchanged.

    Args:
        x: `(..., C, H, W)` or `(..., H, W, C)` with C of 1, 3 or 4; where both readings fit, channels come first.

    Returns:
        `(..., H, W, C)` uint8. Levels are rounded down, as in the published pictures.
    """
    array = x.detach().float().cpu().numpy() if isinstance(x, Tensor) and x.dtype != torch.uint8 else np.asarray(x)
    if array.ndim < 3 or not {array.shape[-1], array.shape[-3]} & {1, 3, 4}:
        raise ValueError(f"pictures have 1, 3 or 4 channels, got the shape {array.shape}")
    if array.shape[-3] in (1, 3, 4):
        array = np.moveaxis(array, -3, -1)
    if array.dtype != np.uint8:
        levels = (array.astype(np.float32) + 1.0) * 127.5 + _ROUNDING
        array = np.nan_to_num(levels).clip(0, 255).astype(np.uint8)
    return np.ascontiguousarray(array)


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


def save_png(image: np.ndarray | Image, path: str | os.PathLike[str], text: Mapping[str, object] | None = None) -> None:
    """Write a PNG, whole or not at all.

    Args:
        image: `(H, W, 3)`, `(H, W, 1)` or `(H, W)` uint8, or a Pillow image.
        path: the file; its folder is made when missing.
        text: stored as text chunks, which `PIL.Image.open(path).text` gives back.

    Raises:
        UserError: the place cannot be written to.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    if isinstance(image, np.ndarray):
        image = Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image)
    info = PngInfo()
    for key, value in (text or {}).items():
        info.add_text(key, str(value).encode(errors="backslashreplace").decode())  # names of files may be no text
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


def next_index(folder: str | os.PathLike[str], prefix: str = "") -> int:
    """One more than the highest number among the files `<prefix><number>.png` in `folder`, or 0."""
    numbered = re.compile(re.escape(prefix) + r"(\d+)\.png")
    names = os.listdir(folder) if Path(folder).is_dir() else []
    return max((int(match[1]) + 1 for name in names if (match := numbered.fullmatch(name))), default=0)


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
