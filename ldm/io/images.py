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

    image = open_image(path)
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    return (pixels.float() / 127.5 - 1.0).contiguous()


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
