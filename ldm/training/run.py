"""Training run: build the components of a plan, train and test."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import OmegaConf

from ldm.errors import UserError
from ldm.modules.precision import choose_training_precision
from ldm.training.allocator import keep_freed_memory
from ldm.training.configuration import START_TIME_VARIABLE, Plan

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
    ".*treespec, LeafSpec.*",
    ".*not supported by the model summary.*",
)


def run(plan: Plan) -> None:
    """Train and test according to a plan.

    Raises:
        UserError: a component of the plan cannot be built; nothing has been written.
    """
    settings = trainer_settings(plan)
    check_values(plan, settings)
    if settings["accelerator"] == "cpu":
        keep_freed_memory()
    _filter_logs()
    from pytorch_lightning import seed_everything

    from ldm.training.assembly import assemble

    seed_everything(plan.seed, workers=True, verbose=False)
    components = assemble(plan, settings)
    os.environ[START_TIME_VARIABLE] = plan.now
    try:
        if plan.train:
            fit(plan, components)
        if plan.test:
            test(plan, components)
    finally:
        os.environ.pop(START_TIME_VARIABLE, None)


def _filter_logs() -> None:
    for message in IRRELEVANT_WARNINGS:
        warnings.filterwarnings("ignore", message)
    logging.getLogger("pytorch_lightning.utilities.rank_zero").addFilter(_is_not_tip)
    if os.environ.get("LOCAL_RANK", "0") != "0":
        logging.getLogger("ldm").setLevel(logging.WARNING)


def _is_not_tip(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("💡")


def trainer_settings(plan: Plan) -> dict[str, Any]:
    """Return the Trainer's arguments with `gpus` replaced by devices; the default device is the CPU.

    Raises:
        UserError: the machine does not have the requested GPUs.
    """
    settings: dict[str, Any] = OmegaConf.to_container(plan.lightning.trainer, resolve=True)
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
    if plan.train and not isinstance(plan.config.model.get("base_learning_rate"), float | int):
        raise UserError("model.base_learning_rate must be a number, e.g. 4.5e-6; add it to the configuration")
    batches = settings.get("accumulate_grad_batches", 1)
    if not isinstance(batches, int) or batches < 1:
        raise UserError(f"lightning.trainer.accumulate_grad_batches must be an integer of at least 1, not {batches}")


def fit(plan: Plan, components: Components) -> None:
    """Train, resuming from the checkpoint of the plan if there is one."""
    trainer = components.trainer
    components.last.install_handlers()
    checkpoint = str(plan.checkpoint) if plan.checkpoint else None
    try:
        trainer.fit(components.module, datamodule=components.data, ckpt_path=checkpoint)
    except SystemExit:
        if trainer.interrupted:  # Lightning exits this way after Ctrl-C
            raise KeyboardInterrupt from None
        raise
    except Exception as error:
        if plan.debug and not isinstance(error, UserError) and sys.stdin.isatty():
            import pdb

            pdb.post_mortem(error.__traceback__)
        raise
    finally:
        components.last.restore_handlers()  # Lightning would leave Ctrl-C ignored
        if plan.debug and plan.checkpoint is None and trainer.is_global_zero and plan.folder.is_dir():
            _move_to_debug_runs(plan.folder)


def _move_to_debug_runs(folder: Path) -> None:
    target = folder.parent / "debug_runs" / folder.name
    target.parent.mkdir(parents=True, exist_ok=True)
    folder.rename(target)
    logger.info('moved the log folder to "%s"', target)


def test(plan: Plan, components: Components) -> None:
    """Test, if the model has a test step and the data has a test set."""
    from pytorch_lightning.utilities.model_helpers import is_overridden

    if not is_overridden("test_step", components.module) or not is_overridden("test_dataloader", components.data):
        logger.info("skipping the test: the model has no test step, or the data has no test set")
        return
    checkpoint = str(plan.checkpoint) if plan.checkpoint and not plan.train else None
    components.trainer.test(components.module, datamodule=components.data, ckpt_path=checkpoint)
