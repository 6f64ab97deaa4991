"""The classes that a model draws: their names, how users give them, and how the model is told.

A class-conditional model is told a number. A text model of the drawings in `data/emoji` counts as class-conditional
too: its classes are the drawings, and it is told their names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from ldm.cli.command import Parser
from ldm.config.model_config import TEXT_KEYS, ImageSize
from ldm.errors import UserError, did_you_mean
from ldm.tasks.task import Inputs, Settings, Task

if TYPE_CHECKING:
    import numpy as np
    from tqdm import tqdm

    from ldm.models.diffusion.conditioning import Conditioning
    from ldm.models.diffusion.noise import SeededNoise

DEFAULT_CLASSES = 1000  # of `ClassEmbedder`
SHOWN = 4  # names that a message lists
MOST_DIGITS = 9  # of a class's number


def imagenet_names() -> list[tuple[str, ...]]:
    """The names of ImageNet's classes, one for each, in the order of their numbers."""
    from torchvision.models import ResNet50_Weights

    return [(name,) for name in ResNet50_Weights.DEFAULT.meta["categories"]]


def drawing_names() -> list[tuple[str, ...]]:
    """The two names of each drawing in `data/emoji`, the shorter first."""
    from ldm.data.emoji import read_names

    return [(short, unicode_name) for _, unicode_name, short in read_names()]


# Whose classes they are, their number tells.
NAMES: Mapping[int, Callable[[], list[tuple[str, ...]]]] = {1000: imagenet_names, 1366: drawing_names}
DRAWINGS = 1366


@dataclass(frozen=True)
class Classes:
    """The classes of a model.

    Args:
        model: what the model is called.
        count: how many classes there are to draw; their labels are 0 … count - 1.
        guidable: whether the model also knows what no class looks like, which guidance needs.
    """

    model: str
    count: int
    guidable: bool

    @classmethod
    def of(cls, model: str, config: Mapping[str, Any]) -> Classes | None:
        """The classes of the model called `model` that `config` describes; None where it draws from nothing.

        The last class stands for none where the model was trained with `cond_dropout`, and where it is one more than a
        known list of names has.

        Raises:
            UserError: the model draws from something else.
        """
        params = config["params"]
        stage = params.get("cond_stage_config", "__is_unconditional__")
        if stage == "__is_unconditional__":
            return None
        stage_params = (stage.get("params") if isinstance(stage, Mapping) else None) or {}
        key = params.get("cond_stage_key", "image")
        if key in TEXT_KEYS and PurePosixPath(str(stage_params.get("vocab"))).parts[-2:] == ("emoji", "vocab.txt"):
            return cls(model, DRAWINGS, True)
        if key != "class_label":
            raise UserError(
                f'the model "{model}" draws from "{key}", not from classes; choose a class-conditional model'
            )
        unet = (params.get("unet_config") or {}).get("params") or {}
        count = stage_params.get("n_classes", unet.get("num_classes") or DEFAULT_CLASSES)
        if not isinstance(count, int) or count < 1:
            raise UserError(f'the configuration of "{model}" needs a number of at least 1 as "n_classes"')
        guidable = count > 1 and (bool(params.get("cond_dropout")) or count - 1 in NAMES)
        return cls(model, count - guidable, guidable)

    def check_scale(self, scale: float) -> None:
        """Whether the model can be guided as `scale` asks.

        Raises:
            UserError: it does not know what no class looks like.
        """
        if scale != 1 and not self.guidable:
            raise UserError(f'the model "{self.model}" was not trained for guidance (no null class); give --scale 1')

    # -- names ---------------------------------------------------------------------------------------------------

    @cached_property
    def names(self) -> list[tuple[str, ...]]:
        """The names of every class, what it is called first; empty where they are not known."""
        return NAMES[self.count]() if self.count in NAMES else []

    @cached_property
    def labels(self) -> dict[str, int]:
        """Every name, in the form of `_key`; what one class is called goes before a further name of another."""
        labels: dict[str, int] = {}
        for place in range(max((len(each) for each in self.names), default=0)):
            for label, each in enumerate(self.names):
                if place < len(each):
                    labels.setdefault(_key(each[place]), label)
        return labels

    def name(self, label: int) -> str:
        """What class `label` is called: its number where names are not known."""
        return self.names[label][0] if self.names else str(label)

    def inputs(self, label: int) -> Inputs:
        """What a picture of class `label` is drawn from."""
        return {"class_label": label, "class": self.name(label)}

    def parse(self, words: Sequence[str]) -> list[int]:
        """The labels that `words` give, in their order: names, numbers, ranges such as 0-9, and lists with commas.

        Names count in any case, and in part where that is a part of one class's alone.

        Raises:
            UserError: one gives no class, or several.
        """
        found = [label for word in words for label in self._labels(word)]
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
            yield self._partly(word)

    def _range(self, word: str, first: str, last: str) -> range:
        long = max(len(first), len(last)) > MOST_DIGITS
        if long or not 0 <= int(first) < self.count or not int(last) < self.count:
            which, last_class = word[: 3 * MOST_DIGITS], self.count - 1
            raise UserError(f'class "{which}": the classes of "{self.model}" are 0 to {last_class}')
        if int(first) > int(last):
            raise UserError(f'classes "{word}": a range goes from the smaller number to the larger')
        return range(int(first), int(last) + 1)

    def _partly(self, word: str) -> int:
        """The class of which `word` is some of the words."""
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
        raise UserError(f'class "{word}" may be {listed}{more}; give a whole name or a number')


def _key(name: str) -> str:
    """A name as it is compared: in lower case, with plain apostrophes, hyphens and single spaces."""
    return " ".join(name.casefold().replace("’", "'").replace("_", " ").split())


def class_conditioning(model: Any, inputs: Sequence[Inputs], guided: bool = True) -> tuple[Conditioning, Conditioning]:
    """What the network is told by `Classes.inputs` of B pictures, and what guidance leads away from.

    Args:
        model: a diffusion model; where the inputs name no class, an unconditional one.
        guided: without it the second is None.
    """
    if "class_label" not in inputs[0]:
        return None, None
    if model.cond_stage_key in TEXT_KEYS:
        told: Any = [each["class"] for each in inputs]
    else:
        import torch

        told = {model.cond_stage_key: torch.tensor([each["class_label"] for each in inputs], device=model.device)}
    encode = model.get_learned_conditioning
    return encode(told), encode(model.empty_conditioning(told)) if guided else None


class ClassTask(Task):
    """Draw from classes, or from nothing: what the tasks of classes share."""

    def class_option(self, parser: Parser, default: str) -> None:
        """Add what to draw."""
        parser.add_argument(
            "--classes",
            nargs="+",
            metavar="CLASS",
            help=f"names, numbers, ranges such as 0-9 (default: {default})",
        )

    def size(self, config: Mapping[str, Any]) -> Settings:
        """The model's own height and width in pixels."""
        size = ImageSize.of(config)
        return {"height": size.height, "width": size.width}

    def draw(
        self, model: Any, batch: Sequence[Any], settings: Settings, noise: SeededNoise, progress: tqdm
    ) -> Sequence[np.ndarray]:
        """One picture for each class, or for each entry of nothing."""
        from ldm.io.pixels import to_uint8
        from ldm.pipelines.sampling import SamplerSettings, decode, sample_latents

        sampling, factor = SamplerSettings.of(settings), getattr(model, "downsampling", 1)
        shape = (len(batch), model.channels, settings["height"] // factor, settings["width"] // factor)
        conditioning, unconditional = class_conditioning(model, batch, sampling.scale != 1)
        return to_uint8(
            decode(model, sample_latents(model, shape, sampling, conditioning, unconditional, noise, progress))
        )
