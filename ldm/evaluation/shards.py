"""Images in shards of WebDataset: tar archives."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import NoReturn

from ldm.errors import UserError
from ldm.evaluation.image_sets import ImageSet, Named, ahead, hash_of, read_pixels, stamp_of
from ldm.io.image_formats import image_suffixes
from ldm.io.tar import BadTar, TarMember, iterate_tar, open_tar

SHARD = re.compile(r"\.tar(\.gz|\.bz2|\.xz)?$")  # end of the name of a shard, or of a pattern of names


@dataclass
class ShardImages(ImageSet):
    """Images in tar archives, in the order of the archives and of their members; other members are passed over.

    Args:
        pattern: names of the archives, such as `samples/{000..123}.tar`; see `ldm.data.shard_files.find_shards`.
        side: use the centred square of each image, resized to this side and converted to RGB. Default: images as they
            are, which must be RGB with 8 bits.
        limit: use only the first images; default: all.
    """

    pattern: str
    side: int | None = None
    limit: int | None = None

    @property
    def name(self) -> str:
        """Name of the set in messages."""
        return f'"{self.pattern}"'

    @property
    def preparation(self) -> str:
        """Preparation of the images."""
        return "none" if self.side is None else f"centred square, Lanczos to {self.side} px, RGB"

    @cached_property
    def files(self) -> list[str]:
        """Paths of the archives.

        Raises:
            UserError: an archive is missing, or is not a file.
        """
        from ldm.data.shard_files import find_shards

        files = find_shards(self.pattern, "", self.name, 0.0)
        for file in files:
            if not os.path.isfile(file):
                raise UserError(f'the shard "{file}" is not a file on this machine; download it first')
        return files

    @cached_property
    def _count(self) -> int:
        """Number of images.

        Raises:
            UserError: an archive is damaged, there is no image, or there are fewer than `limit`.
        """
        count = sum(1 for _ in self._members())
        if not count:
            raise UserError(f"there is no image in {self.name}; give archives with PNG, JPEG or WebP files")
        if self.limit is not None and self.limit > count:
            raise UserError(f"{self.name} has {count} images, fewer than --n {self.limit}")
        return count

    def __len__(self) -> int:
        return self._count if self.limit is None else min(self.limit, self._count)

    def key(self) -> str:
        """Return a hash of the names, sizes and times of change of the archives, and of the preparation."""
        stamps = [[os.path.abspath(file), *stamp_of(Path(file))] for file in self.files]
        return hash_of("shards", stamps, self.preparation, len(self))

    def images(self, start: int = 0) -> Iterator[Named]:
        """Yield the name and the pixels of each image from the index `start` on."""
        return ahead(self._pixels, self._contents(start))

    def _pixels(self, content: tuple[str, bytes]) -> Named:
        name, data = content
        return name, read_pixels(Path(name), self.side, data)

    def _contents(self, start: int) -> Iterator[tuple[str, bytes]]:
        """Yield the name and the content of each image file.

        Raises:
            UserError: an archive is damaged.
        """
        for number, (file, member) in enumerate(self._members()):
            if number >= len(self):
                return
            if number >= start:
                try:
                    content = member.read()
                except BadTar as error:
                    _damaged(file, f'"{member.name}" {error}')
                yield f"{file}/{member.name}", content

    def _members(self) -> Iterator[tuple[str, TarMember]]:
        """Yield the archive and the member of each image.

        Raises:
            UserError: an archive is damaged.
        """
        suffixes = image_suffixes()
        for file in self.files:
            try:
                with open(file, "rb") as opened:
                    for member in iterate_tar(open_tar(opened), partial(_damaged, file)):
                        if os.path.splitext(member.name)[1].lower() in suffixes:
                            yield file, member
            except BadTar as error:
                _damaged(file, str(error))


def _damaged(file: str, reason: str) -> NoReturn:
    raise UserError(f'the shard "{file}" is damaged: {reason}; replace it')
