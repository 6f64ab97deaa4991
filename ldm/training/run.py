"""Training run: build the components of a plan, train and test."""

from __future__ import annotations

import dataclasses
import errno
import logging
import math
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ldm.errors import DiskFullError, ErrorCollector, UserError
from ldm.io.files import reserve_folder
from ldm.modules.precision import choose_training_precision
from ldm.training.allocator import keep_freed_memory
from ldm.training.configuration import Plan, plain
from ldm.training.processes import end_launched, failed_process, spawns, user_error_of
from ldm.training.run_folder import LOCK, locked_run, reserved_folder

if TYPE_CHECKING:
    from ldm.training.assembly import Components

logger = logging.getLogger(__name__)

# Warnings of Lightning that do not apply here.
IRRELEVANT_WARNINGS = (
    ".*does not have many workers.*",
    ".*no pre-optimization state was saved.*",
    ".*in eval mode at the start of training.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*smaller than the logging interval.*",
    ".*Consider setting `persistent_workers=True`.*",
    ".*sync_dist=True.*",
    ".*needs to be floating to be reduced.*",
    ".*treespec, LeafSpec.*",
    ".*not supported by the model summary.*",
    ".*overridden `on_before_batch_transfer`.*",
)


# Settings of the Trainer that end a run.
LIMITS = ("max_steps", "max_epochs", "max_time", "limit_train_batches", "overfit_batches")


def run(plan: Plan) -> None:
    """Train and test according to a plan.

    Raises:
        UserError: a component of the plan cannot be built, and nothing has been written; or there is nothing to do.
    """
    _filter_logs()
    with _short_thread_errors():
        if plan.checkpoint is not None:
            with locked_run(plan.folder) if plan.train else nullcontext():
                _run(plan)
            return
        with reserved_folder(plan.folder) as folder, locked_run(folder):
            _run(dataclasses.replace(plan, folder=folder))


def _run(plan: Plan) -> None:
    settings = checked_settings(plan)
    if settings["accelerator"] == "cpu":
        keep_freed_memory()
    from pytorch_lightning import seed_everything

    from ldm.training.assembly import assemble

    seed_everything(plan.seed, workers=True, verbose=False)
    components = assemble(plan, settings)
    if plan.train:
        fit(plan, components)
    if plan.test:
        test(plan, components)


def checked_settings(plan: Plan) -> dict[str, Any]:
    """Return the Trainer's arguments of a plan, after a check of its whole configuration.

    Raises:
        UserError: the configuration has errors; all of them are named.
    """
    from ldm.training.assembly import build_callbacks, build_logger, remove_weights
    from ldm.training.configuration_check import configuration_faults

    errors, settings = ErrorCollector(), {}
    with errors.collecting():
        settings = trainer_settings(plan)
        check_values(plan, settings)
    config = plain(plan.config)
    if plan.train and plan.checkpoint is not None:
        remove_weights(config["model"])
    errors.add(*configuration_faults(config))
    if errors.messages:  # otherwise assembling reports the only errors that are left
        for build in (build_callbacks, build_logger):
            with errors.collecting():
                build(plan)
    errors.check()
    return settings


def _filter_logs() -> None:
    for message in IRRELEVANT_WARNINGS:
        warnings.filterwarnings("ignore", message)
    logging.getLogger("pytorch_lightning.utilities.rank_zero").addFilter(_is_not_tip)
    if os.environ.get("LOCAL_RANK", "0") != "0":
        logging.getLogger("ldm").setLevel(logging.WARNING)


@contextmanager
def _short_thread_errors() -> Iterator[None]:
    """Log failed writing of other threads in one line; loggers write in a thread, and then raise the error as well."""
    previous = threading.excepthook

    def report(arguments: threading.ExceptHookArgs) -> None:
        if isinstance(arguments.exc_value, OSError):
            logger.warning("writing the logs has failed: %s", arguments.exc_value)
        else:
            previous(arguments)

    threading.excepthook = report
    try:
        yield
    finally:
        threading.excepthook = previous


def _is_not_tip(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("💡")


def trainer_settings(plan: Plan) -> dict[str, Any]:
    """Return the Trainer's arguments with `gpus` replaced by devices; the default device is the CPU.

    Raises:
        UserError: the machine does not have the requested GPUs.
    """
    settings = plain(plan.lightning.trainer)
    gpus = settings.pop("gpus", None)
    if gpus is not None:
        settings |= {"accelerator": "gpu", "devices": parse_gpus(gpus)}
    if isinstance(settings.get("devices"), str) and settings["devices"] != "auto":
        settings["devices"] = parse_gpus(settings["devices"])
    settings.setdefault("accelerator", "cpu")
    if settings["accelerator"] == "cpu":
        settings.setdefault("devices", 1)
    if settings["accelerator"] in ("gpu", "cuda"):
        _check_gpus(settings.get("devices", "auto"))
    if "precision" in settings:
        settings["precision"] = choose_training_precision(settings["precision"], _device_type(settings["accelerator"]))
    settings.setdefault("default_root_dir", str(plan.folder))
    return settings


def _device_type(accelerator: str) -> str:
    """Return the device type that an accelerator of Lightning uses."""
    if accelerator in ("gpu", "auto"):
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return accelerator if accelerator in ("cuda", "mps") else "cpu"


def parse_gpus(gpus: Any) -> list[int] | int:
    """Parse `--gpus`: `"0,"` and `"0,1"` are lists of devices, `"2"` is a number of devices, `"-1"` means all.

    Raises:
        UserError: the value is none of these.
    """
    text = str(gpus).strip() if not isinstance(gpus, list) else ",".join(map(str, gpus)) + ","
    try:
        return [int(part) for part in text.split(",") if part.strip()] if "," in text else int(text)
    except ValueError:
        raise UserError(f'--gpus "{gpus}" is invalid; give devices such as "0," or "0,1", or their number') from None


def _check_gpus(devices: Any) -> None:
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if available == 0 and not torch.backends.mps.is_available():
        raise UserError("PyTorch finds no GPU on this machine; leave out --gpus and --accelerator")
    needed = max(devices, default=-1) + 1 if isinstance(devices, list) else devices
    if available and isinstance(needed, int) and needed > available:
        raise UserError(f"--gpus needs {needed} devices, and this machine has {available}; give fewer")


def check_values(plan: Plan, settings: dict[str, Any]) -> None:
    """Raise UserError if the learning rate or the number of accumulated batches is invalid."""
    rate = plan.config.model.get("base_learning_rate")
    if plan.train and not (isinstance(rate, float | int) and math.isfinite(rate)):
        given = "it is missing" if rate is None else f"got {rate}"
        raise UserError(f"model.base_learning_rate must be a finite number, e.g. 4.5e-6; {given}")
    batches = settings.get("accumulate_grad_batches", 1)
    if not isinstance(batches, int) or batches < 1:
        raise UserError(f"lightning.trainer.accumulate_grad_batches must be an integer of at least 1, not {batches}")


def fit(plan: Plan, components: Components) -> None:
    """Train, resuming from the checkpoint of the plan if there is one.

    Raises:
        UserError: no batch was trained, because a limit of the Trainer had been reached before.
    """
    trainer = components.trainer
    components.last.install_handlers(trainer)
    checkpoint = str(plan.checkpoint) if plan.checkpoint else None
    try:
        trainer.fit(components.module, datamodule=components.data, ckpt_path=checkpoint)
    except SystemExit:
        end_launched(trainer)
        if trainer.interrupted:  # Lightning exits this way after Ctrl-C
            raise components.last.requests.reported_interruption() from None
        raise
    except Exception as error:
        reported = _reported_error(plan, components, error)
        if reported is not error:
            raise reported from error
        if plan.debug and not isinstance(error, UserError) and sys.stdin.isatty():
            import pdb

            pdb.post_mortem(error.__traceback__)
        raise
    finally:
        components.last.restore_handlers()  # Lightning would leave Ctrl-C ignored
        if plan.debug and plan.checkpoint is None and trainer.is_global_zero and plan.folder.is_dir():
            _move_to_debug_runs(plan.folder)
    if not components.setup.started and not spawns(trainer):  # new processes keep the state of callbacks to themselves
        limits = {name: plan.lightning.trainer[name] for name in LIMITS if name in plan.lightning.trainer}
        stated = ", ".join(f"{name}: {value}" for name, value in limits.items()) or "none is given"
        raise UserError(f"no batch was trained; give larger limits of lightning.trainer ({stated})")


def _reported_error(plan: Plan, components: Components, error: Exception) -> BaseException:
    """Return the error to report for one that has ended the run, and end the other processes."""
    trainer = components.trainer
    failed = failed_process(trainer) if isinstance(error, RuntimeError) else None
    end_launched(trainer)
    if spawns(trainer) and components.last.requests.stop_requested:  # processes that stop on request report an error
        return components.last.requests.reported_interruption()
    if is_disk_full(error):
        return disk_full_error(plan, error)
    if failed is not None:
        return UserError(f"process {failed} of the run has failed; its error is above")
    return user_error_of(error) or error


def is_disk_full(error: Exception) -> bool:
    """Return whether a file could not be written because the disk, or the quota of the user, is full."""
    return isinstance(error, DiskFullError) or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)


def disk_full_error(plan: Plan, error: Exception) -> DiskFullError:
    """Return the error of a run that a full disk has ended. Checkpoints that exist are complete."""
    reason = str(error).partition(";")[0] if isinstance(error, DiskFullError) else str(error)
    again = f'continue with --resume "{plan.folder}"' if (plan.checkpoints / "last.ckpt").is_file() else "start again"
    return DiskFullError(f"the run has ended: {reason}; free some space, then {again}")


def _move_to_debug_runs(folder: Path) -> None:
    target = reserve_folder(folder.parent / "debug_runs" / folder.name)
    (folder / LOCK).unlink(missing_ok=True)
    for path in folder.iterdir():
        path.rename(target / path.name)
    folder.rmdir()
    logger.info('moved the log folder to "%s"', target)


def test(plan: Plan, components: Components) -> None:
    """Test, if the model has a test step and the data has a test set."""
    from pytorch_lightning.utilities.model_helpers import is_overridden

    if not is_overridden("test_step", components.module) or not is_overridden("test_dataloader", components.data):
        reason = "the model has no test step, or the data has no test set"
        if not plan.train:
            raise UserError(f"there is nothing to do: {reason}; give -t to train")
        logger.info("skipping the test: %s", reason)
        return
    checkpoint = str(plan.checkpoint) if plan.checkpoint and not plan.train else None
    components.trainer.test(components.module, datamodule=components.data, ckpt_path=checkpoint)
