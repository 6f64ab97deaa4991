"""Read the configuration of a model, and derive image sizes and requirements from it. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.config.layers import assignment, merge_layer
from ldm.config.model_texts import with_own_texts
from ldm.errors import UserError

TEXT_KEYS = ("caption", "txt")


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read the `model` section of a YAML configuration as plain dicts and lists, with references resolved.

    The text files that it names, such as a vocabulary, are looked up beside it first; see `ldm.config.model_texts`.

    Args:
        path: the YAML file; or the JSON file of a folder in the form of diffusers, which is translated.
        overrides: values that replace those of the file, each as `model.key.sub=value`; or `~model.key.sub`, which
            removes a key.

    Raises:
        UserError: the file is missing, is not YAML, or has no model; or an override does not belong to the model.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        loaded: Any = _translated(Path(path)) or OmegaConf.load(path)
        if overrides:
            loaded = merge_layer(loaded, OmegaConf.from_dotlist([_check_override(text) for text in overrides]))
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
    return with_own_texts({**model, "params": dict(params or {})}, Path(path).parent)


def _translated(path: Path) -> Any:
    """Return the configuration of a folder in the form of diffusers; None for a file of another kind."""
    from ldm.io.diffusers import files

    if path.name not in (files.INDEX, files.CONFIG) or not files.is_folder(path.parent):
        return None
    from omegaconf import OmegaConf

    from ldm.io.diffusers.pipeline import model_config

    return OmegaConf.create({"model": model_config(path.parent)})


def _check_override(text: str) -> str:
    """Return an override as `model.key.sub=value` if it belongs to the model.

    Raises:
        UserError: it does not.
    """
    assigned = assignment(text)
    key, equals, _ = assigned.partition("=")
    if not equals or not key.startswith("model."):
        raise UserError(f'"{text}" does not belong to the model; write model.key.sub=value')
    return assigned


@dataclass(frozen=True)
class ImageSize:
    """Image size of a model in pixels, as derived from its configuration.

    Attributes:
        height: height of an image.
        width: width of an image.
        factor: pixels per latent position, along each side.
        multiple: number that height and width must be multiples of.
    """

    height: int
    width: int
    factor: int
    multiple: int

    @classmethod
    def of(cls, model_config: Mapping[str, Any]) -> ImageSize:
        """Return the image size of the model with this configuration.

        Raises:
            UserError: the configuration does not state the size.
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
                "the model's configuration does not state its size; image_size must be a positive number, or height "
                "and width, ch_mult and channel_mult must be lists"
            ) from None

    def check(self, option: str, pixels: int) -> int:
        """Return `pixels` if the model can generate images of that size.

        Args:
            option: name of the option, for the message.
            pixels: height or width.

        Raises:
            UserError: it cannot; the message names the nearest possible sizes.
        """
        if pixels % self.multiple:
            below = pixels // self.multiple * self.multiple
            near = " or ".join(str(size) for size in (below, below + self.multiple) if size)
            raise UserError(
                f"{option} {pixels} is not a multiple of {self.multiple}, as this model needs; nearest: {near}"
            )
        return pixels


def _halvings(config: Any, key: str) -> int:
    """Return how often a network halves its input: the number of its levels minus one."""
    params = (config.get("params") if isinstance(config, Mapping) else None) or {}
    levels: Sequence[Any] | None = params.get(key) or (params.get("ddconfig") or {}).get(key)
    return len(levels) - 1 if levels else 0
