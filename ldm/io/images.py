"""Read and write image files."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.io.files import atomic_path

if TYPE_CHECKING:
    from PIL.Image import Image


def open_image(path: str | os.PathLike[str], keep_alpha: bool = False) -> Image:
    """Open an image file as an RGB image, rotated as its EXIF data says, with transparent parts white.

    The first frame of an animation counts. Channels of 16 bits are converted to 8. Channels of 32 bits are an error,
    because nothing states which value is white.

    Args:
        path: any file that Pillow reads.
        keep_alpha: return an image with transparency as RGBA.

    Raises:
        UserError: the file is missing, is not an image, is truncated, or has more pixels than Pillow's limit (twice
            `PIL.Image.MAX_IMAGE_PIXELS`, 179 million).
    """
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # starts at half the limit
            with Image.open(path) as file:
                image = in_8_bits(ImageOps.exif_transpose(file), file.format)
        return image.convert("RGBA") if keep_alpha and image.has_transparency_data else as_rgb(image)
    except FileNotFoundError:
        raise UserError(f'there is no image "{path}"; check the path') from None
    except Image.DecompressionBombError:
        limit = f"{2 * Image.MAX_IMAGE_PIXELS // 10**6} million pixels"
        raise UserError(f'the image "{path}" has more than {limit}; give a smaller one') from None
    except Exception as error:  # Pillow raises many types of errors for damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f'cannot read the image "{path}": {reason}; give a PNG, JPEG or WebP file') from None


def as_rgb(image: Image) -> Image:
    """Return a Pillow image in mode RGB; transparent parts become white."""
    from PIL import Image

    image = in_8_bits(image, image.format)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def in_8_bits(image: Image, kind: str | None) -> Image:
    """Convert grey values of 16 bits to 8, which Pillow would clip at 255; `kind` is the format of the file."""
    from PIL import Image

    # Pillow's mode for 32 bits. PNG and PGM have no such values: in them the mode stands for 16 bits.
    if image.mode.startswith("I;16") or (image.mode == "I" and kind in ("PNG", "PPM")):
        levels = (np.asarray(image).astype(np.uint32) * 255 + 32767) // 65535
        return Image.fromarray(levels.astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("its pixels have 32 bits, and nothing states which value is white; save it with 8 or 16")
    return image


def load_image(path: str | os.PathLike[str], size: int | tuple[int, int] | None = None) -> Tensor:
    """Read an image as `(1, 3, H, W)` float32 in [-1, 1]; transparent parts become white.

    Args:
        path: any file that Pillow reads; the rotation in its EXIF data is applied.
        size: `(height, width)`, or one number for both; the largest centred crop of that shape is resized.

    Raises:
        UserError: the file is missing or is not an image.
    """
    from PIL import Image, ImageOps

    image = open_image(path)
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    return (pixels.float() / 127.5 - 1.0).contiguous()


def save_png(image: np.ndarray | Image, path: str | os.PathLike[str], text: Mapping[str, object] | None = None) -> None:
    """Write a PNG, completely or not at all.

    Args:
        image: `(H, W, 3)`, `(H, W, 1)` or `(H, W)` uint8, or a Pillow image.
        path: the file; a missing folder is created.
        text: text chunks to store, which `PIL.Image.open(path).text` returns.

    Raises:
        UserError: the file cannot be written.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    if isinstance(image, np.ndarray):
        image = Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image)
    info = PngInfo()
    for key, value in (text or {}).items():
        info.add_text(key, str(value).encode(errors="backslashreplace").decode())  # file names may not be valid text
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


def next_index(folder: str | os.PathLike[str], prefix: str = "") -> int:
    """Return the number after the highest among the files `<prefix><number>.png` in `folder`; 0 without such files."""
    numbered = re.compile(re.escape(prefix) + r"(\d+)\.png")
    names = os.listdir(folder) if Path(folder).is_dir() else []
    return max((int(match[1]) + 1 for name in names if (match := numbered.fullmatch(name))), default=0)
