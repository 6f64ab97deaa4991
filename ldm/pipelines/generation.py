"""The loop over batches that all tasks share: sample, decode, report progress, yield each image with its metadata."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from ldm.models.diffusion.noise import SeededNoise
from ldm.pipelines.pipeline import Pipeline
from ldm.pipelines.preparation import packing_pays, prepared

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

SEED_RANGE = 2**63  # of torch's generators


@dataclass(frozen=True)
class Item:
    """One image to sample: its index in the run, its seed, and the request of the task."""

    index: int
    seed: int
    request: Any


@dataclass(frozen=True)
class BatchPosition:
    """Position of an image in its run and its batch.

    The last bits of a sample depend on the size of its batch and on packed weights, so a replay needs them.
    """

    index: int = 0  # in the run
    position: int = 0  # in the batch
    batch: int = 1  # size of the batch
    packed: bool = True  # whether the weights were packed; files of earlier versions do not say, theirs were


@dataclass(frozen=True)
class Sample:
    """A finished image: its item, its position, its pixels (H, W, 3) and its latents (C, h, w).

    Pixels are uint8; those of a reconstruction are float32 in [-1, 1].
    """

    item: Item
    position: BatchPosition
    pixels: np.ndarray | None
    latents: Tensor


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
    run_length: int | None = None,
    progress: bool = True,
    callback: Callable[[int, int], object] | None = None,
    description: str = "sampling",
) -> Iterator[Sample]:
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
        run_length: number of images of the whole run if `items` are only a part of it, so that both are packed alike.
        progress: show a progress bar.
        callback: called with the finished and the expected number of steps after every step.
        description: label of the progress bar.
    """
    with ExitStack() as preparation, tqdm(desc=description, unit="step", disable=not progress) as bar:
        steps = _Steps(bar, callback)
        planned = finished = 0
        prepared_for: tuple[Any, ...] | None = None
        is_packed = False
        for batch in batches(pipeline, items, batch_size):
            requests = [item.request for item in batch]
            per_batch = pipeline.count_steps(requests[0], getattr(model, "num_timesteps", 0))
            # Packing suits the shape of the first batch, which decides the last bits of the batches after it.
            alike = (len(batch), pipeline.batch_key(requests[0]))
            remaining = -(-(count - finished) // len(batch))  # batches, as if all were like this one
            steps.expect(planned + per_batch * remaining)
            if alike != prepared_for:
                if run_length is not None and len(batch) == batch_size:
                    remaining = -(-run_length // batch_size)
                is_packed = packing_pays(per_batch * remaining) if packed is None else packed
                preparation.close()
                preparation.enter_context(prepared(model, is_packed))
                prepared_for = alike
            planned += per_batch
            finished += len(batch)
            noise = SeededNoise([item.seed for item in batch], model.device)
            x_T = None if latents is None else latents[[item.index for item in batch]].to(model.device)
            with torch.no_grad():
                sampled = pipeline.sample(model, requests, noise, x_T, steps)
                images = pipeline.decode(model, requests, sampled) if decoded else [None] * len(batch)
            for position, (item, image, latent) in enumerate(zip(batch, images, sampled, strict=True)):
                place = BatchPosition(item.index, position, len(batch), is_packed)
                yield Sample(item, place, image, latent)


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
