"""Base class of data sets that stream image and caption records."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import IterableDataset

log = logging.getLogger(__name__)


class Txt2ImgIterableBaseDataset(IterableDataset):
    """Stream of image and caption records; several streams can be chained.

    Subclasses implement `__iter__` over `sample_ids`. These are all of `valid_ids` until a data loader's worker
    narrows them to its own share.

    Args:
        num_records: number of records.
        valid_ids: ids of the records.
        size: side of the images in pixels.
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
        """Iterate over the records of `sample_ids`."""
