"""Index of the images and captions in shards on a disk, which can then be read in any order."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

from ldm.data.shards import FILE_NAME
from ldm.data.unreadable import PROGRESS_AFTER, shown_names
from ldm.errors import UserError
from ldm.io.tar import BadTar, TarMember, iterate_tar, open_tar
from ldm.io.text import decode

logger = logging.getLogger(__name__)


class ShardIndex:
    """Positions of the images in uncompressed shards, with their captions.

    Samples without an image or a caption, and damaged parts, are left out and counted in the log.

    Args:
        shards: the files.
        image_key, caption_key: suffixes of the images and of the texts.
        name: name of the data set in messages.

    Attributes:
        captions: the captions.

    Raises:
        UserError: a shard is compressed, or no sample is complete.
    """

    def __init__(self, shards: Sequence[Path], image_key: str, caption_key: str, name: str) -> None:
        from tqdm import tqdm

        self.shards, self.image_key = list(shards), image_key
        self.captions: list[str] = []
        self._keys: list[str] = []
        self._shard, self._offset, self._size = array("L"), array("Q"), array("Q")
        incomplete: list[str] = []
        damaged: list[str] = []
        for number, path in enumerate(tqdm(shards, "indexing shards", unit="shard", delay=PROGRESS_AFTER, leave=False)):
            try:
                self._add(number, path, caption_key, incomplete, damaged)
            except BadTar as error:
                damaged.append(f"{path} {error}")
        if not self.captions:
            wanted = f".{image_key} and .{caption_key}"
            raise UserError(f'{name}: no sample of "{self.shards[0]}" has {wanted}; set image_key and caption_key')
        for found, noun in ((damaged, "damaged parts"), (incomplete, "samples without image or caption")):
            if found:
                logger.warning("%s: %d %s of the shards are left out: %s", name, len(found), noun, shown_names(found))

    def __len__(self) -> int:
        return len(self.captions)

    def _add(self, number: int, path: Path, caption_key: str, incomplete: list[str], damaged: list[str]) -> None:
        with open(path, "rb") as source:
            file = open_tar(source)
            if file is not source:
                raise UserError(f'the shard "{path}" is compressed; decompress it, or use ldm.data.shards.ImageShards')
            for key, members, caption in _samples(
                iterate_tar(file, lambda reason: damaged.append(f"{path} {reason}")), caption_key
            ):
                image = members.get(self.image_key)
                if image is None or not caption:
                    incomplete.append(f"{path}/{key}")
                    continue
                self._keys.append(key)
                self.captions.append(caption)
                self._shard.append(number)
                self._offset.append(image.offset)
                self._size.append(image.size)

    def read(self, index: int) -> bytes:
        """Return the content of an image file.

        Raises:
            UserError: the shard cannot be read.
        """
        path, size = self.shards[self._shard[index]], self._size[index]
        try:
            with open(path, "rb") as file:
                file.seek(self._offset[index])
                data = file.read(size)
        except OSError as error:
            raise UserError(f'cannot read the shard "{path}": {error.strerror or error}; check the drive') from None
        if len(data) < size:
            raise UserError(
                f'cannot read the image "{path}/{self._keys[index]}": the shard is cut short; download it again'
            )
        return data

    def paths(self) -> Sequence[Path]:
        """Return names of the images as paths: those of the shards, followed by those in the shards."""
        return _Paths(self)


class _Paths(Sequence[Path]):
    def __init__(self, index: ShardIndex) -> None:
        self._index = index

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, number: int) -> Path:  # type: ignore[override] # no slices
        index = self._index
        return index.shards[index._shard[number]] / f"{index._keys[number]}.{index.image_key}"


def _samples(members: Iterator[TarMember], caption_key: str) -> Iterator[tuple[str, dict[str, TarMember], str]]:
    """Iterate over the samples of a shard: key, members by their suffixes, and the caption or an empty text."""
    current, found, caption = "", dict[str, TarMember](), ""
    for member in members:
        match = FILE_NAME.fullmatch(member.name)
        if match is None:
            continue
        key, suffix = match[1], match[2].lower()
        if key != current:
            if found:
                yield current, found, caption
            current, found, caption = key, {}, ""
        found.setdefault(suffix, member)
        if suffix == caption_key:
            caption = _text(member)
    if found:
        yield current, found, caption


def _text(member: TarMember) -> str:
    """Return the text in a member, or an empty text if it cannot be read."""
    try:
        return " ".join(decode(member.read()).split())
    except (BadTar, ValueError):
        return ""
