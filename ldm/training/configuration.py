"""Plan of a run from the command line: merged and checked configurations, and the folders of the run."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ldm.config.assets import locate
from ldm.config.layers import assignment, merge_layer, section_name
from ldm.config.model_files import newest_match
from ldm.config.model_texts import with_own_texts
from ldm.errors import ErrorCollector, UserError, did_you_mean
from ldm.io.files import check_writable
from ldm.training.options import NON_FINITE_POLICIES, logger_words, trainer_arguments
from ldm.training.run_folder import find_run, saved_configurations, saved_options

SECTIONS = ("model", "data", "lightning")
LIGHTNING_SECTIONS = ("trainer", "logger", "modelcheckpoint", "callbacks", "non_finite")
DEVICES = {"accelerator", "devices"}
# Options of the command whose values are saved with a run, and their defaults.
DEFAULT_OPTIONS = {"seed": 23, "scale_lr": True}


@dataclass(frozen=True)
class Plan:
    """Plan of a run that is not on the disk yet.

    Attributes:
        config: the sections `model` and `data`.
        lightning: the sections `trainer`, `logger`, `modelcheckpoint` and `callbacks`, and the policy `non_finite`.
        folder: the log folder; a new run reserves it, or another one, when it starts.
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

    @property
    def options(self) -> dict[str, Any]:
        """Options of the command that are saved with the run."""
        return {name: getattr(self, name) for name in DEFAULT_OPTIONS}


def make_plan(args: argparse.Namespace) -> Plan:
    """Read and check the configurations, and choose the folders.

    Raises:
        UserError: a file is missing or invalid, a section or an argument of the Trainer is unknown, there is nothing
            to do, or the path to resume from is not a run.
    """
    folder, checkpoint = find_run(Path(args.resume)) if args.resume else (None, None)
    saved = [read_yaml(file) for file in saved_configurations(folder)] if folder else []
    files = [locate(word) for word in args.base if not _is_override(word)]
    if not (files or saved):
        raise UserError("there is no configuration; give --base CONFIG.yaml, or a run with --resume")
    *layers, overrides = _read_layers(files, [*args.overrides, *filter(_is_override, args.base)])
    merged = _merge([*saved, *layers, overrides])
    if checkpoint is not None:
        _check_weights(_merge(saved), overrides)
    config, lightning = _split_sections(merged)
    if not args.train and (checkpoint is None or args.no_test):
        raise UserError("there is nothing to do; give -t to train, or -r to test a trained model")
    options = _choose_options(args, folder)
    errors = ErrorCollector()
    with errors.collecting():
        check_writable(folder or Path(args.logdir), "--logdir" if folder is None else "--resume")
    with errors.collecting():
        _check_keys(lightning, LIGHTNING_SECTIONS, 'the section "lightning"')
    with errors.collecting():
        _check_lightning(lightning)
        _add_trainer_arguments(lightning, args.trainer)
    if checkpoint is None:
        with errors.collecting():
            _choose_newest_weights(config)
    _check_errors(errors, config)
    now = datetime.now().strftime("%Y-%m-%dT%H-%M-%S")
    return Plan(
        config=config,
        lightning=lightning,
        folder=folder or Path(args.logdir) / f"{now}_{args.name or files[0].stem}{args.postfix}",
        now=now,
        checkpoint=checkpoint,
        train=args.train,
        test=not args.no_test,
        debug=args.debug,
        **options,
    )


def _read_layers(files: Sequence[Path], words: list[str]) -> list[DictConfig]:
    """Return the configurations of files, and at the end the overrides of the command line.

    Raises:
        UserError: some of them are invalid; all of these are named.
    """
    errors, layers = ErrorCollector(), []
    for file in files:
        with errors.collecting():
            layers.append(read_yaml(file))
    with errors.collecting():
        layers.append(_parse_overrides(words))
    errors.check()
    return layers


def _check_errors(errors: ErrorCollector, config: DictConfig) -> None:
    """Raise the errors of a plan, if there are any, with those of the model and the data.

    Raises:
        UserError: there are errors.
    """
    if not errors.messages:
        return
    from ldm.training.configuration_check import configuration_faults

    errors.add(*configuration_faults(plain(config)))
    errors.check()


def _is_override(word: str) -> bool:
    """Return whether a word after `--base` is an override such as `lightning=null` or `~lightning`, and not a file."""
    return (
        bool(re.match(r"[A-Za-z_][\w.-]*=|~[A-Za-z_][\w.-]*$", word))
        and not word.endswith((".yaml", ".yml"))
        and not locate(word).is_file()
    )


def _merge(configs: Iterable[DictConfig]) -> DictConfig:
    """Merge configurations; devices of a later one replace those of the others, also in the other spelling."""
    merged = OmegaConf.create()
    try:
        for config in configs:
            _remove_devices(_trainer_section(merged), _trainer_section(config))
            merged = merge_layer(merged, config)
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        raise UserError(f"cannot merge the configurations: {_first_line(error)}") from None
    return merged


def merged_configuration(configs: Iterable[DictConfig]) -> DictConfig:
    """Return merged configurations with their references resolved, for reading.

    Raises:
        UserError: they cannot be merged, or a reference cannot be resolved.
    """
    merged = _merge(configs)
    try:
        OmegaConf.resolve(merged)
    except OmegaConfBaseException as error:
        raise UserError(f"cannot resolve the configuration: {_first_line(error)}") from None
    return merged


def _trainer_section(config: DictConfig) -> Any:
    lightning = config.get("lightning")
    return lightning.get("trainer") if isinstance(lightning, DictConfig) else None


def _remove_devices(trainer: Any, later: Any) -> None:
    """Remove from `trainer` the devices that `later` replaces: `gpus`, or `accelerator` and `devices`."""
    if not isinstance(trainer, DictConfig) or not isinstance(later, DictConfig | dict):
        return
    replaced = ("accelerator", "devices") if "gpus" in later else ("gpus",) if later.keys() & DEVICES else ()
    for name in replaced:
        trainer.pop(name, None)


def _check_weights(saved: DictConfig, overrides: DictConfig) -> None:
    """Raise UserError if an override names other initial weights, or other tokens, for a resumed run."""
    before = dict(_leaves(saved.get("model"), "model"))
    for key, value in _leaves(overrides.get("model"), "model"):
        if key.endswith("placeholder_strings") and value != before.get(key):
            raise UserError(f"{key} names the vectors in the checkpoint of the run; leave it out when resuming")
        if key.endswith(("ckpt_path", "embedding_manager_ckpt")) and value is not None and value != before.get(key):
            raise UserError(
                f"{key} has no effect on a resumed run, whose checkpoint contains all weights; "
                "leave it out, or start a new run from these weights without --resume"
            )


def _choose_newest_weights(config: DictConfig) -> None:
    """Replace each `ckpt_path` with `*` by its newest match.

    Raises:
        UserError: nothing matches.
    """
    for key, value in _leaves(config.model, "model"):
        if key.endswith(".ckpt_path") and isinstance(value, str):
            OmegaConf.update(config, key, newest_match(value, key))


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Yield the values below `value` that are not mappings, with their dotted keys; interpolations stay as text."""
    if isinstance(value, DictConfig):
        value = OmegaConf.to_container(value, resolve=False)
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}")
    else:
        yield key, value


def _choose_options(args: argparse.Namespace, folder: Path | None) -> dict[str, Any]:
    """Return the options that are saved with a run: as given, or those of the run to resume, or the defaults.

    Raises:
        UserError: another seed is given for a run to resume, which continues with its own random numbers.
    """
    saved = _read_options(folder)
    if args.train and "seed" in saved and args.seed not in (None, saved["seed"]):
        raise UserError(
            f"--seed {args.seed} has no effect on a resumed run, which continues the random numbers of its seed "
            f"{saved['seed']}; leave out --seed"
        )
    given = {name: value for name, value in vars(args).items() if name in DEFAULT_OPTIONS and value is not None}
    return DEFAULT_OPTIONS | saved | given


def _read_options(folder: Path | None) -> dict[str, Any]:
    file = saved_options(folder) if folder else None
    options = read_yaml(file, ("options",)).get("options") if file else {}
    _check_mapping(options, "options")
    _check_keys(options, DEFAULT_OPTIONS, f'"{file}"')
    for name, value in options.items():
        if type(value) is not type(DEFAULT_OPTIONS[name]):
            raise UserError(f'"{file}" has an invalid {name}: {value}')
    return dict(options)


def read_yaml(path: Path, sections: Iterable[str] = SECTIONS) -> DictConfig:
    """Read a configuration file and check its sections.

    Args:
        path: the file.
        sections: the sections that it may have.

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
    _check_keys(map(section_name, config), sections, f'the configuration "{path}"')
    return _with_own_texts(config, path.parent)


def _with_own_texts(config: DictConfig, folder: Path) -> DictConfig:
    """Return a configuration whose model reads the text files beside it, such as a vocabulary."""
    content = cast(dict[str, Any], OmegaConf.to_container(config, resolve=False))
    if not isinstance(content.get("model"), dict):
        return config
    return OmegaConf.create({**content, "model": with_own_texts(content["model"], folder)})


def _parse_overrides(words: list[str]) -> DictConfig:
    config = OmegaConf.create()
    for word in words:
        try:
            config.merge_with_dotlist([assignment(word)])
        except (YAMLError, OmegaConfBaseException, ValueError) as error:
            reason = _first_line(error)
            raise UserError(
                f"cannot parse {word}: {reason}; write key.sub=value, and braces in a text as 'key.sub=\"{{}}\"'"
            ) from None
    _check_keys(map(section_name, config), SECTIONS, "the command line")
    return config


def plain(config: Any) -> dict[str, Any]:
    """Return a section as plain values, with its interpolations resolved."""
    return cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))


def _split_sections(merged: DictConfig) -> tuple[DictConfig, DictConfig]:
    """Split the merged configuration into `model` and `data`, and `lightning`; check its sections."""
    for section in ("model", "data"):
        if not isinstance(merged.get(section), DictConfig):
            raise UserError(f'the configuration has no "{section}:" section; add it to one of the --base files')
    try:
        OmegaConf.resolve(merged)
    except OmegaConfBaseException as error:
        raise UserError(f"cannot resolve the configuration: {_first_line(error)}") from None
    errors = ErrorCollector()
    for key in sorted(OmegaConf.missing_keys(merged)):
        errors.add(f"the configuration needs a value for {key}; give {key}=VALUE")
    errors.check()
    lightning = merged.pop("lightning", None) or OmegaConf.create()
    _check_mapping(lightning, "lightning")
    return merged, lightning


def _check_lightning(lightning: DictConfig) -> None:
    """Raise UserError if a part of the section `lightning` is neither a mapping nor a known word."""
    policy = lightning.get("non_finite")
    if policy is not None and policy not in NON_FINITE_POLICIES:
        hint = did_you_mean(str(policy), NON_FINITE_POLICIES)
        raise UserError(f'lightning.non_finite "{policy}" is not known{hint}; give {" or ".join(NON_FINITE_POLICIES)}')
    words = {"non_finite", "logger"} if logger_words(lightning.get("logger")) else {"non_finite"}
    for name, section in lightning.items():
        if section and name not in words:
            _check_mapping(section, f"lightning.{name!s}")
    for name in ("logger", "modelcheckpoint"):
        if lightning.get(name) and name not in words:
            _check_mapping(lightning[name].get("params", {}), f"lightning.{name}.params")


def _add_trainer_arguments(lightning: DictConfig, arguments: dict[str, Any]) -> None:
    if "gpus" in arguments and arguments.keys() & DEVICES:
        raise UserError("--gpus cannot be combined with --accelerator or --devices; give one of them")
    trainer = OmegaConf.create(lightning.get("trainer") or {})
    _remove_devices(trainer, arguments)
    trainer = cast(DictConfig, OmegaConf.merge(trainer, arguments))
    known = trainer_arguments({str(key) for key in trainer} - {"gpus"})
    _check_keys(trainer, [*known, "gpus"], 'the section "lightning.trainer"')
    _move_logger(trainer, lightning)
    lightning.trainer = trainer


def _move_logger(trainer: DictConfig, lightning: DictConfig) -> None:
    """Move the word of `--logger` to `lightning.logger`; true and false stay an argument of the Trainer.

    Raises:
        UserError: the word is not that of a logger.
    """
    if logger_words(trainer.get("logger")):
        lightning.logger = trainer.pop("logger")


def _check_mapping(section: Any, where: str) -> None:
    if not isinstance(section, DictConfig | dict):
        raise UserError(f'the section "{where}" must be a mapping of keys to values, not: {_first_line(section)}')


def _check_keys(config: Iterable[Any], known: Iterable[str], where: str) -> None:
    known = tuple(known)
    listed = f"; known keys: {', '.join(known)}" if len(known) < 10 else ""
    errors = ErrorCollector()
    for key in config:
        if key not in known:
            errors.add(f'{where} has an unknown key "{key}"{did_you_mean(str(key), known)}{listed}')
    errors.check()


def _first_line(error: object) -> str:
    return str(error).strip().split("\n")[0]
