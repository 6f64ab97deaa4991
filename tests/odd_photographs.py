"""Folder of 64 small photographs as users have them: modes, formats, sizes and faults of all kinds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle")
COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 220), "yellow": (230, 210, 50)}
COUNT = 64
DAMAGED = "square/photo 07.jpg"
COPIES = ("square/photo 10.png", "square/photo 13.png")
ROTATED = "triangle/photo 05.jpg"  # by its EXIF data, from 80 × 48 to 48 × 80


def write_odd_photographs(folder: Path) -> Path:
    """Write 64 image files with captions beside them, one folder for each shape: one is damaged, two are equal."""
    for number in range(COUNT):
        shape = SHAPES[number % len(SHAPES)]
        colour = list(COLOURS)[number % len(COLOURS)]
        path = folder / shape / f"photo {number:02}{_suffix(number)}"
        path.parent.mkdir(parents=True, exist_ok=True)
        _save(_photograph(shape, colour, number), path, number)
        caption = f"A {colour} {shape} on a {'bright' if number % 2 else 'dark'} ground, number {number}.\n"
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    damaged = folder / DAMAGED
    damaged.write_bytes(damaged.read_bytes()[:-300])
    (folder / COPIES[1]).write_bytes((folder / COPIES[0]).read_bytes())
    (folder / "notes.md").write_text("not an image")
    (folder / ".hidden.png").write_bytes(b"")
    return folder


def _suffix(number: int) -> str:
    if number in (10, 13):
        return ".png"
    return (".jpg", ".jpg", ".png", ".webp", ".png", ".jpg", ".tif", ".jpg")[number % 8]


def _photograph(shape: str, colour: str, number: int) -> Image.Image:
    """Return a shape on a gradient with noise, of an odd size of at least 41 pixels a side."""
    random = np.random.default_rng(number)
    width, height = int(random.integers(41, 90)), int(random.integers(41, 70))
    if number == 5:
        width, height = 80, 48
    ground = np.linspace(150 if number % 2 else 30, 220 if number % 2 else 90, width)[None, :, None]
    pixels = ground + random.normal(0, 4, (height, width, 3))
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    draw, side = ImageDraw.Draw(image), min(width, height) // 2
    left, top = (width - side) // 2, (height - side) // 2
    box = (left, top, left + side, top + side)
    if shape == "circle":
        draw.ellipse(box, fill=COLOURS[colour])
    elif shape == "square":
        draw.rectangle(box, fill=COLOURS[colour])
    else:
        draw.polygon([(left, top + side), (left + side, top + side), (left + side // 2, top)], fill=COLOURS[colour])
    return image


def _save(image: Image.Image, path: Path, number: int) -> None:
    kind, options = number % 8, {}
    if path.suffix == ".jpg":
        image = image.convert("CMYK") if kind == 7 else image.convert("L") if kind == 1 else image
        if number == 5:
            exif = Image.Exif()
            exif[0x0112] = 6
            options["exif"] = exif
    elif path.suffix == ".png" and kind == 2:
        image = image.quantize(32)
    elif path.suffix == ".png":
        image.putalpha(200)
    elif path.suffix == ".tif":
        grey = np.asarray(image.convert("L")).astype(np.uint16)
        image = Image.fromarray(grey * 257)
    image.save(path, **options)
