"""Formats of image files that are read, and their suffixes."""

from __future__ import annotations

from collections.abc import Collection
from functools import cache

# Formats that Pillow decodes itself. EPS runs Ghostscript, WMF needs Windows, IPTC contains a file of any format, and
# the rest has no decoder.
FORMATS = frozenset(
    (
        *("AVIF", "BLP", "BMP", "CUR", "DCX", "DDS", "DIB", "FITS", "FLI", "FTEX", "GBR", "GIF", "ICNS", "ICO", "IM"),
        *("IMT", "JPEG", "JPEG2000", "MCIDAS", "MPO", "MSP", "PCD", "PCX", "PIXAR", "PNG", "PPM", "PSD", "QOI", "SGI"),
        *("SPIDER", "SUN", "TGA", "TIFF", "WEBP", "XBM", "XPM", "XVTHUMB"),
    )
)
LOSSY = frozenset({"AVIF", "JPEG", "JPEG2000", "MPO"})  # formats that do not keep numbers such as labels


@cache
def readable_formats() -> tuple[str, ...]:
    """Return the formats that this version of Pillow reads, in the order in which it tries them."""
    from PIL import Image

    Image.preinit()  # the common formats come first
    Image.init()
    return tuple(name for name in Image.ID if name in FORMATS)


@cache
def image_suffixes(without: Collection[str] = frozenset()) -> tuple[str, ...]:
    """Return the suffixes of image files, such as ".png", in lower case and sorted.

    Args:
        without: formats to leave out.
    """
    from PIL import Image

    wanted = {*readable_formats(), "MPO"} - {*without}
    return tuple(sorted(suffix for suffix, name in Image.registered_extensions().items() if name in wanted))
