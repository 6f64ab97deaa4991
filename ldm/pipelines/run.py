"""Run a pipeline from Python: seeds, batches, placement, and the form of the results."""

from __future__ import annotations

import operator
import secrets
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from typing import Any, Literal, TypedDict, cast
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from ldm.config.values import SEED_RANGE
from ldm.errors import PartialResultError, UserError
from ldm.pipelines.generation import Item, Sample, generate
from ldm.pipelines.loading import move
from ldm.pipelines.pipeline import Pipeline

OutputType = Literal["pil", "numpy", "pt", "latent"]
OUTPUT_TYPES = ("pil", "numpy", "pt", "latent")
NAMED = 8  # failed images that an error names

# A prepared model is used by one thread at a time. Threads that share a model wait for each other.
_locks: WeakKeyDictionary[Any, threading.RLock] = WeakKeyDictionary()
_locks_lock = threading.Lock()


def _lock_of(model: Any) -> threading.RLock:
    with _locks_lock:
        return _locks.setdefault(model, threading.RLock())


class RunOptions(TypedDict, total=False):
    """Keyword options that every task takes.

    Attributes:
        seed: image i uses `seed` + i; or a list with one seed for each image. Default: random.
        batch_size: images sampled at once; it changes results only by rounding. Default: 4.
        latents: (N, C, h, w) start noise, instead of noise from the seeds.
        output_type: "pil" returns PIL images, "numpy" arrays (H, W, 3) uint8, "pt" tensors (3, H, W) in [-1, 1] with
            256 levels, "latent" scaled latents (C, h, w), which `ldm.pipelines.sampling.decode` decodes.
        progress: show a progress bar. Default: True.
        callback: called with the finished and the expected number of steps after every step.
        device: move the model to this device first; it stays there.
        precision: convert the model to this precision first: "float32", "bfloat16", "float16" or "auto". It stays
            so; bits that a lower precision drops do not come back.
    """

    seed: int | Sequence[int] | None
    batch_size: int
    latents: Tensor | None
    output_type: OutputType
    progress: bool
    callback: Callable[[int, int], object] | None
    device: str | torch.device | None
    precision: str | None


class SamplerOptions(RunOptions, total=False):
    """Keyword options of tasks that sample: `RunOptions`, the sampler and its noise.

    Attributes:
        sampler: "ddim" (default), "plms", "dpm" (DPM-Solver++ 2M) or "ddpm", which takes every timestep.
        eta: noise of a DDIM step: 0 is deterministic, 1 is as DDPM.
        timestep_spacing: grid of the timesteps: "exact", "logsnr", "trailing", "uniform" or "quad". Default: that of
            the model, or else of the sampler.
    """

    sampler: str
    eta: float
    timestep_spacing: str | None


RUN_OPTIONS = frozenset(RunOptions.__annotations__)
SAMPLER_OPTIONS = frozenset(SamplerOptions.__annotations__) - RUN_OPTIONS


def split_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split keyword options into those of the sampler and those of `run`.

    Raises:
        TypeError: An option is unknown.
    """
    known = {*RUN_OPTIONS, *SAMPLER_OPTIONS}
    unknown = [name for name in options if name not in known]
    if unknown:
        raise TypeError(f"unknown option {unknown[0]!r}; options are {', '.join(sorted(known))}")
    run = {name: value for name, value in options.items() if name in RUN_OPTIONS}
    return {name: value for name, value in options.items() if name not in RUN_OPTIONS}, run


def run(
    pipeline: Pipeline,
    model: Any,
    requests: Sequence[Any],
    *,
    seed: int | Sequence[int] | None = None,
    batch_size: int = 4,
    latents: Tensor | None = None,
    output_type: OutputType = "pil",
    progress: bool = True,
    callback: Callable[[int, int], object] | None = None,
    device: str | torch.device | None = None,
    precision: str | None = None,
) -> list[Any]:
    """Sample an image for each request.

    Args:
        pipeline: the task and its settings.
        model: a model that can do the task.
        requests: one for each image.

    The other arguments are those of `RunOptions`.

    Returns:
        One result for each request, in order, in the form that `output_type` names; see `RunOptions`.

    Raises:
        UserError: The settings contradict each other, or the model cannot do the task.
        PartialResultError: Some images could not be computed; it holds the others.
        ValueError: The number of seeds or latents differs from the number of requests, or an option is unknown.
    """
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f'unknown output_type "{output_type}"; choose one of {", ".join(OUTPUT_TYPES)}')
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if latents is not None:
        latents = torch.as_tensor(latents)
        if len(latents) != len(requests):
            raise ValueError(f"{len(requests)} images need {len(requests)} latents, got {len(latents)}")
    seeds = make_seeds(seed, len(requests))
    pipeline.check_model(model)
    items = [Item(i, seed, request) for i, (seed, request) in enumerate(zip(seeds, requests, strict=True))]
    samples = generate(
        pipeline,
        model,
        items,
        count=len(items),
        batch_size=batch_size,
        latents=latents,
        decoded=output_type != "latent",
        progress=progress,
        callback=callback,
    )
    with _lock_of(model), closing(samples):
        move(model, device, precision)
        errors: dict[int, UserError] = {}
        results: list[Any] = []
        for sample in samples:
            if sample.error is not None:
                errors[sample.item.index] = sample.error
            results.append(None if sample.error else _result(sample, output_type))
    if errors:
        raise _partial(results, errors, seeds)
    return results


def _partial(results: list[Any], errors: dict[int, UserError], seeds: Sequence[int]) -> PartialResultError:
    """Return the error of a run that could not compute the images whose indices are in `errors`."""
    named = [f"{index} (seed {seeds[index]})" for index in errors]
    rest = [f"{len(named) - NAMED} more"] if len(named) > NAMED else []
    first = next(iter(errors.values()))
    return PartialResultError(
        f"{len(errors)} of {len(results)} images failed: {', '.join([*named[:NAMED], *rest])}; {first}; "
        "the attribute `images` of this error holds the others",
        results,
        errors,
    )


def make_seeds(seed: int | Sequence[int] | None, count: int) -> list[int]:
    """Return a seed for each image: `seed` + i, the seeds of a list, or for None those of a random start.

    Raises:
        ValueError: A list has another length, or a seed lies outside [0, 2⁶³).
    """
    if seed is None:
        seed = secrets.randbelow(2**32)
    if isinstance(seed, str):
        raise ValueError(f"a seed is a whole number, got {seed!r}")
    if isinstance(seed, Sequence) or getattr(seed, "ndim", 0) == 1:
        seeds = [_as_seed(each) for each in cast(Iterable[int], seed)]  # an array is not a Sequence
        if len(seeds) != count:
            raise ValueError(f"{count} images need {count} seeds, got {len(seeds)}")
        return seeds
    first = _as_seed(seed)
    return [(first + i) % SEED_RANGE for i in range(count)]


def _as_seed(value: Any) -> int:
    try:
        seed = operator.index(value)
    except TypeError:
        raise ValueError(f"a seed is a whole number, got {value!r}") from None
    if not 0 <= seed < SEED_RANGE:
        raise ValueError(f"seeds lie in [0, 2**63), got {seed}")
    return seed


def _result(sample: Sample, output_type: OutputType) -> Any:
    """Return one result in the form that `output_type` names; its pixels are uint8, or float32 in [-1, 1]."""
    from ldm.io.pixels import to_batch, to_uint8

    if output_type == "latent":
        return sample.latents
    pixels = sample.image
    if output_type == "pt" and pixels.dtype != np.uint8:
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
    if output_type == "pt":
        return to_batch([pixels])[0]
    if pixels.dtype != np.uint8:
        pixels = to_uint8(pixels.transpose(2, 0, 1))
    if output_type == "numpy":
        return pixels
    from PIL import Image

    return Image.fromarray(pixels)
