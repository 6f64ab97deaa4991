"""Check of a whole configuration before any work, which reports all of its errors together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ldm.config.assets import locate
from ldm.config.channels import channel_faults
from ldm.config.instantiate import SPECIAL_CONFIGS, get_obj_from_str, parameter_faults, parameters_of
from ldm.errors import UserError, did_you_mean
from ldm.models.autoencoder import Autoencoder, ddconfig_faults

# Parameters whose value is the path of an existing file or folder.
PATHS = frozenset(
    [
        *("ckpt_path", "embedding_manager_ckpt", "diffusion_path", "remap"),
        *("data_root", "txt_file", "data_csv", "segmentation_root"),
        *("training_images_list_file", "test_images_list_file"),
    ]
)
# Parameters whose value may be the path of a text file, or another name.
TEXTS = frozenset(["vocab", "class_names", "palette"])
# Parameters whose value is always a target.
PARTS = frozenset(["unet_config", "first_stage_config", "cond_stage_config", "lossconfig"])
# Parameters of a target that the model adds to those of the configuration.
ADDED = {"lora_config": ("network",), "personalization_config": ("embedder",)}
TEXT_SUFFIXES = (".txt", ".json", ".yaml", ".csv")


def configuration_faults(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the errors in the sections `model` and `data` of a configuration, one line each.

    They are: targets that cannot be reached, parameters that are unknown, missing or of a wrong type, files that do not
    exist, and numbers of channels that disagree. Nothing is built.

    Args:
        config: the sections, as plain values.
    """
    for section in ("model", "data"):
        if isinstance(config.get(section), Mapping):
            yield from _target_faults(config[section], section)
    if isinstance(config.get("model"), Mapping):
        yield from channel_faults(config["model"])


def _target_faults(config: Mapping[str, Any], key: str, added: Iterable[str] = ()) -> Iterator[str]:
    """Yield the errors in a target, its parameters with those that are `added` later, and all targets inside."""
    if "target" not in config:
        yield f'{key} needs a "target", the class to build'
        return
    target, params = config["target"], config.get("params")
    try:
        cls = get_obj_from_str(target)
    except UserError as error:
        yield f"{key}: {error}"
        return
    except ImportError as error:
        yield f'{key}: target "{target}" needs a package that is not installed: {error}'
        return
    if not isinstance(params, Mapping | None):
        yield f'{key}: {target}: "params" must hold names and values, got: {params}'
        return
    params = params or {}
    yield from (f"{key}: {fault}" for fault in parameter_faults(cls, target, {**dict.fromkeys(added), **params}))
    if isinstance(cls, type) and issubclass(cls, Autoencoder) and isinstance(params.get("ddconfig"), Mapping):
        yield from (f"{key}.params: {fault}" for fault in ddconfig_faults(params["ddconfig"]))
    accepted = parameters_of(cls)[0]
    for name, value in params.items():
        if name in accepted:  # other parameters are not used
            yield from _value_faults(name, value, f"{key}.params.{name}")


def _value_faults(name: str, value: Any, key: str) -> Iterator[str]:
    """Yield the errors in the value of a parameter: a missing file, or errors of the targets inside."""
    if isinstance(value, str) and name in PARTS:
        if value not in SPECIAL_CONFIGS:
            yield f'{key}: "{value}" is not known{did_you_mean(value, SPECIAL_CONFIGS)}; give a "target"'
    elif isinstance(value, str):
        yield from _path_faults(name, value, key)
    elif isinstance(value, Mapping) and (isinstance(value.get("target"), str) or name in PARTS):
        yield from _target_faults(value, key, ADDED.get(name, ()))
    elif isinstance(value, list):
        for index, each in enumerate(value):
            if isinstance(each, Mapping) and isinstance(each.get("target"), str):
                yield from _target_faults(each, f"{key}.{index}")


def _path_faults(name: str, value: str, key: str) -> Iterator[str]:
    is_path = name in PATHS or (name in TEXTS and value.endswith(TEXT_SUFFIXES))
    if not is_path or locate(Path(value).expanduser()).exists():
        return
    yield f'{key}: there is no file or folder "{value}"; check the path'
