"""Find a model on disk: its configuration and its weights. Needs no torch."""

from __future__ import annotations

import glob
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import overload

from ldm.config.assets import locate, search_path
from ldm.errors import UserError, did_you_mean
from ldm.io.diffusers import files as diffusers_files
from ldm.io.folders import visible

logger = logging.getLogger(__name__)
MODELS = Path("models/ldm")
FIRST_STAGES = Path("models/first_stage_models")
RETRIEVAL_MODELS = Path("models/rdm")
MODEL_FOLDERS = (MODELS, RETRIEVAL_MODELS, FIRST_STAGES)
WEIGHTS = ("model.safetensors", "model.ckpt", "last.ckpt")
RUN_CHECKPOINTS = "checkpoints"  # folder inside a training run
# Published models whose configuration is not in the folder of the weights.
CONFIGS_ELSEWHERE = {
    "text2img-large": Path("configs/latent-diffusion/txt2img-1p4B-eval.yaml"),
    "cin256-v2": Path("configs/latent-diffusion/cin256-v2.yaml"),
    "rdm768x768": Path("configs/retrieval-augmented-diffusion/768x768.yaml"),
}


HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")  # of a model on the Hugging Face hub: owner/model


@dataclass(frozen=True)
class ModelFiles:
    """Name, configuration and weights of a model on disk.

    A model in the form of diffusers has its `model_index.json` as configuration, and its folder as weights.

    Attributes:
        name: name of the model.
        config: its configuration.
        checkpoint: its weights.
        vae: weights of a first stage that replace its own.
        loras: LoRA files to merge into its weights, and their factors.
        embeddings: files of textual inversions, and tokens to use instead of theirs.
    """

    name: str
    config: Path
    checkpoint: Path
    vae: Path | None = None
    loras: tuple[tuple[Path, float], ...] = ()
    embeddings: tuple[tuple[Path, str | None], ...] = ()


@overload
def find_model(name: None, config: str | None, ckpt: str, folders: Sequence[Path] = (MODELS,)) -> ModelFiles: ...


@overload
def find_model(
    name: str | None = None,
    config: str | None = None,
    ckpt: str | None = None,
    folders: Sequence[Path] = (MODELS,),
) -> ModelFiles | None: ...


def find_model(
    name: str | None = None,
    config: str | None = None,
    ckpt: str | None = None,
    folders: Sequence[Path] = (MODELS,),
) -> ModelFiles | None:
    """Find the files that `--model`, `--config` and `--ckpt` select; None if none of them is given.

    Args:
        name: name or folder of a model.
        config: configuration file.
        ckpt: file of weights.
        folders: folders in which names are looked up.

    Raises:
        UserError: a file or model does not exist, or the options contradict each other.
    """
    if name is not None:
        if config or ckpt:
            raise UserError("--model names a configuration and its weights together; leave out --config and --ckpt")
        return named_model(name, folders)
    if ckpt is None:
        if config is not None:
            raise UserError(f'--config "{config}" needs --ckpt: give the weights that belong to it')
        return None
    ckpt = newest_match(ckpt, "--ckpt")
    found = locate(ckpt)
    if diffusers_files.is_folder(found):
        own = _locate_file(config, "configuration") if config is not None else diffusers_files.config_file(found)
        return ModelFiles(found.resolve().name, own, found)
    checkpoint = _locate_file(ckpt, "checkpoint")
    folder = checkpoint.resolve().parent
    name = (folder.parent if folder.name == RUN_CHECKPOINTS else folder).name
    if config is not None:
        return ModelFiles(name, _locate_file(config, "configuration"), checkpoint)
    beside = next((path for path in _configs_beside(checkpoint) if path.is_file()), None) or trained_config(checkpoint)
    return ModelFiles(name, beside, checkpoint) if beside is not None else _recognised(checkpoint)


def with_additions(
    files: ModelFiles,
    vae: str | Path | None = None,
    loras: Sequence[tuple[str | Path, float]] = (),
    embeddings: Sequence[tuple[str | Path, str | None]] = (),
) -> ModelFiles:
    """Return a model with another first stage, with LoRA files and with files of textual inversions.

    Raises:
        UserError: a file does not exist.
    """
    stage = None if vae is None else locate(vae)
    if stage is not None and not diffusers_files.is_folder(stage):
        stage = _locate_file(str(vae), "first stage")
    found = tuple((_locate_file(str(path), "LoRA"), factor) for path, factor in loras)
    words = tuple((_locate_file(str(path), "embedding"), token) for path, token in embeddings)
    return replace(files, vae=stage, loras=found, embeddings=words)


def _configs_beside(checkpoint: Path) -> tuple[Path, ...]:
    """Return the files that may hold the configuration of a checkpoint in its folder."""
    return checkpoint.with_name("config.yaml"), checkpoint.with_suffix(".yaml")


def _recognised(checkpoint: Path) -> ModelFiles:
    """Return the files of a model whose configuration its weights state.

    Raises:
        UserError: they do not.
    """
    from ldm.config.recognition import recognise
    from ldm.io.checkpoint.reading import read_header

    header = read_header(checkpoint)
    found = recognise(header.shapes, checkpoint, header.metadata)
    if found is None:
        raise UserError(
            f'there is no config.yaml beside "{checkpoint}", and its weights are not those of a known model; '
            "name its configuration with --config"
        )
    logger.info('"%s" is %s (%s); configuration: %s', checkpoint, found.name, found.reason, found.config)
    return ModelFiles(checkpoint.stem, _locate_file(str(found.config), "configuration"), checkpoint)


def trained_config(checkpoint: Path) -> Path | None:
    """Return the newest configuration of the training run that wrote `checkpoint`, or None if it is not in a run."""
    found = sorted((checkpoint.resolve().parent.parent / "configs").glob("*-project.yaml"))
    return found[-1] if found else None


def named_model(name: str, folders: Sequence[Path] = (MODELS,)) -> ModelFiles:
    """Find a model by its name in one of `folders`, or by its folder, which may be that of a training run.

    A folder in the form of diffusers is found too. A name such as "owner/model" is downloaded from the Hugging Face
    hub if there is no such folder. A path with `*` names the last folder with weights that matches it, in the order of
    names: `logs/*_mine` is the newest run called "mine".

    Raises:
        UserError: there is no such folder, or it lacks a file; or the hub has no such model, or cannot be reached.
    """
    if "*" in name and not locate(name).exists():
        return named_model(str(_newest_model(name)), folders)
    candidates = [*(locate(parent / name) for parent in folders), locate(name)]
    folder = next((candidate for candidate in candidates if candidate.is_dir()), None)
    if folder is None and locate(name).is_file():
        raise UserError(f'"{name}" is a file; name the folder of a model, or give the file as a checkpoint')
    if folder is None and HUB_NAME.fullmatch(name) and not Path(name).parent.exists():
        from ldm.io.hub import download_model

        folder = download_model(name)
        return ModelFiles(Path(name).name, diffusers_files.config_file(folder), folder)
    if folder is None:
        known = available_models(folders)
        where, listed = " or ".join(map(str, folders)), ", ".join(known) or "none"
        hint = f"; ldm download_weights {name} downloads it" if _is_published(name) else did_you_mean(name, known)
        raise UserError(f'there is no model "{name}" in {where}{hint}; available: {listed}')
    run_checkpoint = folder / RUN_CHECKPOINTS / "last.ckpt"
    files = (*(folder / file for file in WEIGHTS), run_checkpoint)
    checkpoint = next((path for path in files if path.is_file()), None)
    has_own_config = checkpoint is not None and (folder / "config.yaml").is_file()
    if not has_own_config and diffusers_files.is_folder(folder):
        return ModelFiles(folder.resolve().name, diffusers_files.config_file(folder), folder)
    if checkpoint is None:
        raise UserError(
            f'the model folder "{folder}" contains no weights; put {" or ".join(WEIGHTS[:2])} there; '
            "ldm download_weights downloads published ones"
        )
    config = folder / "config.yaml"
    if not config.is_file():
        trained = trained_config(checkpoint) if checkpoint == run_checkpoint else None
        config = trained or locate(CONFIGS_ELSEWHERE.get(folder.name, config))
    if not config.is_file():
        raise UserError(
            f'the model folder "{folder}" contains no config.yaml; put the configuration of the model there'
        )
    return ModelFiles(folder.resolve().name, config, checkpoint)


def newest_match(path: str, role: str) -> str:
    """Return the last match of a path with `*` in the order of names, and any other path unchanged.

    The names of training runs begin with their time, so that `logs/*_mine/checkpoints/last.ckpt` is the newest.

    Args:
        path: the path.
        role: the option or key that names it, for the message.

    Raises:
        UserError: nothing matches.
    """
    if "*" not in path or locate(path).exists():
        return path
    found = _matches(path)
    if not found:
        raise UserError(f'{role} "{path}" matches no file; train that model first, or check the path')
    return str(found[-1])


def _matches(pattern: str) -> list[Path]:
    """Return the paths that match a pattern, sorted; `*` is its only special character."""
    escaped = re.sub(r"([?[])", r"[\1]", os.path.expanduser(pattern))
    return [Path(path) for path in sorted(glob.glob(escaped))]


def _newest_model(pattern: str) -> Path:
    """Return the last folder with weights that matches a pattern, in the order of names.

    Raises:
        UserError: there is none.
    """
    files = (*WEIGHTS, f"{RUN_CHECKPOINTS}/last.ckpt")
    found = [folder for folder in _matches(pattern) if any((folder / file).is_file() for file in files)]
    if not found:
        raise UserError(f'"{pattern}" matches no folder of a model with weights; train it first, or check the path')
    return found[-1]


def _is_published(name: str) -> bool:
    from ldm.io.published_weights import CATALOGUE

    return any(download.name == name for download in CATALOGUE)


def downloaded_model(name: str) -> ModelFiles | None:
    """Return the published model `name` if its weights are in `models/ldm`, else None."""
    return named_model(name) if name in available_models() else None


def available_models(folders: Sequence[Path] = (MODELS,)) -> list[str]:
    """Return the names of the models whose weights are in `folders`."""
    found = {model for base in search_path() for folder in folders for model in visible((base / folder).glob("*"))}
    names = (*WEIGHTS, diffusers_files.INDEX)
    return sorted({model.name for model in found if any((model / file).is_file() for file in names)})


def _locate_file(path: str, kind: str) -> Path:
    found = locate(path)
    if not found.is_file():
        raise UserError(f'there is no {kind} "{path}"; check the path, or download it first')
    return found
