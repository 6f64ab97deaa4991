"""Base class of data sets that published configurations name and that are not included."""

from __future__ import annotations

from typing import Any, ClassVar

from torch.utils.data import Dataset

from ldm.errors import UserError


class AbsentDataset(Dataset):
    """Placeholder that accepts any parameters and raises an error.

    Subclasses set `provided`, the items of the data set, and `instead`, the alternative to use.

    Raises:
        UserError: always.
    """

    provided: ClassVar[str]
    instead: ClassVar[str]

    def __init__(self, **params: Any) -> None:
        raise UserError(f"{type(self).__name__} is not included: it provided {self.provided}; {self.instead}")
