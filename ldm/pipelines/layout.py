"""Layout to image: sample images of labelled boxes (arXiv:2112.10752, section 4.3.1)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Unpack

from ldm.config.model_info import ModelInfo
from ldm.errors import UserError
from ldm.models.diffusion.batch_keys import LAYOUT_KEY
from ldm.pipelines.pipeline import Conditioned, SamplerPipeline, image_size, latent_size

if TYPE_CHECKING:
    from ldm.pipelines.run import SamplerOptions

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LabelledBox:
    """Box of a layout: a class number, its corners (left, top, right, bottom) in [0, 1], and a name to show."""

    label: int
    box: tuple[float, float, float, float]
    name: str = ""


@dataclass(frozen=True)
class Layout:
    """Request of layout to image: labelled boxes."""

    boxes: tuple[LabelledBox, ...]


@dataclass(frozen=True, kw_only=True)
class LayoutToImage(SamplerPipeline):
    """Pipeline from layouts of labelled boxes to images; a request is a `Layout`."""

    def check(self, info: ModelInfo) -> None:
        """See `Pipeline.check`."""
        if info.cond_stage_key != LAYOUT_KEY or not isinstance(info.cond_stage_params.get("vocab_size"), int):
            raise UserError(f'the model "{info.name}" is conditioned on {info.describe_conditioning()}, not on layouts')
        super().check(info)
        if self.scale != 1 and not info.params.get("cond_dropout"):
            logger.warning("this model was not trained for guidance: it has seen few layouts without boxes")

    def condition(self, model: Any, requests: Sequence[Layout]) -> Conditioned:
        """See `Pipeline.condition`."""
        import torch

        vocabulary, length = layout_vocabulary(ModelInfo.of(model))
        tokens = torch.stack([layout_tokens(layout, vocabulary, length) for layout in requests]).to(model.device)
        cond, uncond = model.get_learned_conditioning(tokens), None
        if self.scale != 1:
            from ldm.modules.encoders.layout import LayoutTokens

            uncond = model.get_learned_conditioning(torch.full_like(tokens, LayoutTokens(vocabulary).none))
        return Conditioned(latent_size(model, *image_size(model, None, None)), cond, uncond)


def layout_vocabulary(info: ModelInfo) -> tuple[int, int]:
    """Return the size of the vocabulary of a model's layout tokens, and the length of its sequences."""
    return info.cond_stage_params["vocab_size"], info.cond_stage_params.get("max_seq_len", 77)


def layout_tokens(layout: Layout, vocabulary: int, length: int) -> Any:
    """Return the tokens (length,) int64 of a layout.

    Raises:
        UserError: There are too many boxes, or a class or a corner is out of range.
    """
    from ldm.modules.encoders.layout import Box, LayoutTokens

    return LayoutTokens(vocabulary).encode([Box(each.label, each.box, each.name) for each in layout.boxes], length)


def layout_to_image(
    model: Any,
    layouts: Layout | Mapping[str, Any] | Sequence[Layout | Mapping[str, Any]],
    *,
    steps: int = 50,
    scale: float = 1.0,
    **options: Unpack[SamplerOptions],
) -> list[Any]:
    """Sample an image for each layout of labelled boxes.

    Args:
        model: a layout-to-image model, such as the published `layout2img-openimages256`.
        layouts: `Layout`s, or mappings such as `{"boxes": [{"label": "Dog", "box": [0.1, 0.2, 0.6, 0.9]}]}` with
            the names of the model's `class_names`, or numbers, as labels.
        steps: number of sampler steps.
        scale: guidance scale; 1 samples without guidance.
        **options: `seed`, `sampler`, `eta`, `timestep_spacing`, `batch_size`, `latents`, `output_type`, `progress`,
            `callback`, `device`, `precision`; see `ldm.pipelines.run.SamplerOptions`.

    Returns:
        PIL images, or what `output_type` names.

    Raises:
        UserError: The model is not conditioned on layouts, or a layout does not suit it.
    """
    from ldm.pipelines.run import run, split_options

    sampler, rest = split_options(options)
    info = ModelInfo.of(model)
    pipeline = LayoutToImage(steps=steps, scale=scale, **sampler)
    pipeline.check(info)
    given = [layouts] if isinstance(layouts, Layout | Mapping) else list(layouts)
    names = class_names_of(info)
    requests = [as_layout(each, names) for each in given]
    vocabulary = layout_vocabulary(info)
    for request in requests:
        layout_tokens(request, *vocabulary)  # an error before sampling
    return run(pipeline, model, requests, **rest)


def class_names_of(info: ModelInfo) -> list[str]:
    """Return the class names that the configuration of a model lists; empty if it has none."""
    from ldm.pipelines.class_names import read_class_names

    source = info.params.get("class_names") or ()
    return [names[0] for names in read_class_names(source)] if source else []


def as_layout(layout: Any, names: Sequence[str]) -> Layout:
    """Return a checked layout as a `Layout`, with numbers as labels and positions in [0, 1].

    Args:
        layout: a `Layout`, or a mapping of the form that `ldm.io.layouts` describes.
        names: of the classes; without names, labels must be numbers.

    Raises:
        UserError: It is not a layout, or a box is invalid.
    """
    from ldm.io.layouts import resolve

    if isinstance(layout, Layout):
        layout = {"boxes": [{name: each for name, each in asdict(box).items() if each != ""} for box in layout.boxes]}
    boxes = resolve(_plain(layout), names)["boxes"]
    return Layout(tuple(LabelledBox(each["label"], tuple(each["box"]), each["name"]) for each in boxes))


def _plain(value: Any) -> Any:
    """Return `value` with mappings, sequences, arrays and NumPy scalars as plain dicts, lists and numbers."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value
