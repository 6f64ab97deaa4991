"""A training run: what the plan says, built, fitted and tested."""

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
    from ldm.training.assembly import Parts

logger = logging.getLogger(__name__)

# Lightning's hints that are beside the point here.
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
    """Carry out a plan.

    Raises:
        UserError: something in the plan cannot be built; nothing is on disk then.
    """
    settings = trainer_settings(plan)
    check_numbers(plan, settings)
    if settings["accelerator"] == "cpu":
        keep_freed_memory()
    _quieten()
    from pytorch_lightning import seed_everything

    from ldm.training.assembly import assemble

    seed_everything(plan.seed, workers=True, verbose=False)
    parts = assemble(plan, settings)
    os.environ[START_TIME_VARIABLE] = plan.now
    try:
        if plan.train:
            fit(plan, parts)
        if plan.test:
            test(plan, parts)
    finally:
        os.environ.pop(START_TIME_VARIABLE, None)


def _quieten() -> None:
    for message in IRRELEVANT_WARNINGS:
        warnings.filterwarnings("ignore", message)
    logging.getLogger("pytorch_lightning.utilities.rank_zero").addFilter(_no_tips)
    if os.environ.get("LOCAL_RANK", "0") != "0":
        logging.getLogger("ldm").setLevel(logging.WARNING)


def _no_tips(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("💡")


def trainer_settings(plan: Plan) -> dict[str, Any]:
    """The Trainer's arguments, `gpus` translated; without any word on devices, the CPU.

    Raises:
        UserError: CUDA devices are asked for where there are none, or too few.
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
    """The type of device that Lightning's word stands for."""
    if accelerator in ("gpu", "auto"):
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return accelerator if accelerator in ("cuda", "mps") else "cpu"


def parse_gpus(gpus: Any) -> list[int] | int:
    """`"0,"` and `"0,1"` list devices, `"2"` counts them and `"-1"` means all.

    Raises:
        UserError: it is neither.
    """
    text = str(gpus).strip() if not isinstance(gpus, list) else ",".join(map(str, gpus)) + ","
    try:
        return [int(part) for part in text.split(",") if part.strip()] if "," in text else int(text)
    except ValueError:
        raise UserError(f'--gpus "{gpus}" is not understood; write "0," or "0,1" for devices, or how many') from None


def _check_gpus(devices: Any) -> None:
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if available == 0 and not torch.backends.mps.is_available():
        raise UserError("a GPU is asked for and this machine has none that PyTorch can use; leave --gpus out")
    wanted = max(devices, default=-1) + 1 if isinstance(devices, list) else devices
    if available and isinstance(wanted, int) and wanted > available:
        raise UserError(f"--gpus asks for more than the {available} devices that this machine has")


def check_numbers(plan: Plan, settings: dict[str, Any]) -> None:
    """Find wrong numbers before anything is built."""
    if plan.train and not isinstance(plan.config.model.get("base_learning_rate"), float | int):
        raise UserError("the configuration needs a number as model.base_learning_rate, e.g. 4.5e-6")
    batches = settings.get("accumulate_grad_batches", 1)
    if not isinstance(batches, int) or batches < 1:
        raise UserError(f"lightning.trainer.accumulate_grad_batches is {batches}; give a whole number from 1 on")


def fit(plan: Plan, parts: Parts) -> None:
    """Train; continue from the plan's checkpoint where it has one."""
    trainer = parts.trainer
    parts.last.listen()
    checkpoint = str(plan.checkpoint) if plan.checkpoint else None
    try:
        trainer.fit(parts.module, datamodule=parts.data, ckpt_path=checkpoint)
    except SystemExit:
        if trainer.interrupted:  # how Lightning leaves after Ctrl-C
            raise KeyboardInterrupt from None
        raise
    except Exception as error:
        if plan.debug and not isinstance(error, UserError) and sys.stdin.isatty():
            import pdb

            pdb.post_mortem(error.__traceback__)
        raise
    finally:
        parts.last.stop_listening()  # Lightning itself would leave Ctrl-C ignored
        if plan.debug and plan.checkpoint is None and trainer.is_global_zero and plan.folder.is_dir():
            _move_to_debug_runs(plan.folder)


def _move_to_debug_runs(folder: Path) -> None:
    target = folder.parent / "debug_runs" / folder.name
    target.parent.mkdir(parents=True, exist_ok=True)
    folder.rename(target)
    logger.info('this run is now in "%s"', target)


def test(plan: Plan, parts: Parts) -> None:
    """Test, when both the model and the data have something to test with."""
    from pytorch_lightning.utilities.model_helpers import is_overridden

    if not is_overridden("test_step", parts.module) or not is_overridden("test_dataloader", parts.data):
        logger.info("no test: the model has no test step, or the data no test set")
        return
    checkpoint = str(plan.checkpoint) if plan.checkpoint and not plan.train else None
    parts.trainer.test(parts.module, datamodule=parts.data, ckpt_path=checkpoint)
