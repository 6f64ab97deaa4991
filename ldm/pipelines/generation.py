"""The loop over batches that all tasks share: sample, decode, report progress, yield each image with its metadata."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from ldm.errors import UserError
from ldm.models.diffusion.noise import SeededNoise
from ldm.modules.precision import HALF_PRECISIONS, finite_items
from ldm.pipelines.pipeline import Pipeline, SamplerPipeline
from ldm.pipelines.preparation import packing_pays, prepared

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


@dataclass(frozen=True)
class Item:
    """One image to sample: its index in the run, its seed, the request of the task, and the seed of its start noise.

    A start seed of None is the seed.
    """

    index: int
    seed: int
    request: Any
    start_seed: int | None = None


@dataclass(frozen=True)
class BatchPosition:
    """Position of an image in its run and its batch.

    The batch size and packed weights affect the rounding of a sample, so both are recorded for a replay.
    """

    index: int = 0  # in the run
    position: int = 0  # in the batch
    batch: int = 1  # size of the batch
    packed: bool = True  # whether the weights were packed; files of earlier versions do not say, theirs were


@dataclass(frozen=True)
class Sample:
    """A finished image: its item, its position, its pixels (H, W, 3) and its latents (C, h, w).

    Pixels are uint8; those of a reconstruction are float32 in [-1, 1]. An image that could not be computed has no
    pixels, and the `error` says why.
    """

    item: Item
    position: BatchPosition
    pixels: np.ndarray | None
    latents: Tensor
    error: UserError | None = None

    @property
    def image(self) -> np.ndarray:
        """Pixels of an image that was computed and decoded.

        Raises:
            ValueError: It has none.
        """
        if self.pixels is None:
            raise ValueError(f"image {self.item.index} has no pixels")
        return self.pixels


def batches(pipeline: Pipeline, items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Group neighbouring items that can share a batch, at most `size` of them."""
    batch: list[Item] = []
    key = None
    for item in items:
        own = pipeline.batch_key(item.request)
        if batch and (len(batch) == size or own != key):
            yield batch
            batch = []
        key = own
        batch.append(item)
    if batch:
        yield batch


def generate(
    pipeline: Pipeline,
    model: Any,
    items: Iterable[Item],
    *,
    count: int,
    batch_size: int = 1,
    latents: Tensor | None = None,
    decoded: bool = True,
    packed: bool | None = None,
    progress: bool = True,
    callback: Callable[[int, int], object] | None = None,
    description: str = "sampling",
) -> Generator[Sample, None, None]:
    """Sample every item and yield it as soon as its batch is finished.

    Args:
        pipeline: the task and its settings.
        model: a model that can do the task.
        items: images to sample, read lazily, batch by batch.
        count: the number of items that `items` is expected to yield.
        batch_size: images that are sampled at once.
        latents: (N, C, h, w) start noise of all items, instead of noise from their seeds.
        decoded: decode the latents; False leaves `pixels` None.
        packed: pack the weights of the model; None packs them if the run is long enough to gain from it.
        progress: show a progress bar.
        callback: called with the finished and the expected number of steps after every step.
        description: label of the progress bar.
    """
    with _Preparation(model, packed) as preparation, tqdm(desc=description, unit="step", disable=not progress) as bar:
        steps = _Steps(bar, callback)
        planned = finished = 0
        for batch in batches(pipeline, items, batch_size):
            requests = [item.request for item in batch]
            per_batch = pipeline.count_steps(requests[0], getattr(model, "num_timesteps", 0))
            remaining = per_batch * -(-(count - finished) // len(batch))  # as if all batches were like this one
            steps.expect(planned + remaining)
            planned += per_batch
            finished += len(batch)
            preparation.prepare((len(batch), pipeline.batch_key(requests[0])), remaining)
            seeds, start_seeds = [item.seed for item in batch], [item.start_seed for item in batch]
            noise = SeededNoise(seeds, model.device, start_seeds)
            x_T = None if latents is None else latents[[item.index for item in batch]].to(model.device)
            with torch.no_grad():
                sampled = pipeline.sample(model, requests, noise, x_T, steps)
                images = pipeline.decode(model, requests, sampled) if decoded else [None] * len(batch)
            finite = finite_items(sampled).tolist()
            for index, (item, image, latent) in enumerate(zip(batch, images, sampled, strict=True)):
                position = BatchPosition(item.index, index, len(batch), preparation.packed)
                error = None
                if not finite[index] or (decoded and image is None):
                    error = _not_finite(item, "pixels" if finite[index] else "latents", pipeline, model)
                yield Sample(item, position, image if error is None else None, latent, error)


def _not_finite(item: Item, values: str, pipeline: Pipeline, model: Any) -> UserError:
    """Return the error of an image whose latents or pixels are not finite."""
    remedies = []
    if values == "latents" and isinstance(pipeline, SamplerPipeline):  # the first stage repeats in float32 itself
        if next((weight.dtype for weight in model.parameters()), None) in HALF_PRECISIONS:
            remedies.append("use the precision float32")
        if pipeline.scale != 1:
            remedies.append("lower the guidance scale")
        if pipeline.eta != 0:
            remedies.append("lower eta")
    remedy = " or ".join([*remedies, "check the weights of the model"])
    return UserError(f"the {values} of image {item.index} (seed {item.seed}) are not finite; {remedy}")


class _Preparation(ExitStack):
    """Preparation of a model for one batch after the other; it changes when the shape of the batches does.

    Weights are packed for the shape of the first batch, which affects the rounding of the batches after it.
    """

    def __init__(self, model: Any, packed: bool | None) -> None:
        super().__init__()
        self.model = model
        self.choice = packed
        self.packed = False
        self.shape: tuple[Any, ...] | None = None

    def prepare(self, shape: tuple[Any, ...], evaluations: int) -> None:
        """Prepare the model for batches of `shape` and a number of evaluations."""
        if shape == self.shape:
            return
        self.close()
        self.packed = packing_pays(evaluations) if self.choice is None else self.choice
        self.enter_context(prepared(self.model, self.packed))
        self.shape = shape


class _Steps:
    """Counter of sampler steps, shown on a progress bar and passed to a callback."""

    def __init__(self, bar: tqdm, callback: Callable[[int, int], object] | None) -> None:
        self.bar = bar
        self.callback = callback
        self.done = self.total = 0

    def expect(self, total: int) -> None:
        """Set the number of steps of the whole run."""
        self.bar.total = self.total = total
        self.bar.refresh()

    def __call__(self) -> None:
        self.done += 1
        self.bar.update()
        if self.callback is not None:
            self.callback(self.done, self.total)
