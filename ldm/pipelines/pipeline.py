"""Base classes of pipelines. A pipeline holds the settings of a run, and turns requests into conditioning.

A pipeline imports torch only where it samples, so that commands check their options at once.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Self

from ldm.config.model_info import ModelInfo
from ldm.config.values import SAMPLERS, TIMESTEP_SPACINGS
from ldm.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from torch import Tensor

    from ldm.models.diffusion.conditioning import Conditioning

    NoiseSource = Callable[[Sequence[int]], Tensor]  # returns noise of a shape, such as a `SeededNoise`


DETERMINISTIC = ("plms", "dpm")


@dataclass(frozen=True)
class Conditioned:
    """Conditioning of one batch, and the latents that it leads to.

    Attributes:
        size: (h, w) of the latents.
        cond: conditioning of the batch.
        uncond: unconditional conditioning; None without guidance.
        x0: (B, C, h, w) latents to start from, noised by `strength` or to `t_enc`.
        strength: share of the grid that is sampled, in (0, 1].
        t_enc: number of timesteps of the grid that are sampled, from `x0` noised to the next one; instead of
            `strength`.
        tile: side, in latents, of the overlapping tiles that the network sees; None for the whole map.
    """

    size: tuple[int, int]
    cond: Conditioning = None
    uncond: Conditioning = None
    x0: Tensor | None = None
    strength: float | None = None
    t_enc: int | None = None
    tile: int | None = None


@dataclass(frozen=True, kw_only=True)
class Pipeline(ABC):
    """One task of a model, with the settings that all images of a run share, as plain values."""

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        """Return the pipeline with recorded settings; names that it does not know are ignored."""
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in settings.items() if name in known})

    def settings(self) -> dict[str, Any]:
        """Return the settings as plain values, from which `from_settings` returns an equal pipeline."""
        return asdict(self)

    def check_model(self, model: Any) -> None:
        """Raise an error if the settings contradict each other, or `model` cannot do this task.

        Raises:
            UserError: The settings contradict each other, or the model does not support the task.
        """
        self.check(ModelInfo.of(model))

    @abstractmethod
    def check(self, info: ModelInfo) -> None:
        """Raise an error if the settings contradict each other, or the model of `info` cannot do this task.

        Raises:
            UserError: The settings contradict each other, or the model does not support the task.
        """

    def batch_key(self, request: Any) -> Hashable:
        """Return a value that is equal for requests that can share a batch, such as the image size."""
        return None

    @abstractmethod
    def count_steps(self, request: Any, timesteps: int) -> int:
        """Return the number of steps for a batch of such requests with a model of `timesteps`."""

    @abstractmethod
    def sample(
        self,
        model: Any,
        requests: Sequence[Any],
        noise: NoiseSource,
        x_T: Tensor | None = None,
        on_step: Callable[[], object] | None = None,
    ) -> Tensor:
        """Return the latents (B, C, h, w) of a batch of requests.

        Args:
            model: a model that can do the task.
            requests: B of them.
            noise: the source of all noise.
            x_T: (B, C, h, w) start noise, instead of noise from `noise`.
            on_step: called after every step.
        """

    @abstractmethod
    def decode(self, model: Any, requests: Sequence[Any], latents: Tensor) -> Sequence[np.ndarray | None]:
        """Return the finished images, each (H, W, 3) uint8, of the latents of a batch.

        An image with values that are not finite is None.
        """


@dataclass(frozen=True, kw_only=True)
class SamplerPipeline(Pipeline):
    """Pipeline that samples latents from noise.

    Args:
        sampler: "ddim", "plms", "dpm" (DPM-Solver++ 2M) or "ddpm", which takes every timestep of the model.
        steps: number of sampler steps.
        eta: noise of a DDIM step: 0 is deterministic, 1 is as DDPM. PLMS and DPM-Solver++ have none.
        scale: guidance scale (arXiv:2207.12598); 1 samples without guidance.
        timestep_spacing: grid of the timesteps: "exact", "logsnr", "trailing", "uniform" or "quad", see
            `schedule.make_ddim_timesteps`; None for that of the model, or else of the sampler.
    """

    sampler: str = "ddim"
    steps: int = 50
    eta: float = 0.0
    scale: float = 1.0
    timestep_spacing: str | None = None

    decoding_tile: ClassVar[int | None] = None  # side, in latents, from which on maps are decoded in tiles

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        """See `Pipeline.from_settings`.

        Raises:
            KeyError: A setting of the sampler is missing.
        """
        for field in fields(SamplerPipeline):
            # Settings with the default None are newer than some records.
            if field.name not in settings and field.default is not None:
                raise KeyError(field.name)
        return super().from_settings(settings)

    def check(self, info: ModelInfo) -> None:
        """See `Pipeline.check`."""
        if self.sampler not in SAMPLERS:
            near = did_you_mean(str(self.sampler), SAMPLERS)
            raise UserError(f'there is no sampler "{self.sampler}"{near}; choose {", ".join(SAMPLERS)}')
        check_count("steps", self.steps, 1)
        info.check_steps(1 if self.sampler == "ddpm" else self.steps)
        for name, value in (("eta", self.eta), ("scale", self.scale)):
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise UserError(f"{name} must be a finite number, got {value!r}")
        if self.eta < 0:
            raise UserError(f"eta must be at least 0, got {self.eta:g}")
        if self.eta and self.sampler in DETERMINISTIC:
            raise UserError(f'the sampler "{self.sampler}" is deterministic; eta must be 0, got {self.eta:g}')
        self._check_spacing()

    def _check_spacing(self) -> None:
        spacing = self.timestep_spacing
        if spacing is None:
            return
        if spacing not in TIMESTEP_SPACINGS:
            near, known = did_you_mean(str(spacing), TIMESTEP_SPACINGS), ", ".join(TIMESTEP_SPACINGS)
            raise UserError(f'there is no timestep_spacing "{spacing}"{near}; choose {known}')
        if self.sampler == "ddpm":
            raise UserError(f'the sampler "ddpm" takes every timestep; leave out timestep_spacing "{spacing}"')

    def count_steps(self, request: Any, timesteps: int) -> int:
        """See `Pipeline.count_steps`."""
        if self.sampler == "ddpm":
            return timesteps
        if self.timestep_spacing == "uniform":  # the published grid has its own number of timesteps
            return math.ceil(timesteps / (timesteps // self.steps))
        return self.steps

    @abstractmethod
    def condition(self, model: Any, requests: Sequence[Any]) -> Conditioned:
        """Return the conditioning of a batch of requests."""

    def condition_with_noise(self, model: Any, requests: Sequence[Any], noise: NoiseSource) -> Conditioned:
        """Return the conditioning of a batch, for tasks that add noise to it before the start noise is sampled."""
        return self.condition(model, requests)

    def finish(self, requests: Sequence[Any], images: np.ndarray) -> Iterable[np.ndarray]:
        """Return the finished images of a batch from decoded images (B, H, W, 3) uint8."""
        return images

    def sample(
        self,
        model: Any,
        requests: Sequence[Any],
        noise: NoiseSource,
        x_T: Tensor | None = None,
        on_step: Callable[[], object] | None = None,
    ) -> Tensor:
        """See `Pipeline.sample`.

        Raises:
            ValueError: The start noise has another shape than the latents.
        """
        from ldm.modules.tiles import TiledDenoiser
        from ldm.pipelines.sampling import sample_latents

        batch = self.condition_with_noise(model, requests, noise)
        shape = (len(requests), model.channels, *batch.size)
        if x_T is not None and tuple(x_T.shape) != shape:
            raise ValueError(
                f"latents must have the shape (N, {', '.join(map(str, shape[1:]))}), got {tuple(x_T.shape)}"
            )
        denoiser = TiledDenoiser(model, batch.tile, batch.tile // 4) if batch.tile else model
        settings: dict[str, Any] = {"x0": batch.x0, "strength": batch.strength, "t_enc": batch.t_enc}
        start = {name: value for name, value in settings.items() if value is not None}
        if start and x_T is not None:  # the noise of x0, not the start itself
            noise, x_T = _starting_with(x_T, noise), None
        return sample_latents(
            denoiser,
            shape,
            sampler=self.sampler,
            steps=self.steps,
            eta=self.eta,
            scale=self.scale,
            timestep_spacing=self.timestep_spacing,
            cond=batch.cond,
            uncond=batch.uncond,
            x_T=x_T,
            noise=noise,
            on_step=on_step,
            **start,
        )

    def decode(self, model: Any, requests: Sequence[Any], latents: Tensor) -> Sequence[np.ndarray | None]:
        """See `Pipeline.decode`."""
        from ldm.io.pixels import to_uint8
        from ldm.modules.precision import finite_items
        from ldm.pipelines.sampling import decode

        images = decode(model, latents, self.side_of_decoding_tiles(model))
        finite = finite_items(images)
        if not finite.any():
            return [None] * len(requests)
        valid = [request for request, is_valid in zip(requests, finite.tolist(), strict=True) if is_valid]
        finished = iter(self.finish(valid, to_uint8(images[finite])))
        return [next(finished) if is_valid else None for is_valid in finite.tolist()]

    def side_of_decoding_tiles(self, model: Any) -> int | None:
        """Return the side, in latents, from which on maps are decoded in tiles; None for no tiles."""
        return self.decoding_tile


def _starting_with(first: Tensor, noise: NoiseSource) -> NoiseSource:
    """Return a noise source that returns `first` once, then noise from `noise`."""
    pending = [first]
    return lambda shape: pending.pop() if pending else noise(shape)


def check_count(name: str, value: Any, smallest: int = 0) -> None:
    """Raise an error if a setting is not a whole number of at least `smallest`.

    Raises:
        UserError: It is not a whole number, or it is too small.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < smallest:
        raise UserError(f"{name} must be a whole number of at least {smallest}, got {value!r}")


def check_sides(info: ModelInfo, height: int | None, width: int | None) -> None:
    """Raise an error if the model cannot sample images of this size; None is the size of the model.

    Raises:
        UserError: The size does not suit the model.
    """
    for name, side in (("height", height), ("width", width)):
        if side is not None:
            check_count(name, side, 1)
            info.size.check(name, side)


def image_size(model: Any, height: int | None, width: int | None) -> tuple[int, int]:
    """Return (height, width) in pixels; None is replaced by the size of the model."""
    if height is not None and width is not None:
        return height, width
    size = ModelInfo.of(model).size
    return size.height if height is None else height, size.width if width is None else width


def check_guidance(negative_prompt: str, scale: float) -> None:
    """Raise an error if a negative prompt has no effect.

    Raises:
        UserError: Sampling is not guided.
    """
    if negative_prompt and scale == 1:
        raise UserError("the negative prompt has no effect without guidance; give a scale above 1")


def latent_size(model: Any, height: int, width: int) -> tuple[int, int]:
    """Return (h, w) of the latents of an image of height × width pixels."""
    factor = getattr(model, "downsampling", 1)
    return height // factor, width // factor
