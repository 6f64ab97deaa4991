"""Facts about a model that its configuration states: size, conditioning, number of timesteps. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ldm.config.model_config import TEXT_KEYS, ImageSize, read_config
from ldm.config.model_files import ModelFiles
from ldm.errors import UserError

# Versions of Stable Diffusion by the class of their text encoder.
STABLE_DIFFUSION = {"FrozenCLIPEmbedder": 1, "FrozenOpenCLIPEmbedder": 2}
# Size that the published configuration states for the models of 768 × 768 pixels, which predict v.
STATED_SIZE_OF_768 = (512, 512)


@dataclass(frozen=True)
class ModelInfo:
    """Configuration of a model, and the facts that tasks derive from it.

    Args:
        name: the name of the model in messages.
        config: the `model` section of a YAML configuration: `target` and `params`.
    """

    name: str
    config: Mapping[str, Any]

    @classmethod
    def read(cls, files: ModelFiles, overrides: Sequence[str] = ()) -> ModelInfo:
        """Read the configuration of a model on disk.

        Raises:
            UserError: The configuration is missing or damaged.
        """
        return cls(files.name, read_config(files.config, overrides))

    @classmethod
    def of(cls, model: Any) -> ModelInfo:
        """Return the facts about a model in memory.

        Raises:
            UserError: The model was not built from a configuration.
        """
        config = getattr(model, "config", None)
        if config is None and hasattr(model, "quant_conv"):
            raise UserError(f"this {type(model).__name__} is an autoencoder and does not sample; use ldm.reconstruct")
        if not isinstance(config, Mapping):
            raise UserError(
                f"this {type(model).__name__} does not know its configuration; load it with ldm.load, or build it with "
                "ldm.util.instantiate_from_config"
            )
        return cls(getattr(model, "name", None) or type(model).__name__, config)

    @property
    def params(self) -> Mapping[str, Any]:
        """Parameters of the model."""
        return self.config["params"]

    @cached_property
    def size(self) -> ImageSize:
        """Image size of the model, in pixels."""
        size = ImageSize.of(self.config)
        predicts_v = self.stable_diffusion == 2 and self.params.get("parameterization") == "v" and not self.needs_image
        if predicts_v and (size.height, size.width) == STATED_SIZE_OF_768:
            return replace(size, height=768, width=768)
        return size

    @property
    def cond_stage_key(self) -> str:
        """Entry of a batch that conditions the model."""
        return self.params.get("cond_stage_key", "image")

    @property
    def is_unconditional(self) -> bool:
        """True if the model has no conditioning."""
        return self.params.get("cond_stage_config", "__is_unconditional__") == "__is_unconditional__"

    @property
    def reads_text(self) -> bool:
        """True if the model is conditioned on text."""
        return self.cond_stage_key in TEXT_KEYS and not self.is_unconditional

    @cached_property
    def stable_diffusion(self) -> int | None:
        """Version of Stable Diffusion whose text encoder the model has: 1, 2, or None for other models."""
        stage = self.params.get("cond_stage_config")
        target = stage.get("target") if isinstance(stage, Mapping) else None
        return STABLE_DIFFUSION.get(str(target).rpartition(".")[2])

    @property
    def fills_by_text(self) -> bool:
        """True if the model fills the masked part of an image by a text."""
        return self.reads_text and self.params.get("conditioning_key") == "hybrid"

    @property
    def enlarges_by_text(self) -> bool:
        """True if the model enlarges an image by a text."""
        return self.reads_text and "low_scale_config" in self.params

    @property
    def needs_image(self) -> bool:
        """True if the model is conditioned on a text and an image."""
        return self.fills_by_text or self.enlarges_by_text

    @cached_property
    def cond_stage_params(self) -> Mapping[str, Any]:
        """Parameters of the conditioning stage; empty if it has none."""
        stage = self.params.get("cond_stage_config")
        params = stage.get("params") if isinstance(stage, Mapping) else None
        return params if isinstance(params, Mapping) else {}

    @property
    def timesteps(self) -> int:
        """Number of timesteps of the diffusion process.

        Raises:
            UserError: The configuration gives no number.
        """
        timesteps = self.params.get("timesteps", 1000)
        if not isinstance(timesteps, int):
            raise UserError('the model\'s configuration needs a number as "timesteps"')
        return timesteps

    def check_steps(self, steps: int) -> None:
        """Raise an error if the model has fewer timesteps than `steps`.

        Raises:
            UserError: The model has fewer timesteps.
        """
        if steps > self.timesteps:
            raise UserError(f"{steps} steps are more than the model's {self.timesteps}; give {self.timesteps} or fewer")

    def check_reads_text(self) -> None:
        """Raise an error if the model is not conditioned on text alone.

        Raises:
            UserError: It is conditioned on something else, or on an image as well.
        """
        if self.needs_image:
            needed, command = ("masked", "inpaint") if self.fills_by_text else ("small", "superres")
            raise UserError(
                f'the model "{self.name}" is conditioned on a {needed} image beside its text; use ldm {command}, or '
                "choose a text-to-image model"
            )
        if not self.reads_text:
            raise UserError(
                f'the model "{self.name}" is conditioned on {self.describe_conditioning()}, not on text; '
                "choose a text-to-image model"
            )

    def check_fills_by_text(self) -> None:
        """Raise an error if the model does not fill masked images by a text.

        Raises:
            UserError: It is another model.
        """
        if not self.fills_by_text:
            raise UserError(f'the model "{self.name}" does not fill images by a text; choose an in-painting model')

    def check_enlarges_by_text(self) -> None:
        """Raise an error if the model does not enlarge images by a text.

        Raises:
            UserError: It is another model.
        """
        if not self.enlarges_by_text:
            raise UserError(f'the model "{self.name}" does not enlarge images by a text; choose an upscaler')

    def check_condition(self, key: str, wanted: str) -> None:
        """Raise an error if the model is not conditioned on the entry `key` of a batch.

        Args:
            key: the entry.
            wanted: the kind of model to choose instead, with its article, such as "an in-painting".

        Raises:
            UserError: It is conditioned on something else.
        """
        if self.cond_stage_key != key:
            raise UserError(
                f'the model "{self.name}" is conditioned on {self.describe_conditioning()}, not on "{key}"; '
                f"choose {wanted} model"
            )

    def describe_conditioning(self) -> str:
        """Return what the model is conditioned on, for messages."""
        return "nothing" if self.is_unconditional else f'"{self.cond_stage_key}"'
