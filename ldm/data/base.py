"""The base of data sets that stream image and caption records."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import IterableDataset

log = logging.getLogger(__name__)


class Txt2ImgIterableBaseDataset(IterableDataset):
    """A stream of `num_records` image and caption records, which several such sets may be chained to.

    `valid_ids` names the records that exist; `sample_ids` those that this process is to read: all of them
    until a data loader's worker narrows it to its own share. `size` is the side of the images in pixels.
    Subclasses implement `__iter__` over `sample_ids`.
    """

    def __init__(self, num_records: int = 0, valid_ids: Sequence[Any] | None = None, size: int = 256) -> None:
        super().__init__()
        self.num_records = num_records
        self.valid_ids = valid_ids
        self.sample_ids = valid_ids
        self.size = size
        log.info("%s has %d records", type(self).__name__, num_records)

    def __len__(self) -> int:
        return self.num_records

    @abstractmethod
    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The records of `sample_ids`, one after another."""
