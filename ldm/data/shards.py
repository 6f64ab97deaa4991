"""Images with texts and records from tar archives ("shards"), read as a stream.

A shard holds the files of one sample after another, such as `000000012.jpg`, `000000012.txt` and `000000012.json`. This
is the format of img2dataset and WebDataset. The archives are read here and not with the package `webdataset`: that
unpickles entries, runs commands for addresses, and does not divide few shards among many processes exactly.
"""

from __future__ import annotations

import io
import json
import logging
import re
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from ldm.config.instantiate import instantiate_from_config
from ldm.data.shard_files import find_shards, open_shard
from ldm.data.unreadable import SharedFlags
from ldm.errors import UserError
from ldm.io.images import open_image
from ldm.io.tar import READ_ERRORS, BadTar, iterate_tar, open_tar
from ldm.io.text import decode

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Directory and key of a sample, and the suffix of one of its files. Names that begin with a dot are hidden.
FILE_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)
TEXTS, RECORDS, NUMBERS = ("txt", "text", "transcript", "caption"), ("json", "jsn"), ("cls", "cls2")
ARRAY = "npy"
VALUES = (torch.arange(256).float() / 255 * 2 - 1).numpy()  # of the pixels 0 … 255

FIRST_FILL = 100  # samples in the shuffle buffer before the first one leaves it
NAMED = 10  # damaged samples that a pass names
SLOTS = 1 << 14
PROBED_SHARDS, PROBED_SAMPLES = 3, 50


@dataclass
class RawSample:
    """Files of one sample in a shard.

    Attributes:
        key: their common name.
        url: the shard.
        parts: suffix → content.
        others: suffixes of the files that were not read.
        is_damaged: a file could not be read.
    """

    key: str
    url: str
    parts: dict[str, bytes] = field(default_factory=dict)
    others: set[str] = field(default_factory=set)
    is_damaged: bool = False

    @property
    def name(self) -> str:
        """Name of the sample in messages."""
        return f"{self.url}: {self.key}"


class SkippedSamples:
    """Record of the samples of a pass that are damaged, or left out by a filter.

    Args:
        name: name of the data set in messages.
        named: flags of the samples that the log has named, which processes and epochs share.
        is_silent: log no counts.
    """

    def __init__(self, name: str, named: SharedFlags, is_silent: bool = False) -> None:
        self.name, self.named, self.is_silent = name, named, is_silent
        self.counts: Counter[str] = Counter()
        self.first_reason = ""

    def damage(self, where: str, reason: str) -> None:
        """Count a damaged sample or shard; the log names the first ones."""
        self.counts["damaged"] += 1
        number = self.counts["damaged"]
        self.first_reason = self.first_reason or f'"{where}" {reason}'
        if number <= NAMED and self.named.set(_slot(where)):
            logger.warning('%s: skipping damaged data: "%s" %s', self.name, where, reason)
        elif number in (100, 1000, 10_000, 100_000, 1_000_000) and not self.is_silent:
            logger.warning("%s: %d damaged samples skipped so far", self.name, number)

    def leave_out(self, reason: str) -> None:
        """Count a sample that a filter leaves out."""
        self.counts[reason] += 1

    def report(self, total: int) -> None:
        """Log the counts of a finished pass over `total` samples."""
        if self.counts and not self.is_silent:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.counts.most_common())
            logger.warning("%s: %d samples read, left out: %s", self.name, total, reasons)


class ImageShards(IterableDataset):
    """Stream of the samples in shards; one pass reads each sample once.

    Items: `__key__` and `__url__`, the image under `image_key` as (H, W, 3) float32 in [-1, 1], texts, records
    (`json`), numbers (`cls`) and arrays (`npy`), each under its suffix. Files with other suffixes are not read, pickles
    among them. Unreadable data is skipped: the log names the first cases of the first pass, and counts the rest.

    Processes and workers share whole shards; they share the samples of the last ones if the numbers do not divide.

    Args:
        shards: pattern or patterns of the shards; see `ldm.data.shard_files.find_shards`.
        tar_base: folder or address that precedes each pattern.
        image_key: suffix of the images.
        caption_key: suffix of the texts; samples without one are left out. None reads samples without a text, too.
        image_transforms: `target` and `params` of transforms of Pillow images, applied in order.
        postprocess: `target` and `params` of a callable that maps an item to another one.
        shuffle: number of samples that are kept to shuffle them; the order of the shards is then random as well. 0
            keeps the order.
        names: new name → suffix; items then have only these entries and `__key__`.
        min_size: leave out images whose width or height is smaller, by `original_width` and `original_height` of the
            record, or else by `width` and `height`.
        max_pwatermark, max_punsafe: leave out images with a higher `pwatermark` or `punsafe` in their record. Below 1,
            images without the value are left out, too.
        draft_side: decode JPEG files at 1/2, 1/4 or 1/8 of their size, as long as no side becomes smaller than this
            (default: at their size, as the published code does). Twice the size of the crops is a good value.
        max_unreadable: largest share of absent shards, and of damaged samples among those that are read at the start.
        name: name of the data set in messages.

    Raises:
        UserError: shards are missing or refused, or too many samples at their start are damaged.
    """

    def __init__(
        self,
        shards: str | Sequence[str],
        tar_base: str | None = None,
        image_key: str = "jpg",
        caption_key: str | None = "txt",
        image_transforms: Sequence[Mapping[str, Any]] = (),
        postprocess: Mapping[str, Any] | None = None,
        shuffle: int = 0,
        names: Mapping[str, str] | None = None,
        min_size: int | None = None,
        max_pwatermark: float = 1.0,
        max_punsafe: float = 1.0,
        draft_side: int | None = None,
        max_unreadable: float = 0.01,
        name: str = "ImageShards",
    ) -> None:
        super().__init__()
        self.name = name
        self.urls = find_shards(shards, tar_base or "", name, max_unreadable)
        self.image_key, self.caption_key = image_key, caption_key
        self.image_transforms = [instantiate_from_config(config) for config in image_transforms]
        self.postprocess = None if postprocess is None else instantiate_from_config(postprocess)
        self.shuffle, self.draft_side = shuffle, draft_side
        self.names = None if names is None else dict(names)
        self.min_size = min_size
        self.limits = {"pwatermark": max_pwatermark, "punsafe": max_punsafe}
        self.share: tuple[int, int] = (0, 1)
        self.order: tuple[int, ...] = (0,)
        self._named = SharedFlags(SLOTS)
        self._epochs = self._passes = 0  # those that a loader has started, and those that this process has
        self._probe(max_unreadable)

    @property
    def required(self) -> tuple[str, ...]:
        """Suffixes of the files that each sample must have."""
        return (self.image_key,) if self.caption_key is None else (self.image_key, self.caption_key)

    @property
    def wanted(self) -> frozenset[str]:
        """Suffixes of the files to read."""
        return frozenset((*self.required, *TEXTS, *RECORDS, *NUMBERS, ARRAY))

    def take_share(self, index: int, count: int) -> None:
        """Read only share `index` of `count` shares, which are disjoint and together hold all samples."""
        self.share = (index, count)

    def set_epoch(self, epoch: int, seed: int, start: int = 0) -> None:
        """Choose the order of the next pass, which is the same in all processes.

        Args:
            epoch: index of the epoch.
            seed: seed of the run.
            start: number of batches before the run was resumed; a resumed epoch continues in another order.
        """
        self.order = (seed, epoch, start)
        self._epochs += 1

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self._passes += 1
        skipped = SkippedSamples(self.name, self._named, is_silent=max(self._epochs, self._passes) > 1)
        total = 0
        random = np.random.default_rng([*self.order, self.share[0]])
        for raw in shuffled(self._raw_samples(skipped), self.shuffle, random):
            total += 1
            item = self._item(raw, skipped)
            if item is not None:
                yield item
        skipped.report(total)

    def _raw_samples(self, skipped: SkippedSamples) -> Iterator[RawSample]:
        for url, part in self._parts():
            yield from read_shard(url, self.wanted, skipped.damage, part)

    def _parts(self) -> list[tuple[str, tuple[int, int]]]:
        """Return the shards of this share, each with the part of its samples: whole shards, then parts of the rest."""
        index, count = self.share
        urls = self.urls
        if self.shuffle:
            urls = [urls[i] for i in np.random.default_rng(self.order).permutation(len(urls))]
        whole = len(urls) // count * count
        return [(url, (0, 1)) for url in urls[index:whole:count]] + [(url, self.share) for url in urls[whole:]]

    def _item(self, raw: RawSample, skipped: SkippedSamples) -> dict[str, Any] | None:
        """Return the item of a sample, or None if it is left out."""
        entries = self._entries(raw, skipped)
        if entries is None:
            return None
        try:
            image = self._image(raw)
        except (UserError, ValueError, RuntimeError) as error:
            skipped.damage(raw.name, _reason(error))
            return None
        item = {"__key__": raw.key, "__url__": raw.url, **entries, self.image_key: image}
        if self.postprocess is not None:
            item = self.postprocess(item)
        return item if self.names is None else self._renamed(item)

    def _entries(self, raw: RawSample, skipped: SkippedSamples) -> dict[str, Any] | None:
        """Return the entries of a sample except its image, or None if it is left out."""
        if raw.is_damaged:  # it has been counted
            return None
        missing = [suffix for suffix in self.required if suffix not in raw.parts]
        if missing:
            skipped.leave_out(f"without .{missing[0]}")
            return None
        try:
            entries = {name: decode_part(name, data) for name, data in raw.parts.items() if name != self.image_key}
        except (ValueError, RecursionError) as error:
            skipped.damage(raw.name, _reason(error))
            return None
        reason = self._filter_reason(entries)
        if reason is not None:
            skipped.leave_out(reason)
        return entries if reason is None else None

    def _image(self, raw: RawSample) -> Tensor:
        data = raw.parts[self.image_key]
        image: Any = open_image(f"{raw.key}.{self.image_key}", data=data, min_side=self.draft_side)
        for transform in self.image_transforms:
            image = transform(image)
        pixels = np.asarray(image)
        return torch.from_numpy(to_values(pixels if pixels.ndim == 3 else pixels[..., None]))

    def _renamed(self, item: Mapping[str, Any]) -> dict[str, Any]:
        names = {"__key__": "__key__", **(self.names or {})}
        absent = [suffix for suffix in names.values() if suffix not in item]
        if absent:
            raise UserError(f'{self.name}: names asks for "{absent[0]}", and the sample "{item["__key__"]}" has none')
        return {name: item[suffix] for name, suffix in names.items()}

    def _filter_reason(self, entries: Mapping[str, Any]) -> str | None:
        """Return why a filter leaves out a sample, or None."""
        records = (entries.get(suffix) for suffix in RECORDS)
        record: dict[str, Any] = next((record for record in records if isinstance(record, dict)), {})
        if self.min_size is not None:
            sizes = [_number(record, f"original_{side}", side) for side in ("width", "height")]
            if any(size is None for size in sizes):
                return "without a size in the record"
            if min(size for size in sizes if size is not None) < self.min_size:
                return f"smaller than min_size {self.min_size}"
        for key, limit in self.limits.items():
            value = _number(record, key)
            if limit < 1 and value is None:
                return f"without {key} in the record"
            if value is not None and value > limit:
                return f"with {key} above {limit:g}"
        return None

    def _probe(self, max_unreadable: float) -> None:
        """Read samples at the start of up to `PROBED_SHARDS` shards.

        Raises:
            UserError: none is complete, or more than the share `max_unreadable` is damaged.
        """
        skipped = SkippedSamples(self.name, self._named)
        urls = [self.urls[i] for i in sorted({0, len(self.urls) // 2, len(self.urls) - 1})[:PROBED_SHARDS]]
        samples = [raw for url in urls for raw in islice(read_shard(url, self.wanted, skipped.damage), PROBED_SAMPLES)]
        usable = [raw for raw in samples if self._entries(raw, skipped) is not None]
        for raw in usable:
            try:
                open_image(f"{raw.key}.{self.image_key}", data=raw.parts[self.image_key])
            except UserError as error:
                skipped.damage(raw.name, _reason(error))
        damaged = skipped.counts["damaged"]
        if damaged and not samples:
            raise UserError(f"{self.name}: no shard at the start can be read; the first: {skipped.first_reason}")
        if damaged > max_unreadable * max(1, len(samples)):
            raise UserError(
                f"{self.name}: {damaged} of {len(samples)} samples read at the start are damaged, more than "
                f"max_unreadable ({max_unreadable:g}) allows; the first: {skipped.first_reason}"
            )
        suffixes = {suffix for raw in samples for suffix in (*raw.parts, *raw.others)}
        if samples and not any(set(self.required) <= raw.parts.keys() for raw in samples):
            raise UserError(
                f'{self.name}: no sample has .{" and .".join(self.required)}; those of "{urls[0]}" have '
                f"{', '.join(sorted(suffixes))}; set image_key and caption_key"
            )
        if samples and not usable:
            skipped.report(len(samples))
        if ignored := sorted(suffixes - self.wanted):
            logger.info("%s: files .%s of the shards are not read", self.name, ", .".join(ignored))


def read_shard(
    url: str, wanted: Collection[str], report: Callable[[str, str], None], part: tuple[int, int] = (0, 1)
) -> Iterator[RawSample]:
    """Iterate over the samples of a shard. Files of one sample follow each other.

    Args:
        url: the shard.
        wanted: suffixes of the files to read.
        report: called with a place and a reason for data that cannot be read.
        part: (index, count): return only every `count`-th sample from `index` on.
    """
    try:
        with open_shard(url) as source:
            yield from _samples(url, open_tar(source), wanted, report, part)
    except (BadTar, *READ_ERRORS) as error:
        report(url, _reason(error))


def _samples(
    url: str, file: Any, wanted: Collection[str], report: Callable[[str, str], None], part: tuple[int, int]
) -> Iterator[RawSample]:
    current, number = RawSample("", url), -1
    for member in iterate_tar(file, lambda reason: report(url, reason)):
        match = FILE_NAME.fullmatch(member.name)
        if match is None:
            continue
        key, suffix = match[1], match[2].lower()
        if key != current.key:
            if number % part[1] == part[0] and number >= 0:
                yield current
            current, number = RawSample(key, url), number + 1
        if number % part[1] != part[0]:
            continue
        if suffix not in wanted or suffix in current.parts:
            current.others.add(suffix)
            continue
        try:
            current.parts[suffix] = member.read()
        except BadTar as error:
            current.is_damaged = True
            report(f"{url}: {member.name}", str(error))
    if number >= 0 and number % part[1] == part[0]:
        yield current


def to_values(pixels: np.ndarray) -> np.ndarray:
    """Convert pixels from uint8 to float32 in [-1, 1] by the operations of the published code."""
    import cv2

    return cv2.LUT(np.ascontiguousarray(pixels).reshape(1, -1), VALUES).reshape(pixels.shape)


def decode_part(suffix: str, data: bytes) -> Any:
    """Decode a file of a sample by its suffix.

    Raises:
        ValueError: the content does not fit the suffix.
    """
    if suffix in TEXTS:
        return decode(data)
    if suffix in RECORDS:
        return json.loads(data)
    if suffix in NUMBERS:
        return int(data)
    if suffix == ARRAY:
        try:
            return np.load(io.BytesIO(data), allow_pickle=False)
        except (OSError, EOFError) as error:
            raise ValueError(f"has a damaged array: {error}") from None
    raise ValueError(f"has an unknown file .{suffix}")


def shuffled(items: Iterable[T], size: int, random: np.random.Generator) -> Iterator[T]:
    """Shuffle a stream with a buffer of `size` items, which fills while it is used; 0 keeps the order."""
    if size < 1:
        yield from items
        return
    source = iter(items)
    buffer = list(islice(source, min(size, FIRST_FILL)))
    for item in source:
        if len(buffer) < size:
            buffer.append(item)
            item = next(source, None)  # type: ignore[assignment] # None ends the stream
            if item is None:
                break
        index = int(random.integers(len(buffer)))
        buffer[index], item = item, buffer[index]
        yield item
    random.shuffle(buffer)
    yield from buffer


def _slot(name: str) -> int:
    """Return the flag of a sample among `SLOTS`."""
    return zlib.crc32(name.encode("utf-8", "surrogatepass")) % SLOTS


def _reason(error: Exception) -> str:
    """Return the reason in an error, without the name of the file and the advice."""
    reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
    return (reason.partition(": ")[2] or reason).partition("; ")[0] if isinstance(error, UserError) else reason


def _number(record: Mapping[str, Any], *keys: str) -> float | None:
    """Return the first value in a record under one of `keys` that is a number, or None."""
    values = (record.get(key) for key in keys)
    return next((value for value in values if isinstance(value, int | float) and not isinstance(value, bool)), None)
