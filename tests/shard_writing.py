"""Miniature shards in the format that img2dataset writes for LAION, made with the package `webdataset` or by hand."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

from images_on_disk import pixels
from PIL import Image


def encoded(height: int = 24, width: int = 36, seed: int = 0, kind: str = "JPEG") -> bytes:
    """Return an image file of smooth colours."""
    buffer = io.BytesIO()
    Image.fromarray(pixels(height, width, seed)).save(buffer, format=kind)
    return buffer.getvalue()


def record(key: str, **values: object) -> dict[str, object]:
    """Return a record with the fields of LAION-2B as img2dataset writes it."""
    return {
        "caption": f"a caption of {key}",
        "url": f"https://example.org/{key}.jpg",
        "key": key,
        "status": "success",
        "error_message": None,
        "width": 36,
        "height": 24,
        "original_width": 360,
        "original_height": 240,
        "exif": "{}",
        "NSFW": "UNLIKELY",
        "similarity": 0.31,
        "pwatermark": 0.1,
        "punsafe": 0.01,
        **values,
    }


def sample(key: str, seed: int = 0, **values: object) -> dict[str, bytes]:
    """Return the files of a sample by their suffixes."""
    return {
        "jpg": encoded(seed=seed),
        "txt": f"a caption of {key}".encode(),
        "json": json.dumps(record(key, **values)).encode(),
    }


def write_shard(path: Path, samples: Mapping[str, Mapping[str, bytes]], mode: str = "w") -> Path:
    """Write a shard of samples, key → suffix → content; `mode` is that of `tarfile.open`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for key, files in samples.items():
            for suffix, content in files.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


def write_shards(folder: Path, shards: int = 3, size: int = 4, first: int = 0) -> list[str]:
    """Write numbered shards of `size` samples each and return the keys of all samples."""
    keys = []
    for shard in range(shards):
        own = [f"{shard:05}{number:04}" for number in range(first, first + size)]
        write_shard(folder / f"{shard:05}.tar", {key: sample(key, seed=int(key)) for key in own})
        keys += own
    return keys
