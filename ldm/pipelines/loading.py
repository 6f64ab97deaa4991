"""Load models for sampling: choose a device, build a model from its configuration, fill in its weights."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.config.instantiate import instantiate_from_config
from ldm.config.model_config import read_config
from ldm.errors import UserError
from ldm.io.checkpoint.loading import load_weights, without_ema
from ldm.io.checkpoint.reading import read_state_dict
from ldm.models.autoencoder import Autoencoder

logger = logging.getLogger(__name__)


def choose_device(name: str | None = None) -> torch.device:
    """The device called `name`, or without one the best there is.

    Raises:
        UserError: torch knows no such device, or this machine has none.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f'--device "{name}" cannot be used here ({reason}); leave it out or give cpu') from None
    return device


def load_model(
    config: str | Path | Mapping[str, Any],
    checkpoint: str | Path,
    device: torch.device | str = "cpu",
    precision: torch.dtype = torch.float32,
) -> Any:
    """Build the model that `config`, a file or what `read_config` gives, describes, with the weights of `checkpoint`.

    Moving averages take the place of the live weights where the configuration keeps them (`use_ema`) and the
    checkpoint holds them; `ema_scope` then changes nothing. Parts that only train are left out.

    Raises:
        UserError: a file is missing or damaged, or the two do not belong together.
    """
    model_config = config if isinstance(config, Mapping) else read_config(config)
    weights = read_state_dict(checkpoint)
    weights = without_ema(weights, use_average=bool(model_config["params"].get("use_ema", True)))
    model = build_model(for_inference(model_config, weights), weights, f'"{checkpoint}"')
    return model.to(device, precision)


def load_first_stage(
    config: str | Path,
    checkpoint: str | Path,
    device: torch.device | str = "cpu",
    precision: torch.dtype = torch.float32,
) -> Autoencoder:
    """The autoencoder that `config` describes, or the one within the latent diffusion model that it describes.

    Of a diffusion model's weights only those of its first stage are loaded.

    Raises:
        UserError: a file is missing or damaged, the two do not belong together, or there is no autoencoder of
            pictures with three channels.
    """
    model_config = read_config(config)
    weights = read_state_dict(checkpoint)
    inner, prefix = model_config["params"].get("first_stage_config"), "first_stage_model."
    if inner is None:
        weights = without_ema(weights, use_average=bool(model_config["params"].get("use_ema", False)))
    else:
        weights = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        if not isinstance(inner, Mapping) or not isinstance(inner.get("params"), Mapping) or not weights:
            raise UserError(f'the model of "{config}" has no first stage with weights; name one that has')
        model_config = inner
    model = build_model(for_inference(model_config, weights), weights, f'"{checkpoint}"')
    if not isinstance(model, Autoencoder) or model.encoder.conv_in.in_channels != 3:
        raise UserError(f'the model of "{config}" is no autoencoder of pictures with three channels; name one that is')
    return model.to(device, precision)


def build_model(model_config: Mapping[str, Any], weights: Mapping[str, Tensor], source: str) -> Any:
    """The model that `model_config` describes, filled with `weights`, in evaluation mode without gradients.

    Raises:
        UserError: the weights, called `source` in the message, are another model's.
    """
    elsewhere = _parts_from_elsewhere(model_config)
    with skip_init():
        model = instantiate_from_config(model_config)
    report = load_weights(model, weights, elsewhere, source)
    missing = [name for name in report.missing if not name.startswith(elsewhere)]
    if not dict(model.named_parameters()).keys().isdisjoint(missing):
        # A few parameters are younger than the file; they need their initial values after all.
        model = instantiate_from_config(model_config)
        load_weights(model, weights, elsewhere, source)
    return model.eval().requires_grad_(False)


def _parts_from_elsewhere(model_config: Mapping[str, Any]) -> tuple[str, ...]:
    """How the names of those weights begin that a model takes from other files, as its configuration says."""
    params = model_config["params"]
    parts = ["first_stage_model."] if _params_of(params, "first_stage").get("ckpt_path") else []
    if parts and params.get("cond_stage_config") == "__is_first_stage__":
        parts.append("cond_stage_model.")
    return tuple(parts)


def _params_of(params: Mapping[str, Any], part: str) -> Mapping[str, Any]:
    config = params.get(f"{part}_config")
    inner = config.get("params") if isinstance(config, Mapping) else None
    return inner if isinstance(inner, Mapping) else {}


def for_inference(model_config: Mapping[str, Any], weights: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
    """`model_config` without what serves training alone: averages, losses, and files to start from.

    Args:
        model_config: a model's `target` and `params`.
        weights: the state dict that will be loaded; parts that it fills need no file of their own.
    """
    params = _without_loss({key: value for key, value in model_config["params"].items() if key != "ckpt_path"})
    if "use_ema" in params or "unet_config" in params:  # a diffusion model averages unless told otherwise
        params["use_ema"] = False
    for part in ("first_stage", "cond_stage"):
        inner = _without_loss(_params_of(params, part))
        if not inner:
            continue
        if weights is None or any(name.startswith(f"{part}_model.") for name in weights):
            inner.pop("ckpt_path", None)
        params[f"{part}_config"] = {**params[f"{part}_config"], "params": inner}
    return {**model_config, "params": params}


def _without_loss(params: Mapping[str, Any]) -> dict[str, Any]:
    return {**params, "lossconfig": {"target": "torch.nn.Identity"}} if "lossconfig" in params else dict(params)


@contextmanager
def skip_init() -> Iterator[None]:
    """Build modules without drawing initial weights, which loading would overwrite: seconds less for a large model."""

    def keep(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return tensor

    saved = {name: getattr(nn.init, name) for name in dir(nn.init) if name.endswith("_") and not name.startswith("_")}
    try:
        for name in saved:
            setattr(nn.init, name, keep)
        yield
    finally:
        for name, function in saved.items():
            setattr(nn.init, name, function)
