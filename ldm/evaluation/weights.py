"""Facts about the weights of a model and about a run of samples, for the protocol of a figure."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import yaml

from ldm.errors import UserError
from ldm.io.checkpoint.loading import EMA_PREFIX
from ldm.io.files import sha256
from ldm.io.folders import list_files_below

RUN_FILE = "sampling_config.yaml"  # in the folder of a run of `sample_diffusion`
# Options of a run that its samples depend on, apart from the model and the seed.
SAMPLING = ("sampler", "custom_steps", "eta", "timestep_spacing", "vanilla_sample", "scale", "classes", "precision")


def hash_weights(path: Path) -> str:
    """Return the SHA-256 of a file of weights; of a folder that of the names and hashes of its files."""
    if path.is_file():
        return sha256(path)
    digest = hashlib.sha256()
    for name in list_files_below(path, (".safetensors", ".bin", ".json")).files:
        digest.update(f"{name} {sha256(path / name)}\n".encode())
    return digest.hexdigest()


def averaging(path: Path, params: dict[str, Any] | Any) -> str:
    """Return which weights of a checkpoint are used: "moving averages", "live weights" or "as stored".

    Args:
        path: the checkpoint.
        params: parameters of the model in its configuration.
    """
    if not path.is_file():
        return "as stored"
    from ldm.io.checkpoint.reading import read_header

    if not any(name.startswith(EMA_PREFIX) for name in read_header(path).shapes):
        return "as stored"
    return "moving averages" if params.get("use_ema", "unet_config" in params) else "live weights"


def run_of(folder: Path) -> dict[str, Any] | None:
    """Return the options of the run of `sample_diffusion` that a folder or an archive of samples belongs to.

    Args:
        folder: the folder of the run, its folder `img`, or an archive in its folder `numpy`.

    Raises:
        UserError: the file with the options is damaged.
    """
    candidates = (folder, folder.parent, folder.parent.parent) if folder.is_file() else (folder, folder.parent)
    path = next((each / RUN_FILE for each in candidates if (each / RUN_FILE).is_file()), None)
    if path is None:
        return None
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        options = None
    if not isinstance(options, dict):
        raise UserError(f'"{path}", which describes the samples, is damaged; delete it, or sample again')
    return options


def images_of_run(path: Path) -> Path:
    """Return the folder of the images of a run of `sample_diffusion` for its folder, and another path unchanged."""
    images = path / "img"
    return images if (path / RUN_FILE).is_file() and images.is_dir() else path


def sampling_of(options: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of the sampler of a run."""
    names = {"custom_steps": "steps", "scale": "guidance"}
    return {names.get(name, name): options.get(name) for name in SAMPLING}


def sampled_model(options: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """Return the facts about the model of a run, and which of its weights were used if they still exist."""
    from ldm.config.assets import locate
    from ldm.config.model_config import read_config

    checkpoint, config = locate(str(options.get("resume"))), locate(str(options.get("config")))
    facts = {name: options.get(name) for name in ("model", "resume", "seed", "n_samples", "version")}
    if not checkpoint.exists():
        return {**facts, "weights_sha256": None}, None
    params = read_config(config)["params"] if config.is_file() else {}
    return {**facts, "weights_sha256": hash_weights(checkpoint)}, averaging(checkpoint, params)
