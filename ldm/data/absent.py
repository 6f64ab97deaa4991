"""Data sets that published configurations name and that are not included: they say what to use instead."""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn

from torch.utils.data import Dataset

from ldm.errors import UserError


class AbsentDataset(Dataset):
    """Takes any parameters, and cannot be built.

    Subclasses say what the data set `served` and what to use `instead`.

    Raises:
        UserError: always.
    """

    served: ClassVar[str]
    instead: ClassVar[str]

    def __init__(self, **params: Any) -> NoReturn:
        raise UserError(f"{type(self).__name__} is not included: it served {self.served}; {self.instead}")
