"""Plan of a run from the command line: merged and checked configurations, and the folders of the run."""

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

from ldm.config.assets import locate
from ldm.errors import UserError, did_you_mean
from ldm.io.files import check_writable
from ldm.training.options import trainer_arguments

SECTIONS = ("model", "data", "lightning")
LIGHTNING_SECTIONS = ("trainer", "logger", "modelcheckpoint", "callbacks")
DEVICES = {"accelerator", "devices"}
# Lightning runs the command again in one process per further device; all processes must use the same folder.
START_TIME_VARIABLE = "LDM_START_TIME"


@dataclass(frozen=True)
class Plan:
    """Plan of a run that is not on the disk yet.

    Attributes:
        config: the sections `model` and `data`.
        lightning: the sections `trainer`, `logger`, `modelcheckpoint` and `callbacks`.
        folder: the log folder.
        now: time of the start, the prefix of file names.
        checkpoint: the checkpoint to resume from.
        train, test: train, and test afterwards.
        debug: debug after an error, and move the log folder to `debug_runs`.
        seed: seed of all random numbers.
        scale_lr: scale the learning rate by the number of items in a step.
    """

    config: DictConfig
    lightning: DictConfig
    folder: Path
    now: str
    checkpoint: Path | None
    train: bool
    test: bool
    debug: bool
    seed: int
    scale_lr: bool

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.folder / "checkpoints"


def make_plan(args: argparse.Namespace) -> Plan:
    """Read and check the configurations, and choose the folders.

    Raises:
        UserError: a file is missing or invalid, a section or an argument of the Trainer is unknown, there is nothing
            to do, or the path to resume from is not a run.
    """
    overrides = [*args.overrides, *(word for word in args.base if "=" in word)]
    files = [locate(word) for word in args.base if "=" not in word]
    folder, checkpoint = _find_run(Path(args.resume)) if args.resume else (None, None)
    if folder is not None:
        files = [*sorted((folder / "configs").glob("*.yaml")), *files]
    if not files:
        raise UserError("there is no configuration; give --base CONFIG.yaml, or a run with --resume")
    configs = [*(read_yaml(file) for file in files), _parse_overrides(overrides)]
    try:
        merged = OmegaConf.merge(*configs)
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        raise UserError(f"cannot merge the configurations: {_first_line(error)}") from None
    config, lightning = _split_sections(merged)
    _add_trainer_arguments(lightning, args.trainer)
    if not args.train and checkpoint is None:
        raise UserError("there is nothing to do; give -t to train, or -r to test a trained model")
    check_writable(folder or Path(args.logdir), "--logdir" if folder is None else "--resume")
    now = os.environ.get(START_TIME_VARIABLE) or datetime.now().strftime("%Y-%m-%dT%H-%M-%S")
    return Plan(
        config=config,
        lightning=lightning,
        folder=folder or Path(args.logdir) / f"{now}_{args.name or files[0].stem}{args.postfix}",
        now=now,
        checkpoint=checkpoint,
        train=args.train,
        test=not args.no_test,
        debug=args.debug,
        seed=args.seed,
        scale_lr=args.scale_lr,
    )


def _find_run(path: Path) -> tuple[Path, Path]:
    """Return the log folder and the checkpoint of the run whose log folder or checkpoint is `path`."""
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
            "to start a new run from its weights, give model.params.ckpt_path=PATH"
        )
    return folder, path


def read_yaml(path: Path) -> DictConfig:
    """Read a configuration file and check its sections.

    Raises:
        UserError: the file is missing, is not valid YAML, or has an unknown section.
    """
    try:
        config = OmegaConf.load(path)
    except FileNotFoundError:
        near = (file.name for file in path.parent.glob("*.yaml")) if path.parent.is_dir() else ()
        raise UserError(f'there is no configuration "{path}"{did_you_mean(path.name, near)}') from None
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "the file is damaged"
        raise UserError(f'the configuration "{path}" is not valid YAML:{where} {problem}') from None
    except (OSError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise UserError(f'cannot read the configuration "{path}": {_first_line(error)}') from None
    if not isinstance(config, DictConfig):
        raise UserError(f'the configuration "{path}" has no sections; it needs at least "model:"')
    _check_keys(config, SECTIONS, f'the configuration "{path}"')
    return config


def _parse_overrides(words: list[str]) -> DictConfig:
    try:
        config = OmegaConf.from_dotlist(words)
    except (YAMLError, OmegaConfBaseException, ValueError) as error:
        raise UserError(f"cannot parse {' '.join(words)}: {_first_line(error)}; write key.sub=value") from None
    _check_keys(config, SECTIONS, "the command line")
    return config


def _split_sections(merged: DictConfig) -> tuple[DictConfig, DictConfig]:
    """Split the merged configuration into `model` and `data`, and `lightning`; check its sections."""
    for section in ("model", "data"):
        if not isinstance(merged.get(section), DictConfig):
            raise UserError(f'the configuration has no "{section}:" section; add it to one of the --base files')
    try:
        OmegaConf.resolve(merged)
    except OmegaConfBaseException as error:
        raise UserError(f"cannot resolve the configuration: {_first_line(error)}") from None
    for key in sorted(OmegaConf.missing_keys(merged)):
        raise UserError(f"the configuration needs a value for {key}; give {key}=VALUE")
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


def _add_trainer_arguments(lightning: DictConfig, arguments: dict[str, Any]) -> None:
    if "gpus" in arguments and arguments.keys() & DEVICES:
        raise UserError("--gpus cannot be combined with --accelerator or --devices; give one of them")
    trainer = OmegaConf.create(lightning.get("trainer") or {})
    # Devices on the command line replace those of the files, also when they use the other argument.
    replaced = ("accelerator", "devices") if "gpus" in arguments else ("gpus",) if arguments.keys() & DEVICES else ()
    for name in replaced:
        trainer.pop(name, None)
    trainer = OmegaConf.merge(trainer, arguments)
    _check_keys(trainer, [*trainer_arguments(), "gpus"], 'the section "lightning.trainer"')
    lightning.trainer = trainer


def _check_mapping(section: Any, where: str) -> None:
    if not isinstance(section, DictConfig | dict):
        raise UserError(f'the section "{where}" must be a mapping of keys to values, not: {_first_line(section)}')


def _check_keys(config: DictConfig, known: Iterable[str], where: str) -> None:
    known = tuple(known)
    for key in config:
        if key not in known:
            listed = f"; known keys: {', '.join(known)}" if len(known) < 10 else ""
            raise UserError(f'{where} has an unknown key "{key}"{did_you_mean(str(key), known)}{listed}')


def _first_line(error: object) -> str:
    return str(error).strip().split("\n")[0]
