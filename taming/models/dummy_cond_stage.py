from typing import Any

from torch import Tensor


class DummyCondStage:
    """Conditioning stage that returns its input; `train` holds nothing, as the stage has no weights."""

    def __init__(self, conditional_key: str) -> None:
        self.conditional_key = conditional_key
        self.train: Any = None

    def eval(self) -> "DummyCondStage":
        """Return the stage."""
        return self

    @staticmethod
    def encode(c: Tensor) -> tuple[Tensor, None, tuple[None, None, Tensor]]:
        """Return c in the form of a first stage."""
        return c, None, (None, None, c)

    @staticmethod
    def decode(c: Tensor) -> Tensor:
        """Return c."""
        return c

    @staticmethod
    def to_rgb(c: Tensor) -> Tensor:
        """Return c."""
        return c
