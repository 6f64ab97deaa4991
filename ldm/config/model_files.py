"""Find a model on disk: its configuration and its weights. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ldm.config.assets import locate, search_path
from ldm.errors import UserError, did_you_mean

MODELS = Path("models/ldm")
FIRST_STAGES = Path("models/first_stage_models")
WEIGHTS = ("model.safetensors", "model.ckpt", "last.ckpt")
RUN_CHECKPOINTS = "checkpoints"  # the folder of a training run that holds them
# Published models whose configuration is not kept beside their weights.
CONFIGS_ELSEWHERE = {
    "text2img-large": Path("configs/latent-diffusion/txt2img-1p4B-eval.yaml"),
    "cin256-v2": Path("configs/latent-diffusion/cin256-v2.yaml"),
    "rdm768x768": Path("configs/retrieval-augmented-diffusion/768x768.yaml"),
}


@dataclass(frozen=True)
class ModelFiles:
    """A model on disk: what to call it, its configuration and its weights."""

    name: str
    config: Path
    checkpoint: Path


def find_model(
    name: str | None = None,
    config: str | None = None,
    ckpt: str | None = None,
    places: Sequence[Path] = (MODELS,),
) -> ModelFiles | None:
    """The files that `--model`, `--config` and `--ckpt` ask for; None when they ask for nothing.

    Args:
        places: the folders that hold models which may go by their name.

    Raises:
        UserError: a file or model does not exist, or the options contradict each other.
    """
    if name is not None:
        if config or ckpt:
            raise UserError("--model names a configuration and its weights together; leave out --config and --ckpt")
        return named_model(name, places)
    if ckpt is None:
        if config is not None:
            raise UserError(f'--config "{config}" needs --ckpt: give the weights that belong to it')
        return None
    checkpoint = _existing(ckpt, "checkpoint")
    folder = checkpoint.resolve().parent
    name = (folder.parent if folder.name == RUN_CHECKPOINTS else folder).name
    if config is not None:
        return ModelFiles(name, _existing(config, "configuration"), checkpoint)
    beside = checkpoint.with_name("config.yaml")
    found = beside if beside.is_file() else trained_config(checkpoint)
    if found is None:
        raise UserError(f'there is no config.yaml beside "{ckpt}"; name its configuration with --config')
    return ModelFiles(name, found, checkpoint)


def trained_config(checkpoint: Path) -> Path | None:
    """The newest configuration of the training run that wrote `checkpoint`; None where it is in none."""
    found = sorted((checkpoint.resolve().parent.parent / "configs").glob("*-project.yaml"))
    return found[-1] if found else None


def named_model(name: str, places: Sequence[Path] = (MODELS,)) -> ModelFiles:
    """The model `name` in the first of `places` that has it, or in the folder `name`, which may be a training run's.

    Raises:
        UserError: there is no such folder, or something is missing from it.
    """
    candidates = [*(locate(place / name) for place in places), Path(name)]
    folder = next((candidate for candidate in candidates if candidate.is_dir()), None)
    if folder is None:
        known = available_models(places)
        where, listed = " or ".join(map(str, places)), ", ".join(known) or "none"
        raise UserError(f'there is no model "{name}" in {where}{did_you_mean(name, known)}; available: {listed}')
    run_checkpoint = folder / RUN_CHECKPOINTS / "last.ckpt"
    files = (*(folder / file for file in WEIGHTS), run_checkpoint)
    checkpoint = next((path for path in files if path.is_file()), None)
    if checkpoint is None:
        raise UserError(
            f'the model folder "{folder}" holds no weights; put {" or ".join(WEIGHTS[:2])} there; '
            "published ones come by scripts/download_weights.py"
        )
    config = folder / "config.yaml"
    if not config.is_file():
        trained = trained_config(checkpoint) if checkpoint == run_checkpoint else None
        config = trained or locate(CONFIGS_ELSEWHERE.get(folder.name, config))
    if not config.is_file():
        raise UserError(f'the model folder "{folder}" holds no config.yaml; put the model\'s configuration there')
    return ModelFiles(folder.resolve().name, config, checkpoint)


def downloaded_model(name: str) -> ModelFiles | None:
    """The published model `name` where its weights are in `models/ldm`, else None."""
    return named_model(name) if name in available_models() else None


def available_models(places: Sequence[Path] = (MODELS,)) -> list[str]:
    """Names of the models whose weights are in `places`."""
    folders = {folder for base in search_path() for place in places for folder in (base / place).glob("*")}
    return sorted({folder.name for folder in folders if any((folder / file).is_file() for file in WEIGHTS)})


def _existing(path: str, what: str) -> Path:
    found = locate(path)
    if not found.is_file():
        raise UserError(f'there is no {what} "{path}"; check the path, or download it first')
    return found
