"""Label map to image: sample images from maps that give every pixel a label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Unpack

from ldm.config.model_info import ModelInfo
from ldm.errors import UserError
from ldm.models.diffusion.batch_keys import SEGMENTATION_KEY
from ldm.pipelines.pipeline import Conditioned, SamplerPipeline, check_count

if TYPE_CHECKING:
    import numpy as np

    from ldm.pipelines.inputs import ImageLike
    from ldm.pipelines.run import SamplerOptions


@dataclass(frozen=True, kw_only=True)
class SemanticToImage(SamplerPipeline):
    """Pipeline from label maps of any size to images; a request is a map (H, W) int64.

    Args:
        labels: number of labels of the model.
        palette: labels of colours "#rrggbb", for maps that are colour images.
        height, width: size that maps are resized to; None keeps their own.
    """

    labels: int
    palette: Mapping[str, int] | None = None
    height: int | None = None
    width: int | None = None

    def check(self, info: ModelInfo) -> None:
        """See `Pipeline.check`."""
        if label_count(info) != self.labels:
            raise UserError(f'the model "{info.name}" has {label_count(info)} labels, not {self.labels}')
        super().check(info)
        for name, side in (("height", self.height), ("width", self.width)):
            if side is not None:
                check_count(name, side, 1)

    def fit(self, labels: np.ndarray) -> np.ndarray:
        """Return the map in the size of the settings, without interpolation."""
        from ldm.io.label_maps import resize_nearest
        from ldm.io.pixels import chosen_size

        return resize_nearest(labels, *chosen_size(labels.shape, self.height, self.width))

    def batch_key(self, request: np.ndarray) -> tuple[int, ...]:
        """Return the map size."""
        return request.shape

    def condition(self, model: Any, requests: Sequence[np.ndarray]) -> Conditioned:
        """See `Pipeline.condition`."""
        import numpy as np
        import torch

        from ldm.io.pixels import pad_to_multiple

        info = ModelInfo.of(model)
        labels = torch.from_numpy(np.stack([pad_to_multiple(each, info.size.multiple) for each in requests]))
        one_hot = torch.zeros(len(requests), self.labels, *labels.shape[1:]).scatter_(1, labels[:, None], 1.0)
        maps = model.raw_conditioning({SEGMENTATION_KEY: one_hot.movedim(1, -1)})
        cond = model.get_learned_conditioning(maps.to(model.dtype))
        height, width = labels.shape[1:]
        return Conditioned((height // model.downsampling, width // model.downsampling), cond)

    def finish(self, requests: Sequence[np.ndarray], images: np.ndarray) -> np.ndarray:
        """Return the images without their padding."""
        height, width = requests[0].shape
        return images[:, :height, :width]


def semantic_to_image(
    model: Any,
    label_maps: ImageLike | Sequence[ImageLike],
    *,
    height: int | None = None,
    width: int | None = None,
    steps: int = 50,
    **options: Unpack[SamplerOptions],
) -> list[Any]:
    """Sample an image for each label map.

    Args:
        model: a semantic-synthesis model, such as the published `semantic_synthesis512`.
        label_maps: maps (H, W) of integer labels: arrays, tensors, or grey or palette images.
        height, width: size to resize the maps to; default: their own.
        steps: number of sampler steps.
        **options: `seed`, `sampler`, `eta`, `timestep_spacing`, `batch_size`, `latents`, `output_type`, `progress`,
            `callback`, `device`, `precision`; see `ldm.pipelines.run.SamplerOptions`.

    Returns:
        PIL images, or what `output_type` names.

    Raises:
        UserError: The model is not conditioned on label maps, or a map has a label that the model lacks.
    """
    from ldm.pipelines.inputs import as_labels
    from ldm.pipelines.run import run, split_options

    sampler, rest = split_options(options)
    info = ModelInfo.of(model)
    pipeline = SemanticToImage(labels=label_count(info), height=height, width=width, steps=steps, **sampler)
    maps = [as_labels(each) for each in _as_maps(label_maps)]
    for number, labels in enumerate(maps):
        check_labels(labels, pipeline.labels, f"label map {number}")
    return run(pipeline, model, [pipeline.fit(labels) for labels in maps], **rest)


def _as_maps(label_maps: Any) -> list[Any]:
    """Return a list of maps from one map, a sequence of maps, or an array (B, H, W)."""
    if hasattr(label_maps, "getbands") or getattr(label_maps, "ndim", 0) == 2:
        return [label_maps]
    return list(label_maps)


def label_count(info: ModelInfo) -> int:
    """Return the number of labels of a semantic-synthesis model.

    Raises:
        UserError: The model is conditioned on something else.
    """
    count = info.cond_stage_params.get("in_channels")
    if info.cond_stage_key != SEGMENTATION_KEY or not isinstance(count, int):
        raise UserError(f'the model "{info.name}" is conditioned on {info.describe_conditioning()}, not on label maps')
    return count


def check_labels(labels: np.ndarray, count: int, source: str) -> None:
    """Raise an error if a map has a label outside 0 … count - 1; `source` names it in the message.

    Raises:
        UserError: It has one.
    """
    if not 0 <= labels.min() <= labels.max() < count:
        wrong = labels.max() if labels.min() >= 0 else labels.min()
        raise UserError(f"{source} has the label {wrong}; this model has {count}, from 0 to {count - 1}")


def label_colours(count: int, palette: Mapping[str, int] | None) -> np.ndarray:
    """Return a colour for each label, (count, 3) uint8: from the palette, or from a fixed random palette."""
    import torch

    from ldm.io.pixels import in_random_colours, to_uint8

    colours = to_uint8(in_random_colours(torch.eye(count)[None, :, :, None]))[0, :, 0]
    for colour, label in (palette or {}).items():
        if label < count:
            colours[label] = list(bytes.fromhex(colour[1:]))
    return colours
