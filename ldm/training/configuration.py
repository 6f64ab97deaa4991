"""From the command line to a checked plan of a run: merged configurations and the folders it will use."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ldm.errors import UserError, did_you_mean
from ldm.training.options import trainer_arguments

SECTIONS = ("model", "data", "lightning")
LIGHTNING_SECTIONS = ("trainer", "logger", "modelcheckpoint", "callbacks")
DEVICES = {"accelerator", "devices"}
# Processes that Lightning starts for further devices run the command again and must agree on the folder.
START_TIME_VARIABLE = "LDM_START_TIME"


@dataclass(frozen=True)
class Plan:
    """What a run is going to do; nothing of it is on disk yet."""

    config: DictConfig  # model, data
    lightning: DictConfig  # trainer, logger, modelcheckpoint, callbacks
    folder: Path
    now: str
    checkpoint: Path | None  # continued from
    train: bool
    test: bool
    debug: bool
    seed: int
    scale_lr: bool

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints go."""
        return self.folder / "checkpoints"


def plan(chosen: argparse.Namespace) -> Plan:
    """Read and check the configurations, and name the folders.

    Raises:
        UserError: a file that is missing or broken, a section or a Trainer argument that does not exist, nothing
            to train, or a path to resume from that is no run.
    """
    overrides = [*chosen.overrides, *(word for word in chosen.base if "=" in word)]
    files = [Path(word) for word in chosen.base if "=" not in word]
    folder, checkpoint = _resumed(Path(chosen.resume)) if chosen.resume else (None, None)
    if folder is not None:
        files = [*sorted((folder / "configs").glob("*.yaml")), *files]
    if not files:
        raise UserError("there is no configuration; give one with --base CONFIG.yaml, or a run with --resume")
    parts = [*(read_yaml(file) for file in files), _dotlist(overrides)]
    try:
        merged = OmegaConf.merge(*parts)
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        raise UserError(f"the configurations do not fit together: {_first_line(error)}") from None
    config, lightning = _split(merged)
    _add_trainer_arguments(lightning, chosen.trainer)
    if not chosen.train and checkpoint is None:
        raise UserError("there is nothing to do; give -t to train, or -r to test a trained model")
    _check_writable(folder or Path(chosen.logdir))
    now = os.environ.get(START_TIME_VARIABLE) or datetime.now().strftime("%Y-%m-%dT%H-%M-%S")
    return Plan(
        config=config,
        lightning=lightning,
        folder=folder or Path(chosen.logdir) / f"{now}_{chosen.name or files[0].stem}{chosen.postfix}",
        now=now,
        checkpoint=checkpoint,
        train=chosen.train,
        test=not chosen.no_test,
        debug=chosen.debug,
        seed=chosen.seed,
        scale_lr=chosen.scale_lr,
    )


def _check_writable(folder: Path) -> None:
    """Find out before training whether its folder can be made."""
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f'cannot write a run to "{folder}": "{parent}" is not a folder to write to; choose a --logdir')


def _resumed(path: Path) -> tuple[Path, Path]:
    """The log folder and the checkpoint that `path`, either of them, stands for."""
    if path.is_dir():
        checkpoint = path / "checkpoints" / "last.ckpt"
        if not checkpoint.is_file():
            raise UserError(f'cannot resume from "{path}": it has no checkpoints/last.ckpt')
        return path, checkpoint
    if not path.is_file():
        raise UserError(f'cannot resume from "{path}": there is no such folder or checkpoint')
    folder = next((parent.parent for parent in path.parents if parent.name == "checkpoints"), None)
    if folder is None:
        raise UserError(
            f'cannot resume from "{path}": it is not inside LOGDIR/checkpoints; '
            "to start a new run from its weights give model.params.ckpt_path"
        )
    return folder, path


def read_yaml(path: Path) -> DictConfig:
    """A configuration file whose sections are known.

    Raises:
        UserError: missing, unreadable, not YAML, or with an unknown section.
    """
    try:
        config = OmegaConf.load(path)
    except FileNotFoundError:
        near = (file.name for file in path.parent.glob("*.yaml")) if path.parent.is_dir() else ()
        raise UserError(f'there is no configuration "{path}"{did_you_mean(path.name, near)}') from None
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "it cannot be read"
        raise UserError(f'the configuration "{path}" is not valid YAML:{where} {problem}') from None
    except (OSError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise UserError(f'cannot read the configuration "{path}": {_first_line(error)}') from None
    if not isinstance(config, DictConfig):
        raise UserError(f'the configuration "{path}" has no sections; it needs at least "model:"')
    _check_keys(config, SECTIONS, f'the configuration "{path}"')
    return config


def _dotlist(words: list[str]) -> DictConfig:
    try:
        config = OmegaConf.from_dotlist(words)
    except (YAMLError, OmegaConfBaseException, ValueError) as error:
        raise UserError(f"cannot read {' '.join(words)}: {_first_line(error)}; write key.sub=value") from None
    _check_keys(config, SECTIONS, "the command line")
    return config


def _split(merged: DictConfig) -> tuple[DictConfig, DictConfig]:
    """Model and data, apart from what concerns Lightning."""
    for section in ("model", "data"):
        if not isinstance(merged.get(section), DictConfig):
            raise UserError(f'the configuration has no "{section}:" section; name it in one of the --base files')
    try:
        OmegaConf.resolve(merged)
    except OmegaConfBaseException as error:
        raise UserError(f"the configuration cannot be resolved: {_first_line(error)}") from None
    for key in sorted(OmegaConf.missing_keys(merged)):
        raise UserError(f"the configuration leaves {key} to you; give {key}=VALUE")
    lightning = merged.pop("lightning", None) or OmegaConf.create()
    _check_mapping(lightning, "lightning")
    _check_keys(lightning, LIGHTNING_SECTIONS, 'the section "lightning"')
    for name, section in lightning.items():
        if section:
            _check_mapping(section, f"lightning.{name}")
    for name in ("logger", "modelcheckpoint"):
        if lightning.get(name):
            _check_mapping(lightning[name].get("params", {}), f"lightning.{name}.params")
    return merged, lightning


def _add_trainer_arguments(lightning: DictConfig, given: dict[str, Any]) -> None:
    if "gpus" in given and given.keys() & DEVICES:
        raise UserError("--gpus excludes --accelerator and --devices; give one or the other")
    trainer = OmegaConf.create(lightning.get("trainer") or {})
    # Devices on the command line replace those of the files, which may name them the other way.
    replaced = ("accelerator", "devices") if "gpus" in given else ("gpus",) if given.keys() & DEVICES else ()
    for name in replaced:
        trainer.pop(name, None)
    trainer = OmegaConf.merge(trainer, given)
    _check_keys(trainer, [*trainer_arguments(), "gpus"], 'the section "lightning.trainer"')
    lightning.trainer = trainer


def _check_mapping(section: Any, where: str) -> None:
    if not isinstance(section, DictConfig | dict):
        raise UserError(f'the section "{where}" must hold names and values, got: {_first_line(section)}')


def _check_keys(config: DictConfig, known: Iterable[str], where: str) -> None:
    known = tuple(known)
    for key in config:
        if key not in known:
            listed = f"; known are {', '.join(known)}" if len(known) < 10 else ""
            raise UserError(f'{where} has an unknown key "{key}"{did_you_mean(str(key), known)}{listed}')


def _first_line(error: object) -> str:
    return str(error).strip().split("\n")[0]
