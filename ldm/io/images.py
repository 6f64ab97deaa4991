"""Read and write image files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.io.files import atomic_path, write_new
from ldm.io.image_formats import readable_formats
from ldm.io.image_metadata import avif_without_exif, without_metadata
from ldm.io.pillow_messages import hidden

if TYPE_CHECKING:
    from PIL.Image import Image


# Values of the EXIF tag "Orientation" → the transposition that shows the image upright.
ORIENTATION_TAG = 0x0112
TRANSPOSITIONS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


def decode_image(
    path: str | os.PathLike[str],
    noun: str = "image",
    advice: str = "give a PNG, JPEG or WebP file",
    data: bytes | None = None,
    min_side: int | None = None,
) -> Image:
    """Decode an image file in the mode in which it stores its pixels, rotated as its EXIF data says.

    The first frame of an animation counts. Metadata never decides whether a file can be read: an orientation that
    cannot be read is ignored.

    Args:
        path: a file in one of `ldm.io.image_formats.FORMATS`.
        noun: name of the content in error messages.
        advice: end of the message about a file that cannot be read.
        data: the content of the file, if it has been read already; `path` is then only its name in messages.
        min_side: decode a JPEG at 1/2, 1/4 or 1/8 of its size, as long as no side becomes smaller than this.

    Raises:
        UserError: the file is missing, is not an image, is truncated, or has more pixels than Pillow's limit (twice
            `PIL.Image.MAX_IMAGE_PIXELS`, 179 million).
    """
    with _reading(path, noun, advice):
        source, info = without_metadata(path, data)
        try:
            return _decode(source, info, min_side)
        except Exception:
            without_exif = avif_without_exif(path, data)
            if without_exif is None:
                raise
            return _decode(without_exif, info)


def _decode(
    source: str | os.PathLike[str] | BytesIO, info: Mapping[str, str | bytes], min_side: int | None = None
) -> Image:
    """Decode an image file whose metadata has been separated from it."""
    from PIL import Image

    with Image.open(source, formats=readable_formats()) as file:
        if min_side is not None and file.format in ("JPEG", "MPO"):
            file.draft(None, (min_side, min_side))
        file.load()
        file.info.update(info)
        image = _upright(file)
        image.format = file.format
        return image


def has_readable_header(path: str | os.PathLike[str]) -> bool:
    """Return whether the header of a file is that of an image that `open_image` reads; no pixels are decoded."""
    from PIL import Image

    try:
        with hidden(), Image.open(path, formats=readable_formats()) as file:
            return not _has_32_bits(file.mode, file.format)
    except Exception:  # Pillow raises many types of errors for damaged files
        return False


def open_image(
    path: str | os.PathLike[str], keep_alpha: bool = False, data: bytes | None = None, min_side: int | None = None
) -> Image:
    """Open an image file as an RGB image, rotated as its EXIF data says, with transparent parts white.

    The first frame of an animation counts. Channels of 16 bits are converted to 8. Channels of 32 bits are an error,
    because nothing states which value is white.

    Args:
        path: see `decode_image`.
        keep_alpha: return an image with transparency as RGBA.
        data, min_side: see `decode_image`.

    Raises:
        UserError: see `decode_image`.
    """
    image = decode_image(path, data=data, min_side=min_side)
    with _reading(path):
        image = in_8_bits(image, image.format)
        return image.convert("RGBA") if keep_alpha and image.has_transparency_data else as_rgb(image)


@contextmanager
def _reading(
    path: str | os.PathLike[str], noun: str = "image", advice: str = "give a PNG, JPEG or WebP file"
) -> Iterator[None]:
    """Convert the errors of reading an image file into a UserError, and hide Pillow's messages; see `decode_image`."""
    from PIL import Image, UnidentifiedImageError

    try:
        with hidden():
            yield
    except FileNotFoundError:
        raise UserError(f'there is no {noun} "{path}"; check the path') from None
    except Image.DecompressionBombError:
        limit = f"{2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6} million pixels"
        raise UserError(f'the {noun} "{path}" has more than {limit}; give a smaller one') from None
    except UnidentifiedImageError:
        raise UserError(f'cannot read the {noun} "{path}": it is not an image, or is damaged; {advice}') from None
    except Exception as error:  # Pillow raises many types of errors for damaged files
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise UserError(f'cannot read the {noun} "{path}": {reason}; {advice}') from None


def _upright(file: Image) -> Image:
    """Return a loaded image without its file, rotated as its metadata says; unchanged if that cannot be read."""
    from PIL.Image import Transpose

    try:
        method = TRANSPOSITIONS.get(file.getexif().get(ORIENTATION_TAG, 1))
    except Exception:  # Pillow raises many types of errors for damaged metadata
        method = None
    # The new image takes the pixels over. `copy` would take a tenth of the time of reading a JPEG.
    return file._new(file.im) if method is None else file.transpose(Transpose[method])


def as_rgb(image: Image) -> Image:
    """Return a Pillow image in mode RGB; transparent parts become white."""
    from PIL import Image

    image = in_8_bits(image, image.format)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def in_8_bits(image: Image, kind: str | None) -> Image:
    """Convert grey values of 16 bits to 8, which Pillow would clip at 255; `kind` is the format of the file."""
    from PIL import Image

    if _has_32_bits(image.mode, kind):
        raise ValueError("its pixels have 32 bits, and nothing states which value is white; save it with 8 or 16")
    if image.mode.startswith("I"):
        levels = (np.asarray(image).astype(np.uint32) * 255 + 32767) // 65535
        return Image.fromarray(levels.astype(np.uint8))
    return image


def _has_32_bits(mode: str, kind: str | None) -> bool:
    """Return whether pixels have 32 bits, from Pillow's mode and the format of the file.

    PNG and PGM have no such values: in them the mode "I" stands for 16 bits.
    """
    return mode == "F" or (mode == "I" and kind not in ("PNG", "PPM"))


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
    """Write a PNG, completely or not at all; an existing file is replaced.

    Args:
        image: `(H, W, 3)`, `(H, W, 1)` or `(H, W)` uint8, or a Pillow image.
        path: the file; a missing folder is created.
        text: text chunks to store, which `PIL.Image.open(path).text` returns.

    Raises:
        UserError: the file cannot be written.
    """
    with atomic_path(path) as temporary:
        _write_png(image, temporary, text or {})


def save_new_png(image: np.ndarray | Image, paths: Iterable[Path], text: Mapping[str, object] | None = None) -> Path:
    """Write a PNG under the first of `paths` that does not exist, and return that path; no file is ever replaced.

    Args:
        image: as for `save_png`.
        paths: paths in one folder, in order of preference.
        text: as for `save_png`.

    Raises:
        FileExistsError: all paths exist.
        UserError: the file cannot be written.
    """
    return write_new(paths, lambda temporary: _write_png(image, temporary, text or {}))


def _write_png(image: np.ndarray | Image, path: Path, text: Mapping[str, object]) -> None:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    if isinstance(image, np.ndarray):
        image = Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image)
    info = PngInfo()
    for key, value in text.items():
        info.add_text(key, str(value).encode(errors="backslashreplace").decode())  # file names may not be valid text
    image.save(path, format="PNG", pnginfo=info)


def next_index(folder: str | os.PathLike[str], prefix: str = "") -> int:
    """Return the number after the highest among the files `<prefix><number>.png` in `folder`; 0 without such files."""
    numbered = re.compile(re.escape(prefix) + r"(\d+)\.png")
    names = os.listdir(folder) if Path(folder).is_dir() else []
    return max((int(match[1]) + 1 for name in names if (match := numbered.fullmatch(name))), default=0)
