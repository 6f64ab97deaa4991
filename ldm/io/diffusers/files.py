"""Files of a folder in the form of diffusers: which of them a model needs, and where they are."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from ldm.errors import UserError
from ldm.io.diffusers.entries import read_json

INDEX, CONFIG, SCHEDULER_CONFIG = "model_index.json", "config.json", "scheduler_config.json"
UNET, TOKENIZER, SCHEDULER, SMALL_SCHEDULER = "unet", "tokenizer", "scheduler", "low_res_scheduler"
FIRST_STAGES, TEXT_ENCODERS = ("vae", "vqvae"), ("text_encoder", "bert")
NETWORKS = (UNET, *FIRST_STAGES, *TEXT_ENCODERS)
# Names of weights, best ones first: whole before half precision, safetensors before pickles.
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
SUFFIXES = (".safetensors", ".safetensors.index.json", ".fp16.safetensors", ".bin", ".bin.index.json", ".fp16.bin")
SHARDS = ".index.json"


def is_folder(path: Path) -> bool:
    """Return whether a path is a folder in the form of diffusers: a pipeline, or one network."""
    return (path / INDEX).is_file() or ((path / CONFIG).is_file() and weights_name(_names(path)) is not None)


def config_file(folder: Path) -> Path:
    """Return the file with the configuration of the model in a folder."""
    return folder / INDEX if (folder / INDEX).is_file() else folder / CONFIG


def weights_name(names: Iterable[str]) -> str | None:
    """Return the best file of weights among the names in the folder of a network; None if there is none."""
    names = set(names)
    return next((stem + suffix for suffix in SUFFIXES for stem in STEMS if stem + suffix in names), None)


def weights_files(folder: Path) -> list[Path]:
    """Return the files with the weights of a network: one, or several shards.

    Raises:
        UserError: there are none, or shards are missing.
    """
    name = weights_name(_names(folder))
    if name is None:
        raise UserError(f'"{folder}" has no weights such as {STEMS[0]}.safetensors; copy or download them')
    if not name.endswith(SHARDS):
        return [folder / name]
    shards = read_json(folder / name).get("weight_map", {})
    files = [folder / str(shard) for shard in sorted(set(shards.values()))]
    missing = [file for file in files if file.parent != folder or not file.is_file()]
    if missing or not files:
        raise UserError(f'"{folder / name}" names files that are missing; copy or download the whole folder')
    return files


def needed(names: Iterable[str]) -> list[str]:
    """Return the files that a model needs, of all files of a repository in the form of diffusers."""
    folders: dict[str, list[str]] = {}
    for path in map(PurePosixPath, names):
        folders.setdefault(str(path.parent), []).append(path.name)
    found = [name for name in (INDEX, CONFIG) if name in folders.get(".", [])]
    found += [f"{part}/{SCHEDULER_CONFIG}" for part in (SCHEDULER, SMALL_SCHEDULER) if part in folders]
    found += [f"{TOKENIZER}/{name}" for name in folders.get(TOKENIZER, []) if name.endswith((".json", ".txt"))]
    if INDEX not in found:
        found += _weights_of(folders.get(".", []))
    for part in NETWORKS:
        files = folders.get(part, [])
        found += [f"{part}/{name}" for name in (*_weights_of(files), *([CONFIG] if CONFIG in files else []))]
    return found


def _weights_of(names: list[str]) -> list[str]:
    best = weights_name(names)
    if best is None or not best.endswith(SHARDS):
        return [best] if best else []
    stem, suffix = best.removesuffix(SHARDS).split(".", 1)
    return [best, *(name for name in names if name.startswith(f"{stem}-") and name.endswith(f".{suffix}"))]


def _names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()] if folder.is_dir() else []
