"""Forecast of a training run: parameters, memory and time, measured by a few real steps. Nothing is written to disk."""

from __future__ import annotations

import gc
import itertools
import logging
import statistics
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, IterableDataset

from ldm.config.instantiate import instantiate_from_config
from ldm.errors import UserError, is_out_of_memory
from ldm.models.diffusion.batch_keys import LATENT_KEY
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.lightning import plain_models
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.live_bytes import LiveBytes
from ldm.preparation.machine import CGROUP_LIMITS, Machine
from ldm.training.allocator import keep_freed_memory
from ldm.training.assembly import (
    build_data_with_classes,
    pop_manual_optimization,
    process_count,
    remove_weights,
    set_learning_rate,
)
from ldm.training.configuration import Plan, plain
from ldm.training.data import DataModuleFromConfig
from ldm.training.modules import lightning_module
from ldm.training.run import checked_settings

STEPS = 4  # timed steps of a batch size, after one that is not timed
LONGEST_STEP = 12.0  # seconds; a larger batch is extrapolated
CPU_GAPS = 0.15  # memory between the tensors of a step on the CPU, and of its kernels, as a share of the tensors
USABLE = 0.92  # share of the free memory that tensors can fill, in spite of gaps between them
TRAINER_SETTINGS = ("accelerator", "precision", "gradient_clip_val", "gradient_clip_algorithm", "benchmark")


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters of a part of a model."""

    part: str
    trained: int
    frozen: int


@dataclass(frozen=True)
class Memory:
    """Bytes of a training step at its peak.

    Attributes:
        weights: parameters and buffers.
        gradients: gradients of the trained parameters, and with several processes the copies that they exchange.
        optimizer: state of the optimizers.
        average: moving averages of the weights.
        activations: all else: the batch, activations and temporary results.
        gaps: share of memory between the tensors, which the allocator of a GPU does not count.
    """

    weights: int
    gradients: int
    optimizer: int
    average: int
    activations: int
    gaps: float = 0.0

    @property
    def fixed(self) -> int:
        """Bytes of tensors that do not depend on the batch."""
        return self.weights + self.gradients + self.optimizer + self.average

    @property
    def peak(self) -> int:
        """Bytes at the peak, with the gaps."""
        return int((1 + self.gaps) * (self.fixed + self.activations))


@dataclass(frozen=True)
class Measurement:
    """Step that was measured.

    Attributes:
        items: items of the batch.
        seconds: time of the step.
        memory: its memory.
    """

    items: int
    seconds: float
    memory: Memory


@dataclass(frozen=True)
class Forecast:
    """Forecast of a run.

    Attributes:
        parameters: numbers of parameters of each part of the model.
        device: name of the device.
        batch_size: items of a batch.
        batches: batches of a step, over all devices.
        steps: number of steps of the run; None if nothing limits it.
        small, large: the measured steps. Others are extrapolated from them.
        loading: seconds that one process takes to load a batch.
        workers: number of loader processes.
        capacity: bytes that the tensors of a run can use on the device.
    """

    parameters: tuple[Parameters, ...]
    device: str
    batch_size: int
    batches: int
    steps: int | None
    small: Measurement
    large: Measurement
    loading: float
    workers: int
    capacity: int

    def at(self, items: int) -> Measurement:
        """Return the step of a batch of `items` items, on the line through both measured steps."""
        if items in (self.large.items, self.small.items):
            return self.large if items == self.large.items else self.small
        slope, start = self._activations()
        memory = replace(self.large.memory, activations=int(max(0.0, start + slope * items)))
        if self.large.items == self.small.items:
            return Measurement(items, self.large.seconds * items / self.large.items, memory)
        rate = (self.large.seconds - self.small.seconds) / (self.large.items - self.small.items)
        rate = max(rate, 0.0)
        return Measurement(items, self.large.seconds + rate * (items - self.large.items), memory)

    def _activations(self) -> tuple[float, float]:
        """Return the bytes of activations of an item, and those of an empty batch."""
        large, small = self.large, self.small
        if large.items == small.items:
            return large.memory.activations / large.items, 0.0
        slope = (large.memory.activations - small.memory.activations) / (large.items - small.items)
        slope = max(slope, 1.0)
        return slope, large.memory.activations - slope * large.items

    @property
    def largest_batch(self) -> int:
        """Largest number of items whose step fits into the memory; 0 if not even one item does."""
        slope, start = self._activations()
        memory = self.large.memory
        return max(0, int((self.capacity / (1 + memory.gaps) - memory.fixed - start) // slope))

    @property
    def step_seconds(self) -> float:
        """Seconds of a step, with all its accumulated batches, if loading keeps pace."""
        return self.at(self.batch_size).seconds * self.batches


def forecast(plan: Plan) -> Forecast:
    """Return the forecast of a run, measured on its device with its data.

    Args:
        plan: the run; the number of its classes is set as in a run.

    Raises:
        UserError: the configuration is invalid, data is missing, or a batch of one item does not fit into the memory.
    """
    settings = checked_settings(plan)
    if settings["accelerator"] == "cpu":
        keep_freed_memory()
    torch.manual_seed(plan.seed)
    data = build_data_with_classes(plan)
    config = plain(plan.config)
    remove_weights(config["model"])
    with plain_models():
        model = instantiate_from_config(config["model"])
    data = data or instantiate_from_config(config["data"])
    set_learning_rate(model, plan, settings)
    accumulated, processes = settings.get("accumulate_grad_batches", 1), process_count(settings)
    module = lightning_module(model, pop_manual_optimization(model, settings))
    prepare_untrained(model)
    loader = Loader(data, model)
    trial = Trial(module, settings, processes)
    one = trial.measure(loader, 1)
    large = _measure_large(trial, loader, one)
    # Activations are proportional to the items only where they exceed the gradients.
    small = trial.measure(loader, large.items // 2) if large.items >= 4 else one
    return Forecast(
        parameters=tuple(trial.parameters()),
        device=_device_name(trial.device),
        batch_size=loader.batch_size,
        batches=accumulated,
        steps=_steps(settings, loader, accumulated * processes),
        small=small,
        large=large,
        loading=loader.seconds,
        workers=loader.workers,
        capacity=capacity(trial.device, trial.own_bytes),
    )


def _measure_large(trial: Trial, loader: Loader, small: Measurement) -> Measurement:
    """Return the measured step of the largest batch, up to the configured one, that is fast and fits."""
    free = capacity(trial.device, trial.own_bytes) - small.memory.fixed
    fitting = int(free // max(1, small.memory.activations))
    fast = int(3 * LONGEST_STEP / 4 // max(small.seconds, 1e-6))  # an item costs less in a larger batch
    items = min(loader.batch_size, max(2, min(fitting, fast)))
    while items > 1:
        try:
            return trial.measure(loader, items)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            items //= 2
    return small


def prepare_untrained(model: nn.Module) -> None:
    """Give values to the weights of frozen networks that are read from files, so that the steps are finite."""
    for module in model.modules():
        if getattr(module, "has_weights", None) is False:
            module.has_weights = True  # type: ignore[assignment] # there are none to download
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.isnan().any():
                parameter.normal_(std=0.02)
    if getattr(model, "scale_by_std", False):
        model.restarted_from_ckpt = True  # type: ignore[assignment] # a trial does not measure the scale
    loss: Any = getattr(model, "loss", None)
    if hasattr(loss, "discriminator_iter_start"):
        loss.discriminator_iter_start = 0  # the forecast is that of the time from `disc_start` on


class Loader:
    """Batches of any size from the training data of a run.

    Attributes:
        batch_size: the configured number of items of a batch.
        workers: the number of loader processes.
        seconds: time that loading a batch of that size takes one process.
    """

    def __init__(self, data: Any, model: nn.Module) -> None:
        data.prepare_data()
        data.setup()
        if not isinstance(data, DataModuleFromConfig):
            raise UserError("--plan needs the data module main.DataModuleFromConfig, to choose the size of batches")
        if "train" not in data.datasets:
            raise UserError("the configuration has no data.params.train; name a training set there")
        self.data, self.model = data, model
        self.dataset = data.datasets["train"]
        self.batch_size, self.workers = data.batch_size_of("train"), data.workers_of("train")
        self.seconds = 0.0

    @property
    def length(self) -> int | None:
        """Number of items of the data; None for a stream."""
        return None if isinstance(self.dataset, IterableDataset) else len(self.dataset)

    def batch(self, items: int) -> Any:
        """Return a batch of `items` items; those of a small data set occur several times."""
        start = time.perf_counter()
        length = self.length
        if length is None:
            found = list(itertools.islice(iter(self.dataset), items))
        else:
            found = [self.dataset[index % length] for index in range(items)]
        batch = self.data.collate("data.params.train")(found)
        self.seconds = (time.perf_counter() - start) / items * self.batch_size
        return self._with_latents(batch) if self.data.latent_cache else batch

    @torch.no_grad()
    def _with_latents(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return the batch with the moments of its latents instead of its images, as a cache of latents has them."""
        self.seconds = 0.0
        if not isinstance(self.model, LatentDiffusion):
            return batch
        key, model = self.model.first_stage_key, self.model
        posteriors = [model.encode_first_stage(x) for x in super(LatentDiffusion, model).get_input(batch, key).split(1)]
        if not all(isinstance(each, DiagonalGaussianDistribution) for each in posteriors):
            return batch
        moments = torch.cat([each.parameters for each in posteriors]).cpu()
        return {**{name: value for name, value in batch.items() if name != key}, LATENT_KEY: moments}


class Trial:
    """Trial steps of a run with Lightning's Trainer, without a logger and without checkpoints.

    Args:
        module: the adapter of the model.
        settings: arguments of the run's Trainer.
        processes: number of processes of the run.
    """

    def __init__(self, module: LightningModule, settings: Mapping[str, Any], processes: int) -> None:
        self.module, self.processes = module, processes
        chosen = {name: settings[name] for name in TRAINER_SETTINGS if settings.get(name) is not None}
        devices = settings.get("devices", 1)
        first = devices[:1] if isinstance(devices, list) else 1
        self.settings = {**chosen, "devices": first}
        self.device = torch.device("cpu")
        self.own_bytes = 0  # of the tensors of the latest trial

    @property
    def model(self) -> nn.Module:
        """The model that is trained."""
        return getattr(self.module, "model", self.module)

    def measure(self, loader: Loader, items: int) -> Measurement:
        """Return the measured step of a batch of `items` items."""
        gc.collect()  # of the optimizers of an earlier trial
        torch.cuda.empty_cache()
        batch, meter = loader.batch(items), Meter()
        with _quiet():
            trainer = Trainer(
                **self.settings,
                max_epochs=1,
                limit_val_batches=0,
                num_sanity_val_steps=0,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                use_distributed_sampler=False,
                callbacks=[meter],
            )
            trainer.fit(self.module, DataLoader([batch] * (STEPS + 2), batch_size=None))  # type: ignore[arg-type] # a list
        self.device = trainer.strategy.root_device
        self.own_bytes = meter.peak
        faster = sorted(meter.seconds)[: STEPS // 2]  # other programs slow the rest
        return Measurement(items, statistics.mean(faster), self._memory(trainer, meter.peak))

    def _memory(self, trainer: Trainer, peak: int) -> Memory:
        averages = {id(buffer) for part in self._averages() for buffer in part.buffers()}
        tensors = _distinct([*self.model.parameters(), *self.model.buffers()])
        weights = sum(_bytes(tensor) for tensor in tensors if id(tensor) not in averages)
        average = sum(_bytes(tensor) for tensor in tensors if id(tensor) in averages)
        gradients = sum(_bytes(parameter) for parameter in self._trained(trainer).values())
        optimizer = sum(_bytes(tensor) for each in trainer.optimizers for tensor in _state(each))
        activations = max(0, peak - weights - average - gradients - optimizer)
        self._ids = set(self._trained(trainer))
        gaps = CPU_GAPS if self.device.type == "cpu" else 0.0
        return Memory(weights, gradients * (1 + (self.processes > 1)), optimizer, average, activations, gaps)

    def _averages(self) -> list[nn.Module]:
        return [module for name, module in self.model.named_modules() if name.rpartition(".")[2] == "model_ema"]

    @staticmethod
    def _trained(trainer: Trainer) -> dict[int, nn.Parameter]:
        groups = (group for optimizer in trainer.optimizers for group in optimizer.param_groups)
        return {id(parameter): parameter for group in groups for parameter in group["params"]}

    def parameters(self) -> Iterator[Parameters]:
        """Yield the numbers of parameters of each part of the model, as the latest trial trained them."""
        for name, part in [*self.model.named_children(), ("itself", _Own(self.model))]:
            own = _distinct(part.parameters())
            trained = sum(parameter.numel() for parameter in own if id(parameter) in self._ids)
            total = sum(parameter.numel() for parameter in own)
            if total:
                yield Parameters(name, trained, total - trained)


class _Own(nn.Module):
    """Parameters of a model that belong to none of its parts."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        for name, parameter in model.named_parameters(recurse=False):
            self.register_parameter(name, parameter)


class Meter(Callback):
    """Callback that times the steps of a trial, and counts the memory of its last one.

    Attributes:
        seconds: times of the steps.
        peak: bytes of tensors at the peak of the last step.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.peak = 0
        self._start = 0.0
        self._watch: AbstractContextManager[None] | None = None
        self._bytes = LiveBytes()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start to measure a step."""
        device = pl_module.device
        if batch_idx == STEPS + 1:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            else:
                self._begin_count(trainer, pl_module, batch)
        _synchronise(device)
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record a step; the first one, which allocates memory, is not timed."""
        device = pl_module.device
        _synchronise(device)
        if 0 < batch_idx <= STEPS:
            self.seconds.append(time.perf_counter() - self._start)
        elif batch_idx > STEPS and device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(device)
        elif self._watch is not None:
            self._watch.__exit__(None, None, None)
            self.peak = self._bytes.peak

    def _begin_count(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        for tensor in (*pl_module.parameters(), *pl_module.buffers()):
            self._bytes.add(tensor)
            if tensor.grad is not None:
                self._bytes.add(tensor.grad)
        for optimizer in trainer.optimizers:
            for tensor in _state(optimizer):
                self._bytes.add(tensor)
        for leaf in tree_leaves(batch):
            if isinstance(leaf, Tensor):
                self._bytes.add(leaf)
        self._watch = self._bytes.watching()
        self._watch.__enter__()


def _state(optimizer: Any) -> list[Tensor]:
    return [value for value in tree_leaves(list(optimizer.state.values())) if isinstance(value, Tensor)]


def _distinct(tensors: Any) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in tensors}.values())


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out the log lines and warnings about the trial as a run."""
    logs = [logging.getLogger(name) for name in ("pytorch_lightning", "ldm.training.latent_scale")]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)


def capacity(device: torch.device, own: int = 0) -> int:
    """Return the bytes that the tensors of a run can use on a device.

    Args:
        device: the device.
        own: bytes that tensors of this process use on the CPU, which a run could use instead.
    """
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
        return int(USABLE * free)
    return int(USABLE * (free_memory() + own))


def free_memory() -> int:
    """Return the main memory that this process can still use, in bytes."""
    total = Machine.this().memory
    try:
        words = (line.split() for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
        free = next(int(each[1]) * 1024 for each in words if each[0] == "MemAvailable:")
    except (OSError, StopIteration, ValueError):
        free = total
    for limit in CGROUP_LIMITS:
        used = Path(limit).with_name("memory.current" if limit.endswith(".max") else "memory.usage_in_bytes")
        try:
            free = min(free, int(Path(limit).read_text(encoding="ascii")) - int(used.read_text(encoding="ascii")))
        except (OSError, ValueError):  # there is no limit
            continue
    return max(0, min(free, total))


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _steps(settings: Mapping[str, Any], loader: Loader, batches: int) -> int | None:
    """Return the number of steps of the run; None if it is not limited."""
    limits = []
    if settings.get("max_steps", -1) >= 0:
        limits.append(int(settings["max_steps"]))
    if settings.get("max_epochs") is not None and settings["max_epochs"] >= 0 and loader.length is not None:
        epoch = -(-loader.length // (loader.batch_size * batches))
        limits.append(settings["max_epochs"] * epoch)
    return min(limits, default=None)
