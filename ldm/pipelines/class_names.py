"""Classes of a model: their names, and the labels that users' words select. Needs no torch.

The configuration of a model names its classes as `class_names`: a list, the path of a text file, or "imagenet". A file
holds one class a line; further names of a class follow its first one after tabs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from ldm.config.assets import locate
from ldm.config.model_info import ModelInfo
from ldm.errors import UserError, did_you_mean
from ldm.io.text import read_lines

DEFAULT_CLASSES = 1000  # of `ClassEmbedder`
SHOWN = 4  # names that a message lists
MOST_DIGITS = 9  # of a label
IMAGENET = "imagenet"

Names = list[tuple[str, ...]]


def read_class_names(source: str | Sequence[str]) -> Names:
    """Return the names of each class, the first of which is its name in messages and captions.

    Args:
        source: a list of names, the path of a file of names, or "imagenet".

    Raises:
        UserError: The file is missing or empty.
    """
    if not isinstance(source, str):
        return [(str(name),) for name in source]
    if source == IMAGENET:
        from torchvision.models import ResNet50_Weights

        return [(name,) for name in ResNet50_Weights.DEFAULT.meta["categories"]]
    lines = read_lines(locate(source), "file of class names", "give UTF-8 text, one class a line")
    names = [tuple(name.strip() for name in line.split("\t") if name.strip()) for line in lines if line.strip()]
    if not names:
        raise UserError(f'the file of class names "{source}" is empty; write one class a line')
    return names


@dataclass(frozen=True)
class Classes:
    """Classes of a model.

    Args:
        model: the name of the model in messages.
        count: number of classes; their labels are 0 … count - 1.
        guidable: whether the model has a null class, which guidance needs.
        source: the `class_names` of the configuration.
    """

    model: str
    count: int
    guidable: bool
    source: str | tuple[str, ...] = ()

    @classmethod
    def of(cls, info: ModelInfo) -> Classes | None:
        """Return the classes of a model, None if it is unconditional.

        A text-conditional model whose configuration names classes is conditioned on their names. The last label is
        the null class if the model was trained with `cond_dropout`, or has one label more than names.

        Raises:
            UserError: The model is conditioned on something else.
        """
        if info.is_unconditional:
            return None
        source = info.params.get("class_names") or ()
        source = source if isinstance(source, str) else tuple(source)
        if info.reads_text and source:
            return cls(info.name, len(read_class_names(source)), True, source)
        if info.cond_stage_key != "class_label":
            raise UserError(
                f'the model "{info.name}" is conditioned on "{info.cond_stage_key}", not on classes; '
                "choose a class-conditional model"
            )
        unet = (info.params.get("unet_config") or {}).get("params") or {}
        labels = info.cond_stage_params.get("n_classes", unet.get("num_classes") or DEFAULT_CLASSES)
        if not isinstance(labels, int) or labels < 1:
            raise UserError(f'the configuration of "{info.name}" needs a number of at least 1 as "n_classes"')
        named = len(read_class_names(source)) if source else labels
        guidable = labels > 1 and (bool(info.params.get("cond_dropout")) or named == labels - 1)
        return cls(info.name, labels - guidable, guidable, source)

    def check_scale(self, scale: float) -> None:
        """Raise an error if the model cannot be guided with `scale`.

        Raises:
            UserError: The model has no null class.
        """
        if scale != 1 and not self.guidable:
            raise UserError(
                f'the model "{self.model}" has no null class, which guidance needs; use scale 1, or add class_names'
            )

    # -- names ---------------------------------------------------------------------------------------------------

    @cached_property
    def names(self) -> Names:
        """Names of every class; empty if they are unknown."""
        names = read_class_names(self.source) if self.source else []
        return names if len(names) == self.count else []

    @cached_property
    def labels(self) -> dict[str, int]:
        """Label of every name, in the form of `_key`; the first name of a class precedes further names of others."""
        labels: dict[str, int] = {}
        for rank in range(max((len(each) for each in self.names), default=0)):
            for label, each in enumerate(self.names):
                if rank < len(each):
                    labels.setdefault(_key(each[rank]), label)
        return labels

    def name(self, label: int) -> str:
        """Return the name of class `label`; its number if names are unknown."""
        return self.names[label][0] if self.names else str(label)

    def parse(self, words: Sequence[str | int]) -> list[int]:
        """Return the labels that `words` select, in order: names, numbers, ranges such as 0-9, lists with commas.

        Names match in any case, and in part if only one class contains the part.

        Raises:
            UserError: A word selects no class, or several.
        """
        found = [label for word in words for label in self._labels(word if isinstance(word, str) else str(int(word)))]
        if not found:
            raise UserError("no class is named; give names or numbers")
        return found

    def _labels(self, word: str) -> Iterator[int]:
        key = _key(word)
        numbers = re.fullmatch(r"(-?\d+)(?: ?- ?(\d+))?", word.strip())
        if numbers:
            yield from self._range(word, numbers[1], numbers[2] or numbers[1])
        elif key in self.labels:
            yield self.labels[key]
        elif "," in word:
            yield from self.parse([part for part in word.split(",") if part.strip()])
        else:
            yield self._partial_match(word)

    def _range(self, word: str, first: str, last: str) -> range:
        long = max(len(first), len(last)) > MOST_DIGITS
        if long or not 0 <= int(first) < self.count or not int(last) < self.count:
            shown, last_class = word[: 3 * MOST_DIGITS], self.count - 1
            raise UserError(f'class "{shown}": the classes of "{self.model}" are 0 to {last_class}')
        if int(first) > int(last):
            raise UserError(f'classes "{word}": a range goes from the smaller number to the larger')
        return range(int(first), int(last) + 1)

    def _partial_match(self, word: str) -> int:
        """Return the class whose names contain `word` as a sequence of whole words."""
        if not self.names:
            raise UserError(f'class "{word}": "{self.model}" has no names; give numbers, 0 to {self.count - 1}')
        part = re.compile(rf"\b{re.escape(_key(word))}\b") if _key(word) else None
        found = list(dict.fromkeys(label for name, label in self.labels.items() if part and part.search(name)))
        if len(found) == 1:
            return found[0]
        if not found:
            raise UserError(f'there is no class "{word}"{did_you_mean(_key(word), self.labels)}; give a name or number')
        listed = ", ".join(f"{self.name(label)} ({label})" for label in found[:SHOWN])
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise UserError(f'class "{word}" is ambiguous: {listed}{more}; give a whole name or a number')


def _key(name: str) -> str:
    """Return a name for comparison: in lower case, with plain apostrophes and single spaces."""
    return " ".join(name.casefold().replace("’", "'").replace("_", " ").split())
