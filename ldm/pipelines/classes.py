"""Class to image, and unconditional sampling."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Unpack

from ldm.config.model_config import TEXT_KEYS
from ldm.config.model_info import ModelInfo
from ldm.errors import UserError
from ldm.pipelines.class_names import Classes
from ldm.pipelines.pipeline import Conditioned, SamplerPipeline, check_count, check_sides, image_size, latent_size

if TYPE_CHECKING:
    from ldm.models.diffusion.conditioning import Conditioning
    from ldm.pipelines.run import SamplerOptions


@dataclass(frozen=True)
class ClassRequest:
    """Request of class to image: a label, and the name of the class for text-conditional models."""

    label: int
    name: str


@dataclass(frozen=True, kw_only=True)
class ClassToImage(SamplerPipeline):
    """Pipeline from classes to images; a request is a `ClassRequest`, or None for an unconditional model.

    Args:
        height, width: image size in pixels; None is the size of the model.
    """

    height: int | None = None
    width: int | None = None

    def check(self, info: ModelInfo) -> None:
        """See `Pipeline.check`."""
        classes = Classes.of(info)
        super().check(info)
        check_sides(info, self.height, self.width)
        if classes is not None:
            classes.check_scale(self.scale)
        elif self.scale != 1:
            raise UserError(f'the model "{info.name}" is unconditional; leave out the guidance scale')

    def condition(self, model: Any, requests: Sequence[ClassRequest | None]) -> Conditioned:
        """See `Pipeline.condition`."""
        cond, uncond = class_conditioning(model, requests, self.scale != 1)
        return Conditioned(latent_size(model, *image_size(model, self.height, self.width)), cond, uncond)


def class_conditioning(
    model: Any, requests: Sequence[ClassRequest | None], guided: bool = True
) -> tuple[Conditioning, Conditioning]:
    """Return the conditional and the unconditional conditioning of requests.

    Args:
        model: a diffusion model.
        requests: None for each image of an unconditional model.
        guided: whether the unconditional conditioning is needed; otherwise it is None.
    """
    classes = [each for each in requests if each is not None]
    if not classes:
        return None, None
    if model.cond_stage_key in TEXT_KEYS:
        raw: Any = [each.name for each in classes]
    else:
        import torch

        raw = {model.cond_stage_key: torch.tensor([each.label for each in classes], device=model.device)}
    encode = model.get_learned_conditioning
    return encode(raw), encode(model.empty_conditioning(raw)) if guided else None


def class_to_image(
    model: Any,
    classes: str | int | Sequence[str | int],
    *,
    steps: int = 50,
    scale: float = 3.0,
    **options: Unpack[SamplerOptions],
) -> list[Any]:
    """Sample an image of each class.

    Args:
        model: a class-conditional model, or a text-conditional one whose configuration names classes.
        classes: names, labels, or ranges of labels such as "0-9"; repeat a class for several images of it.
        steps: number of sampler steps.
        scale: guidance scale; 1 samples without guidance.
        **options: `seed`, `sampler`, `eta`, `timestep_spacing`, `batch_size`, `latents`, `output_type`, `progress`,
            `callback`, `device`, `precision`; see `ldm.pipelines.run.SamplerOptions`.

    Returns:
        PIL images, or what `output_type` names.

    Raises:
        UserError: The model has no classes, or a name selects none or several.
    """
    from ldm.pipelines.run import run, split_options

    sampler, rest = split_options(options)
    info = ModelInfo.of(model)
    known = Classes.of(info)
    if known is None:
        raise UserError(f'the model "{info.name}" has no classes; use ldm.unconditional')
    labels = known.parse([classes] if isinstance(classes, str) or not isinstance(classes, Iterable) else list(classes))
    requests = [ClassRequest(label, known.name(label)) for label in labels]
    return run(ClassToImage(steps=steps, scale=scale, **sampler), model, requests, **rest)


def unconditional(
    model: Any,
    n: int = 1,
    *,
    steps: int = 50,
    **options: Unpack[SamplerOptions],
) -> list[Any]:
    """Sample images from an unconditional model.

    Args:
        model: an unconditional model, such as the published `celeba256`.
        n: number of images.
        steps: number of sampler steps.
        **options: `seed`, `sampler`, `eta`, `timestep_spacing`, `batch_size`, `latents`, `output_type`, `progress`,
            `callback`, `device`, `precision`; see `ldm.pipelines.run.SamplerOptions`.

    Returns:
        PIL images, or what `output_type` names.

    Raises:
        UserError: The model is conditional.
    """
    from ldm.pipelines.run import run, split_options

    sampler, rest = split_options(options)
    info = ModelInfo.of(model)
    check_count("n", n)
    if not info.is_unconditional:
        raise UserError(
            f'the model "{info.name}" is conditioned on "{info.cond_stage_key}"; choose an unconditional model'
        )
    return run(ClassToImage(steps=steps, **sampler), model, [None] * n, **rest)
