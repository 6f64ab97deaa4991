"""Faults in the files of a data set: counted by kind, with a few examples, and said in one log line."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable

logger = logging.getLogger(__name__)

SHOWN = 3  # examples of each kind in the log line


class Faults:
    """Counter of the faults in a file, or in several files of one kind.

    Args:
        source: name of the files in the log line.
        remedy: what happens to the faulty parts, such as "left out".
    """

    def __init__(self, source: str, remedy: str = "left out") -> None:
        self.source, self.remedy = source, remedy
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}

    def add(self, kind: str, examples: Iterable[str] = (), count: int = 1) -> None:
        """Count faults of a kind, such as "boxes outside their image"; log nothing yet."""
        if count:
            self.counts[kind] += count
            shown = self.examples.setdefault(kind, [])
            shown += [each for each, _ in zip(examples, range(SHOWN - len(shown)), strict=False)]

    def text(self) -> str:
        """Return the kinds of faults with their numbers and examples."""
        return "; ".join(self._kind(kind, count) for kind, count in self.counts.items())

    def _kind(self, kind: str, count: int) -> str:
        shown = self.examples[kind]
        more = ", …" if shown and count > len(shown) else ""
        return f"{kind}: {count}" + (f" ({', '.join(shown)}{more})" if shown else "")

    def log(self) -> None:
        """Log all faults in one line; log nothing if there is none."""
        if self.counts:
            logger.warning('"%s": %s %s', self.source, self.remedy, self.text())
