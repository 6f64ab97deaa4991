"""Batch sizes, learning rates and numbers of steps for a number of images, and for the memory of the machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ldm.preparation.machine import Machine
from ldm.preparation.networks import Denoiser, FirstStage

if TYPE_CHECKING:
    from torch import nn

BYTES_OF_WEIGHT = 20  # with its gradient, the two averages of Adam and the moving average, in float32
HEADROOM = 1.3  # copies of activations that autograd does not record
LOSS_NETWORKS = 2.0  # memory with a discriminator and a perceptual network, compared with the first stage alone


@dataclass(frozen=True)
class Schedule:
    """Plan of a training run.

    Attributes:
        batch_size: items of a batch.
        accumulate: batches of a step.
        learning_rate: learning rate of a step.
        steps: number of steps.
        validate_every: epochs between validations.
        parameters: number of trained weights.
    """

    batch_size: int
    accumulate: int
    learning_rate: float
    steps: int
    validate_every: int
    parameters: int

    @property
    def items(self) -> int:
        """Items of a step."""
        return self.batch_size * self.accumulate

    @property
    def base_learning_rate(self) -> float:
        """Learning rate for one item, as a configuration states it."""
        return float(f"{self.learning_rate / self.items:.4g}")


@dataclass(frozen=True)
class Workload:
    """Work of a training run.

    Attributes:
        items: items of an epoch.
        wanted: items of a step, if there are as many.
        most: largest batch.
        passes: number of times that training shows each item.
        bounds: fewest and most steps.
        learning_rate: learning rate of a step.
    """

    items: int
    wanted: int
    most: int
    passes: int
    bounds: tuple[int, int]
    learning_rate: float

    def schedule(self, machine: Machine, cost: tuple[int, int], steps: int | None) -> Schedule:
        """Return the plan of the run.

        Args:
            machine: the machine that trains.
            cost: number of weights, and bytes of the activations of an item.
            steps: number of steps; None derives it from the items.
        """
        weights, activations = cost
        free = machine.training_memory - BYTES_OF_WEIGHT * weights
        fitting = max(1, free // max(1, int(HEADROOM * activations)))
        batch = _power_of_two(min(fitting, self.most, self.wanted, max(1, self.items)))
        accumulate = max(1, min(self.wanted, self.items) // batch)
        low, high = self.bounds
        steps = steps or min(max(self.passes * self.items // (batch * accumulate), low), high)
        epoch = -(-self.items // (batch * accumulate))
        validate_every = max(1, min(steps, max(steps // 20, 500)) // epoch)
        return Schedule(batch, accumulate, self.learning_rate, steps, validate_every, weights)


def first_stage_schedule(
    stage: FirstStage, size: int, count: int, machine: Machine, steps: int | None, with_losses: bool
) -> Schedule:
    """Return the plan for the training of a first stage; `with_losses` adds a discriminator and LPIPS."""
    width = stage.params["ddconfig"]["ch"]
    rate = 1e-3 if width <= 32 else 5e-4 if width <= 64 else 1e-4
    rate = rate / 5 if stage.weights is not None else rate
    bounds = (2_000, 10_000) if stage.weights is not None else (5_000, 100_000 if machine.has_gpu else 20_000)
    # Small images make more items of a step, so that a step has about as many pixels.
    wanted = min(64, 16 * max(1, 256 // size)) if machine.has_gpu else min(32, 8 * max(1, 128 // size))
    side, channels = size // stage.factor, stage.params["ddconfig"]["z_channels"]
    weights, activations = _cost(
        lambda: _build_first_stage(stage),
        lambda model: (model.encoder(_zeros(1, 3, size, size)), model.decoder(_zeros(1, channels, side, side))),
    )
    activations = int(LOSS_NETWORKS * activations) if with_losses else activations
    work = Workload(count, wanted, wanted, 100, bounds, rate)
    return work.schedule(machine, (weights, activations), steps)


def denoiser_schedule(
    denoiser: Denoiser, count: int, machine: Machine, steps: int | None, extra_weights: int = 0
) -> Schedule:
    """Return the plan for the training of a diffusion model.

    Args:
        denoiser: its network.
        count: number of items of an epoch.
        machine: the machine that trains.
        steps: number of steps; None derives it from the items.
        extra_weights: number of weights of other trained parts.
    """
    width, side, channels = (denoiser.params[key] for key in ("model_channels", "image_size", "in_channels"))
    rate = 5e-4 if width <= 96 else 2e-4 if width <= 128 else 1e-4
    weights, activations = _cost(
        lambda: _build(denoiser.params),
        lambda model: model(_zeros(1, channels, side, side), _zeros(1), context=_context(denoiser)),
    )
    wanted = 64 if machine.has_gpu else 32
    bounds = (10_000, 400_000 if machine.has_gpu else 50_000)
    work = Workload(count, wanted, wanted, 300, bounds, rate)
    return work.schedule(machine, (weights + extra_weights, activations), steps)


def _build_first_stage(stage: FirstStage) -> nn.Module:
    from ldm.config.instantiate import instantiate_from_config

    params = {**stage.params, "lossconfig": {"target": "torch.nn.Identity"}}
    return instantiate_from_config({"target": stage.target, "params": params})


def _build(params: Mapping[str, Any]) -> nn.Module:
    from ldm.modules.diffusionmodules.openaimodel import UNetModel

    return UNetModel(**params, use_checkpoint=False)


def _context(denoiser: Denoiser) -> Any:
    return _zeros(1, 16, denoiser.context) if denoiser.context else None


def _zeros(*shape: int) -> Any:
    import torch

    return torch.zeros(*shape)


def _cost(build: Callable[[], nn.Module], run: Callable[[Any], Any]) -> tuple[int, int]:
    """Return the number of weights of a network, and the bytes that the backward pass of one item keeps.

    The network has no values: torch's device "meta" computes shapes only.
    """
    import torch

    kept: dict[int, tuple[int, Any]] = {}

    def record(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes(), storage  # the storage must live, so that its address stays its own
        return tensor

    with torch.device("meta"):
        model = build()
        with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
            output = run(model)
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    activations = sum(size for address, (size, _) in kept.items() if address not in weights)
    del output
    return sum(parameter.numel() for parameter in model.parameters()), activations


def _power_of_two(number: int) -> int:
    return 1 << (max(1, number).bit_length() - 1)
