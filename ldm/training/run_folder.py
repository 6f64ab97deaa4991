"""Folder of a run: its reservation, and the configurations that are saved in it."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ldm.errors import UserError
from ldm.io.checkpoint.integrity import check_intact
from ldm.io.checkpoint.reading import read_checkpoint
from ldm.io.files import atomic_path, locked, remove_temporary_files, reserve_folder
from ldm.io.folders import visible

logger = logging.getLogger(__name__)

# Lightning runs the command again in one process per further device; all processes must use the same folder.
FOLDER_VARIABLE = "LDM_RUN_FOLDER"
# File that the process that trains a run locks.
LOCK = ".lock"
# Variables in which launchers number the processes of a run: those of all machines, or machines and their processes.
GLOBAL_RANKS = ("RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
LOCAL_RANKS = ("NODE_RANK", "GROUP_RANK", "LOCAL_RANK")
# Files that a run saves. Each contains its whole part of the configuration, so that the newest replaces the others.
SAVED = re.compile(r"(?P<time>\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d)-(?P<part>project|lightning|options)\.yaml")


def find_run(path: Path) -> tuple[Path, Path]:
    """Return the log folder and the checkpoint of the run whose log folder or checkpoint is `path`.

    Raises:
        UserError: `path` is neither, or damaged.
    """
    if path.is_dir():
        return path, newest_checkpoint(path)
    if not path.is_file():
        raise UserError(f'cannot resume from "{path}": there is no such folder or checkpoint')
    folder = next((parent.parent for parent in path.parents if parent.name == "checkpoints"), None)
    if folder is None:
        raise UserError(
            f'cannot resume from "{path}": it is not inside LOGDIR/checkpoints; '
            "to start a new run from its weights, give model.params.ckpt_path=PATH"
        )
    _check_intact(path)
    return folder, path


def newest_checkpoint(folder: Path) -> Path:
    """Return the checkpoint from which a run resumes: `last.ckpt`, or if that is damaged, the newest intact one.

    Raises:
        UserError: there is no intact one.
    """
    last = folder / "checkpoints" / "last.ckpt"
    others = [path for path in visible(last.parent.glob("*.ckpt")) if path != last]
    if not (last.is_file() or others):
        raise UserError(f'cannot resume from "{folder}": it has no checkpoints/last.ckpt')
    fault = f'"{last}" does not exist'
    if last.is_file():
        try:
            _check_intact(last)
            return last
        except UserError as error:
            fault = str(error).removeprefix("cannot resume from ")
    steps = {path: step for path in others if (step := _resumable_step(path)) is not None}
    if not steps:
        raise UserError(f"cannot resume from {fault}; the run has no other checkpoint to resume from")
    newest = max(steps, key=lambda path: (steps[path], path.stat().st_mtime_ns))
    if is_first_process():
        logger.warning('%s; resuming from "%s" of step %d', fault, newest, steps[newest])
    return newest


def _check_intact(path: Path) -> None:
    """Raise UserError if a checkpoint is damaged."""
    try:
        check_intact(path)
        read_checkpoint(path)
    except UserError as error:
        raise UserError(f"cannot resume from {str(error).removeprefix('cannot read ')}") from error


def _resumable_step(path: Path) -> int | None:
    """Return the step of an intact checkpoint that a run can resume from, or None."""
    try:
        check_intact(path)
        checkpoint = read_checkpoint(path)
    except UserError:
        return None
    step = checkpoint.get("global_step")
    return step if isinstance(step, int) and checkpoint.get("optimizer_states") else None


@contextmanager
def locked_run(folder: Path) -> Iterator[None]:
    """Exclude other runs from a log folder, and remove incomplete files that a killed run has left there.

    Raises:
        UserError: another process trains this run.
    """
    if not is_first_process():
        yield
        return
    message = f'another process trains the run "{folder}"; wait for its end, or stop it'
    with locked(folder / LOCK, message):
        remove_temporary_files(folder / "checkpoints")
        yield


def saved_configurations(folder: Path) -> list[Path]:
    """Return the configurations in a run's `configs`, in the order of their names, without those that it replaced."""
    files = visible((folder / "configs").glob("*.yaml"))
    newest = _newest_files(files)
    used = (newest.get("project"), newest.get("lightning"))
    return [file for file in files if file in used or not SAVED.fullmatch(file.name)]


def saved_options(folder: Path) -> Path | None:
    """Return the newest file of saved command-line options of a run; earlier versions saved none."""
    return _newest_files(sorted((folder / "configs").glob("*.yaml"))).get("options")


def _newest_files(files: list[Path]) -> dict[str, Path]:
    return {match["part"]: file for file in files if (match := SAVED.fullmatch(file.name))}


def save_configuration(folder: Path, now: str, parts: Mapping[str, Any]) -> None:
    """Write the parts of a configuration to `<now>-<part>.yaml`, as the newest files of their folder.

    Args:
        folder: the folder `configs` of the run.
        now: the time of the start. A later time in the folder, from before the clock was set back, replaces it.
        parts: contents of `project`, `lightning` and `options`.

    Raises:
        UserError: a file cannot be written.
    """
    times = (match["time"] for file in folder.glob("*.yaml") if (match := SAVED.fullmatch(file.name)))
    time = max([now, *times])
    for part, content in parts.items():
        with atomic_path(folder / f"{time}-{part}.yaml") as temporary:
            OmegaConf.save(OmegaConf.create(content), temporary)


@contextmanager
def reserved_folder(path: Path) -> Iterator[Path]:
    """Reserve the folder of a new run and yield it: `path`, or `path_1` and so on if another run has it.

    A folder that is still empty at the end is removed. All processes of a run use the folder of its first process.
    Processes on other machines do not learn its name, which is harmless: only the first process writes files, and
    Lightning sends them the paths of checkpoints.

    Raises:
        UserError: the folder cannot be created.
    """
    if not is_first_process():
        yield Path(os.environ.get(FOLDER_VARIABLE, path))
        return
    new = [parent for parent in path.absolute().parents if not parent.exists()]
    folder = reserve_folder(path)
    os.environ[FOLDER_VARIABLE] = str(folder)
    try:
        yield folder
    finally:
        os.environ.pop(FOLDER_VARIABLE, None)
        with suppress(OSError):  # a folder with files cannot be removed
            for empty in (folder, *new):
                empty.rmdir()


def is_first_process() -> bool:
    """Return whether this is the first of all processes of a run."""
    for name in GLOBAL_RANKS:
        if name in os.environ:
            return os.environ[name] == "0"
    return all(os.environ.get(name, "0") == "0" for name in LOCAL_RANKS)
