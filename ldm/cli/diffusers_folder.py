"""Parts of the command `convert_checkpoint` for folders in the form of diffusers: write one, or read one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.command import say
from ldm.config.assets import locate
from ldm.config.distribution import install_hint
from ldm.config.model_config import read_config
from ldm.config.model_files import MODEL_FOLDERS, ModelFiles, find_model, named_model
from ldm.errors import UserError
from ldm.io.diffusers import files
from ldm.io.files import atomic_folder, sha256

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.io.diffusers.writing import Plan

logger = logging.getLogger(__name__)
EXPECTED, WRONG = 1e-5, 1e-3  # relative differences of outputs: those of rounding are below, those of mistakes above


def find_source(source: str, config: str | None) -> ModelFiles:
    """Return the files of the model to convert: a checkpoint, or the name or folder of a model.

    Raises:
        UserError: it does not exist, or its configuration is unknown.
    """
    if config is not None or locate(source).is_file():
        return find_model(None, config, source)
    return named_model(source, MODEL_FOLDERS)


def check_folder(folder: Path, source: ModelFiles, overwrite: bool) -> None:
    """Raise an error if a model must not be written to `folder`.

    Raises:
        UserError: it is the source, it exists and `overwrite` is not set, or it is not in the form of diffusers.
    """
    if not folder.exists():
        return
    if folder.samefile(source.checkpoint):
        raise UserError(f'"{folder}" is the source itself; choose another DST')
    if not overwrite:
        raise UserError(f'"{folder}" exists; choose another DST, or give --overwrite')
    if not files.is_folder(folder):
        raise UserError(f'"{folder}" is not a model in the form of diffusers and is not replaced; choose another DST')


def write_folder(
    source: ModelFiles, folder: Path, choose: Callable[..., tuple[dict[str, Tensor], str]], half: bool
) -> None:
    """Write the model in `source` as a folder in the form of diffusers.

    Args:
        source: the model.
        folder: the folder; it is replaced.
        choose: function that selects the live or the averaged weights of a state dict.
        half: write float16.

    Raises:
        UserError: diffusers has no such model, or a file of the source is damaged.
    """
    import torch

    from ldm.io.checkpoint.reading import read_state_dict
    from ldm.io.checkpoint.writing import cast
    from ldm.io.diffusers.writing import record
    from ldm.pipelines import diffusers_folder
    from ldm.pipelines.loading import build_model, for_inference

    weights, kind = choose(read_state_dict(source.checkpoint))
    config = for_inference(read_config(source.config), weights)
    model = build_model(config, weights, f'"{source.checkpoint}"')
    content = diffusers_folder.plan_of(model, config)

    def change(name: str, value: Tensor) -> Tensor:
        return cast(name, value, torch.float16, "leave out --half") if half and value.is_floating_point() else value

    facts = {**origin(source.checkpoint), "weights": kind, **({"dtype": "float16"} if half else {})}
    with atomic_folder(folder) as temporary:
        diffusers_folder.write_folder(model, content, temporary, change, facts)
        if half:
            model.half().float()  # the outputs of the rounded weights are compared
        compared = compare(model, content, temporary)
        record(temporary, {**facts, **compared})
    kind_of_model = "first stage" if content.index is None else content.index["_class_name"]
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    say(f"{folder}: {size / 1e6:.1f} MB, {kind_of_model}, {kind} weights")


def compare(model: Any, content: Plan, folder: Path) -> dict[str, str]:
    """Compare the outputs of a model with those of diffusers, print the largest difference, and return it as metadata.

    Raises:
        UserError: they differ by more than rounding.
    """
    from ldm.pipelines.diffusers_folder import largest_difference

    found = largest_difference(model, content, folder)
    if found is None:
        say(f"the outputs are not compared, because diffusers is not installed: {install_hint('diffusers')}")
        return {}
    difference, package = found
    if not difference < WRONG:
        raise UserError(f"the outputs differ from those of {package} by {difference:.1e}; nothing is written")
    if difference > EXPECTED:
        logger.warning("the outputs differ by more than the expected %.0e of rounding", EXPECTED)
    say(f"largest difference of outputs to {package}: {difference:.1e}")
    return {"largest_difference": f"{difference:.1e}", "compared_with": package}


def compare_with_source(weights: Mapping[str, Tensor], source: ModelFiles) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the configuration of a model in the form of diffusers, and metadata about the difference of its outputs.

    Args:
        weights: its weights under our names.
        source: its files.
    """
    from ldm.pipelines.diffusers_folder import plan_of
    from ldm.pipelines.loading import build_model, for_inference

    config = read_config(source.config)
    inner = for_inference(config, weights)
    model = build_model(inner, weights, f'"{source.checkpoint}"')
    return config, compare(model, plan_of(model, inner), source.checkpoint)


def origin(source: Path) -> dict[str, str]:
    """Return metadata about the source of a conversion: the hash of a file, or the name of a folder."""
    return {"source_sha256": sha256(source)} if source.is_file() else {"source": source.resolve().name}
