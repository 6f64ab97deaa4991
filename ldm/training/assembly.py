"""Build the components of a run from its plan, without writing to the disk."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from omegaconf import OmegaConf
from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
from pytorch_lightning.callbacks import LearningRateMonitor, ModelSummary, Timer
from pytorch_lightning.callbacks import ProgressBar as LightningProgressBar
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.seed import isolate_rng
from torch import nn

from ldm.config.instantiate import instantiate_from_config
from ldm.errors import UserError
from ldm.io.checkpoint.reading import read_state_dict
from ldm.models.lightning import plain_models
from ldm.training.callbacks import SetupCallback
from ldm.training.classes import add_classes, has_classes
from ldm.training.codebook import CodebookUse, codebook_size
from ldm.training.configuration import Plan, plain
from ldm.training.continued_logs import LogPosition, continue_logs
from ldm.training.data import DataModuleFromConfig
from ldm.training.last_checkpoint import LastCheckpoint
from ldm.training.limits import apply_limits, choose_log_interval, validates
from ldm.training.loggers import Hyperparameters, build_loggers
from ldm.training.modules import AutoencoderTraining, ManualOptimization, ModelTraining, lightning_module, trains_itself
from ldm.training.progress import ProgressBar
from ldm.training.resume import ConfiguredSettings, TimeLimit, check_optimizers
from ldm.training.rng import preserved_rng
from ldm.training.storage import SafeCheckpointIO, check_resumable
from ldm.training.throughput import Throughput
from ldm.training.trained_parts import TrainedParts, is_adapted

logger = logging.getLogger(__name__)

AUTOCAST_DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}

DEFAULT_CALLBACKS = {
    "image_logger": {
        "target": "main.ImageLogger",
        "params": {"batch_frequency": 750, "max_images": 4, "clamp": True},
    },
    "learning_rate_logger": {
        "target": "pytorch_lightning.callbacks.LearningRateMonitor",
        "params": {"logging_interval": "step"},
    },
    "cuda_callback": {"target": "main.CUDACallback"},
}
OWN_PACKAGES = ("ldm.", "taming.")
DDP_STRATEGIES = ("ddp", "ddp_spawn", "ddp_fork", "ddp_notebook")
TRAINSTEPS = "metrics_over_trainsteps_checkpoint"


class HasLearningRate(Protocol):
    """Model whose learning rate the run sets."""

    learning_rate: float


@dataclass(frozen=True)
class Components:
    """The components of a run.

    Attributes:
        module: the Lightning adapter of the model.
        data: the data module.
        trainer: Lightning's Trainer.
        setup: the callback that knows if training has started.
        last: the callback that keeps `last.ckpt`.
    """

    module: LightningModule
    data: LightningDataModule
    trainer: Trainer
    setup: SetupCallback
    last: LastCheckpoint


def assemble(plan: Plan, settings: dict[str, Any]) -> Components:
    """Build all components of the plan, in ascending order of cost, so that errors appear early.

    Args:
        plan: the run.
        settings: the Trainer's arguments with resolved devices.

    Raises:
        UserError: a target, a parameter or an argument of the Trainer is invalid, or data is missing.
    """
    setup = build_setup(plan)
    barebones = settings.get("barebones", False)
    callbacks = [setup, *([] if barebones else [Throughput()]), *build_callbacks(plan)]
    run_logger = build_logger(plan) if settings.pop("logger", True) and not barebones else False
    if not run_logger:
        callbacks = [callback for callback in callbacks if not isinstance(callback, LearningRateMonitor)]
    data = build_data_with_classes(plan)
    config = plain(plan.config)
    if plan.train and plan.checkpoint is not None:
        remove_weights(config["model"])
    with plain_models():
        model = instantiate_from_config(config["model"])
    data = data or instantiate_from_config(config["data"])
    if plan.train:
        set_learning_rate(model, plan, settings)
        if plan.checkpoint is not None:
            check_resumable(plan.checkpoint, model, settings.get("max_steps", -1), settings.get("max_epochs"))
    module = lightning_module(model, pop_manual_optimization(model, settings))
    if isinstance(module, ModelTraining):
        module.non_finite_policy = plan.lightning.get("non_finite")
    size = codebook_size(model)
    if isinstance(module, AutoencoderTraining) and size is not None:
        callbacks.append(CodebookUse(size))
    if run_logger and plan.train:
        callbacks.append(LogPosition())
        if plan.checkpoint is not None:
            continue_logs(run_logger, plan.checkpoint)
        callbacks.append(Hyperparameters(hyperparameters(plan, model)))
    if plan.train and plan.checkpoint is not None:
        check_optimizers(plan.checkpoint, module)
        if isinstance(module, ModelTraining):
            callbacks.append(ConfiguredSettings())
    data.prepare_data()
    data.setup()
    if plan.train and isinstance(data, DataModuleFromConfig) and "train" not in data.dataset_configs:
        raise UserError("the configuration has no data.params.train; name a training set there")
    apply_limits(settings, data, process_count(settings))
    choose_log_interval(settings)
    settings["strategy"] = find_strategy(settings, model)
    last = LastCheckpoint(plan.checkpoints)
    if settings.get("enable_checkpointing", True) and not barebones:
        callbacks += [build_model_checkpoint(plan, model, validates(settings, data)), last]
    if is_adapted(model):
        callbacks.append(TrainedParts(plan.folder, config["model"]))
    has_bar = any(isinstance(callback, LightningProgressBar) for callback in callbacks)
    if settings.get("enable_progress_bar", True) and not barebones and not has_bar:
        callbacks.append(ProgressBar())
    if settings.get("enable_model_summary", True) and not barebones:
        callbacks.append(ModelSummary(max_depth=2))  # level 1 is the adapter
    trainer = build_trainer(settings, callbacks, run_logger, data)
    if plan.train:
        prepare(plan, model, data, trainer)
    return Components(module, data, trainer, setup, last)


def build_data_with_classes(plan: Plan) -> Any:
    """Build the data of a model with classes before the model, and set these in its configuration.

    Returns:
        The data module; None if it can be built after the model, as usual.

    Raises:
        UserError: data is missing, or its classes do not suit the model.
    """
    if not plan.train or not has_classes(plan.config.model):
        return None
    with preserved_rng():  # the initial weights must not depend on the data
        data = instantiate_from_config(plain(plan.config)["data"])
        if isinstance(data, DataModuleFromConfig) and "train" in data.dataset_configs:
            data.prepare_data()
            data.setup()
            add_classes(plan.config.model, data.datasets["train"])
    return data


def remove_weights(config: Any) -> None:
    """Remove the files of initial weights from the configuration of a model, if it is one of this package.

    A resumed run takes all weights from its checkpoint, also after the other files have been moved or changed.
    """
    if isinstance(config, dict) and str(config.get("target")).startswith(OWN_PACKAGES):
        params = config.get("params")
        if isinstance(params, dict):
            params.pop("ckpt_path", None)
            params.pop("embedding_manager_ckpt", None)
            for value in params.values():
                remove_weights(value)


def build_setup(plan: Plan) -> SetupCallback:
    """Build the callback that creates the log folder and saves the configuration."""
    return SetupCallback(
        resume=plan.checkpoint,
        now=plan.now,
        logdir=plan.folder,
        ckptdir=plan.checkpoints,
        cfgdir=plan.folder / "configs",
        config=plan.config,
        lightning_config=plan.lightning,
        options=plan.options,
    )


def build_callbacks(plan: Plan) -> list[Callback]:
    """Build the default callbacks, which `lightning.callbacks` overrides and extends; null removes one."""
    configs = OmegaConf.create(DEFAULT_CALLBACKS)
    configured = plan.lightning.get("callbacks") or OmegaConf.create()
    if TRAINSTEPS in configured:
        configs[TRAINSTEPS] = {
            "target": "pytorch_lightning.callbacks.ModelCheckpoint",
            "params": {
                "dirpath": str(plan.checkpoints / "trainstep_checkpoints"),
                "filename": "{epoch:06}-{step:09}",
                "verbose": True,
                "save_top_k": -1,
                "every_n_train_steps": 10000,
                "save_weights_only": True,
            },
        }
    merged = plain(OmegaConf.merge(configs, configured))
    return [_build_callback(name, config) for name, config in merged.items() if config is not None]


def _build_callback(name: str, config: dict[str, Any]) -> Callback:
    if str(config.get("target")).endswith(".callbacks.ModelCheckpoint"):  # Lightning's keeps checkpoints for NaN
        config = {**config, "target": "ldm.training.best_checkpoint.ModelCheckpoint"}
    try:
        callback = instantiate_from_config(config)
    except (MisconfigurationException, ValueError, TypeError) as error:
        raise UserError(f"lightning.{name} cannot be built: {' '.join(str(error).split())}") from error
    if type(callback) is SetupCallback:  # it can write any text to any folder
        raise UserError(f"lightning.{name} is refused: every run has its own SetupCallback; remove this one")
    return callback


def build_logger(plan: Plan) -> Any:
    """Build the logger or a list of several: TensorBoard in the log folder, or what `lightning.logger` names."""
    return build_loggers(plain(plan.lightning).get("logger"), plan.folder)


def hyperparameters(plan: Plan, model: HasLearningRate) -> dict[str, Any]:
    """Return what loggers record of a run: its configuration, options and learning rate."""
    sections = {**plain(plan.config), "lightning": plain(plan.lightning)}
    return {**sections, **plan.options, "learning_rate": getattr(model, "learning_rate", None)}


def build_model_checkpoint(plan: Plan, model: nn.Module, has_validation: bool) -> Callback:
    """Build the callback that keeps the best three epochs by the model's `monitor`, or else the latest epoch."""
    params: dict[str, Any] = {"dirpath": str(plan.checkpoints), "filename": "{epoch:06}", "verbose": True}
    monitor = getattr(model, "monitor", None)
    if monitor is not None:
        params |= {"monitor": monitor, "save_top_k": 3}
    default = {"target": "pytorch_lightning.callbacks.ModelCheckpoint", "params": params}
    configured = plan.lightning.get("modelcheckpoint") or OmegaConf.create()
    config = plain(OmegaConf.merge(default, configured))
    params = config["params"]
    params.pop("save_last", None)  # LastCheckpoint saves it
    if not has_validation:
        params.setdefault("save_on_train_epoch_end", True)
    if not has_validation and (params.get("monitor") == monitor or str(params.get("monitor")).startswith("val")):
        monitor = params.pop("monitor", None)
        if monitor is not None:
            logger.info('keeping the latest checkpoint: without validation there is no "%s"', monitor)
        if params.get("save_top_k", 1) > 1:  # the best ones need a monitor
            del params["save_top_k"]
    return _build_callback("modelcheckpoint", config)


def set_learning_rate(model: HasLearningRate, plan: Plan, settings: dict[str, Any]) -> None:
    """Set the model's learning rate, scaled by the number of items in a step unless `--scale_lr false`."""
    base = float(plan.config.model.base_learning_rate)
    if not plan.scale_lr:
        model.learning_rate = base
        logger.info("learning rate %.2e", base)
        return
    batches = settings.get("accumulate_grad_batches", 1)
    devices = device_count(settings)
    batch_size = (plan.config.data.get("params") or {}).get("batch_size", 1)
    model.learning_rate = batches * devices * batch_size * base
    logger.info(
        "learning rate %.2e = %d (accumulated batches) × %d (devices) × %d (batch size) × %.2e (base)",
        *(model.learning_rate, batches, devices, batch_size, base),
    )


def device_count(settings: dict[str, Any]) -> int:
    """Return the number of devices in the settings; devices that Lightning chooses count as one."""
    devices = settings.get("devices", 1)
    if isinstance(devices, list):
        return len(devices)
    if devices == -1 or (devices == "auto" and settings.get("accelerator") in ("gpu", "cuda")):
        return max(1, torch.cuda.device_count())
    return devices if isinstance(devices, int) else 1


def process_count(settings: dict[str, Any]) -> int:
    """Return the number of processes of the run, on all machines."""
    nodes = settings.get("num_nodes", 1)
    devices = device_count(settings)
    if settings.get("accelerator") == "auto" and settings.get("devices", "auto") in ("auto", -1):
        devices = max(devices, torch.cuda.device_count())
    return devices * (nodes if isinstance(nodes, int) else 1)


def find_strategy(settings: dict[str, Any], model: nn.Module) -> Any:
    """Return the strategy of the Trainer. Those of DDP search for unused parameters unless they say otherwise.

    Many models have such parameters: each of the two optimizers of a first stage leaves those of the other without
    gradients, and a text encoder has an output layer that is not used.

    Raises:
        UserError: a first stage would be trained without the search.
    """
    strategy = settings.get("strategy") or "auto"
    if strategy == "auto":
        return "ddp_find_unused_parameters_true" if process_count(settings) > 1 else strategy
    if strategy in DDP_STRATEGIES:
        return f"{strategy}_find_unused_parameters_true"
    is_first_stage = not trains_itself(model) and hasattr(model, "adversarial_loss")
    if is_first_stage and str(strategy).endswith("find_unused_parameters_false"):
        remedy = strategy.replace("_find_unused_parameters_false", "")
        raise UserError(f"--strategy {strategy} cannot train a first stage with a discriminator; give {remedy}")
    return strategy


def pop_manual_optimization(model: nn.Module, settings: dict[str, Any]) -> ManualOptimization | None:
    """Remove from the settings what the adapter of a first stage does instead of the Trainer, and return it."""
    if trains_itself(model) or not hasattr(model, "adversarial_loss"):
        return None
    return ManualOptimization(
        settings.pop("accumulate_grad_batches", 1),
        settings.pop("gradient_clip_val", None),
        settings.pop("gradient_clip_algorithm", None),
    )


def build_trainer(
    settings: dict[str, Any], callbacks: list[Callback], run_logger: Any, data: LightningDataModule
) -> Trainer:
    """Build Lightning's Trainer.

    Raises:
        UserError: the Trainer rejects an argument.
    """
    if isinstance(data, DataModuleFromConfig):
        settings["use_distributed_sampler"] = False  # its loaders distribute the data
    try:
        if settings.get("max_time") is not None and not any(isinstance(callback, Timer) for callback in callbacks):
            callbacks = [*callbacks, TimeLimit(settings.pop("max_time"))]
        return Trainer(**settings, logger=run_logger, callbacks=callbacks, plugins=[SafeCheckpointIO()])
    except (MisconfigurationException, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"Lightning's Trainer rejects its arguments: {reason}") from error


def prepare(plan: Plan, model: Any, data: LightningDataModule, trainer: Trainer) -> None:
    """Load the weights of the loss and cache latents, which can take time or use the network."""
    loss: Any = getattr(model, "loss", None)
    if hasattr(loss, "prepare"):
        loss.prepare()
    if isinstance(data, DataModuleFromConfig) and data.latent_cache:
        from ldm.training.latents import cache_latents

        if plan.checkpoint is not None:
            model.load_state_dict(read_state_dict(plan.checkpoint, as_written=True))
        with isolate_rng():  # training must not depend on whether the latents come from a file
            dtype = AUTOCAST_DTYPES.get(str(trainer.precision))
            cache_latents(data, model, trainer.strategy.root_device, dtype)
