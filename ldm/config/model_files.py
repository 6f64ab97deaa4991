"""Find a model on disk: its configuration and its weights. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ldm.config.assets import locate, search_path
from ldm.errors import UserError, did_you_mean

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


@dataclass(frozen=True)
class ModelFiles:
    """Name, configuration and weights of a model on disk."""

    name: str
    config: Path
    checkpoint: Path


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
    checkpoint = _locate_file(ckpt, "checkpoint")
    folder = checkpoint.resolve().parent
    name = (folder.parent if folder.name == RUN_CHECKPOINTS else folder).name
    if config is not None:
        return ModelFiles(name, _locate_file(config, "configuration"), checkpoint)
    beside = checkpoint.with_name("config.yaml")
    found = beside if beside.is_file() else trained_config(checkpoint)
    if found is None:
        raise UserError(f'there is no config.yaml beside "{ckpt}"; name its configuration with --config')
    return ModelFiles(name, found, checkpoint)


def trained_config(checkpoint: Path) -> Path | None:
    """Return the newest configuration of the training run that wrote `checkpoint`, or None if it is not in a run."""
    found = sorted((checkpoint.resolve().parent.parent / "configs").glob("*-project.yaml"))
    return found[-1] if found else None


def named_model(name: str, folders: Sequence[Path] = (MODELS,)) -> ModelFiles:
    """Find a model by its name in one of `folders`, or by its folder, which may be that of a training run.

    Raises:
        UserError: there is no such folder, or it lacks a file.
    """
    candidates = [*(locate(parent / name) for parent in folders), locate(name)]
    folder = next((candidate for candidate in candidates if candidate.is_dir()), None)
    if folder is None and locate(name).is_file():
        raise UserError(f'"{name}" is a file; name the folder of a model, or give the file as a checkpoint')
    if folder is None:
        known = available_models(folders)
        where, listed = " or ".join(map(str, folders)), ", ".join(known) or "none"
        hint = f"; ldm download_weights {name} downloads it" if _is_published(name) else did_you_mean(name, known)
        raise UserError(f'there is no model "{name}" in {where}{hint}; available: {listed}')
    run_checkpoint = folder / RUN_CHECKPOINTS / "last.ckpt"
    files = (*(folder / file for file in WEIGHTS), run_checkpoint)
    checkpoint = next((path for path in files if path.is_file()), None)
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


def _is_published(name: str) -> bool:
    from ldm.io.published_weights import CATALOGUE

    return any(download.name == name for download in CATALOGUE)


def downloaded_model(name: str) -> ModelFiles | None:
    """Return the published model `name` if its weights are in `models/ldm`, else None."""
    return named_model(name) if name in available_models() else None


def available_models(folders: Sequence[Path] = (MODELS,)) -> list[str]:
    """Return the names of the models whose weights are in `folders`."""
    found = {model for base in search_path() for folder in folders for model in (base / folder).glob("*")}
    return sorted({model.name for model in found if any((model / file).is_file() for file in WEIGHTS)})


def _locate_file(path: str, kind: str) -> Path:
    found = locate(path)
    if not found.is_file():
        raise UserError(f'there is no {kind} "{path}"; check the path, or download it first')
    return found
