"""Read the configuration of a model, and derive image sizes and requirements from it. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.errors import UserError

TEXT_KEYS = ("caption", "txt")


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The `model` section of a YAML configuration, with its references resolved, as plain dicts and lists.

    Args:
        overrides: `model.key.sub=value` each, which take the place of what the file says.

    Raises:
        UserError: the file is missing, is not YAML, or describes no model; or an override changes nothing in it.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        loaded = OmegaConf.load(path)
        if overrides:
            loaded = OmegaConf.merge(loaded, OmegaConf.from_dotlist([_checked_override(each) for each in overrides]))
        config = OmegaConf.to_container(loaded, resolve=True)
    except FileNotFoundError:
        raise UserError(f'there is no configuration "{path}"; check the path') from None
    except (YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f'cannot read the configuration "{path}": {reason}; give a YAML file') from None
    model = config.get("model") if isinstance(config, Mapping) else None
    if not isinstance(model, Mapping) or "target" not in model:
        raise UserError(
            f'the configuration "{path}" describes no model; it needs "model:" with "target:" and "params:"'
        )
    params = model.get("params")
    if not isinstance(params, Mapping | None):
        raise UserError(f'the configuration "{path}" is damaged: "params:" of its model must hold names and values')
    return {**model, "params": dict(params or {})}


def _checked_override(text: str) -> str:
    key, equals, _ = text.partition("=")
    if not equals or not key.startswith("model."):
        raise UserError(f'"{text}" is no value of the model; write model.key.sub=value')
    return text


def check_text_model(name: str, model_config: Mapping[str, Any]) -> None:
    """Whether a model draws from text.

    Raises:
        UserError: it does not.
    """
    key = model_config["params"].get("cond_stage_key", "image")
    if key not in TEXT_KEYS:
        raise UserError(f'the model "{name}" draws from "{key}", not from text; choose a text-to-image model')


def check_condition(name: str, model_config: Mapping[str, Any], key: str, wanted: str) -> None:
    """Whether a model draws from the entry `key` of a batch.

    Raises:
        UserError: it does not; `wanted` says what model does.
    """
    found = model_config["params"].get("cond_stage_key", "image")
    if found != key:
        raise UserError(f'the model "{name}" draws from "{found}", not from "{key}"; choose {wanted} model')


def check_steps(model_config: Mapping[str, Any], steps: int) -> None:
    """Whether a model can be sampled in as many steps.

    Raises:
        UserError: it has fewer.
    """
    timesteps = model_config["params"].get("timesteps", 1000)
    if not isinstance(timesteps, int):
        raise UserError('the model\'s configuration needs a number as "timesteps"')
    if steps > timesteps:
        raise UserError(f"{steps} steps are more than the model's {timesteps}; give {timesteps} or fewer")


@dataclass(frozen=True)
class ImageSize:
    """What a configuration says about sizes, in pixels."""

    height: int
    width: int
    factor: int
    multiple: int

    @classmethod
    def of(cls, model_config: Mapping[str, Any]) -> ImageSize:
        """Read a model's configuration: its own size, pixels per latent, and what sizes must be multiples of.

        Raises:
            UserError: it is not written like one.
        """
        params = model_config["params"]
        try:
            factor = 2 ** _halvings(params.get("first_stage_config"), "ch_mult")
            unet = 2 ** _halvings(params.get("unet_config"), "channel_mult")
            size = params.get("image_size", 256 // factor)
            height, width = (size, size) if isinstance(size, int) else size
            if min(height, width) < 1:
                raise ValueError("no pixels")
            return cls(int(height) * factor, int(width) * factor, factor, factor * unet)
        except (AttributeError, TypeError, ValueError):
            raise UserError(
                "the model's configuration does not tell its size; image_size must be a positive number, or height "
                "and width, ch_mult and channel_mult must be lists"
            ) from None

    def check(self, option: str, pixels: int) -> int:
        """`pixels`, if the model can make pictures of that size.

        Raises:
            UserError: it cannot; the message names the nearest sizes that it can make.
        """
        if pixels % self.multiple:
            below = pixels // self.multiple * self.multiple
            near = " or ".join(str(size) for size in (below, below + self.multiple) if size)
            raise UserError(
                f"{option} {pixels} is not a multiple of {self.multiple}, as this model needs; nearest: {near}"
            )
        return pixels


def _halvings(config: Any, key: str) -> int:
    """How often a network halves its input: one time less than it has levels."""
    params = (config.get("params") if isinstance(config, Mapping) else None) or {}
    levels: Sequence[Any] | None = params.get(key) or (params.get("ddconfig") or {}).get(key)
    return len(levels) - 1 if levels else 0
