"""Text of the forecast of a run, for the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ldm.training.forecast import Forecast, Memory

MEMORY_ROWS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "state of the optimizers",
    "average": "moving averages",
    "activations": "activations and batch",
}


def forecast_text(forecast: Forecast) -> str:
    """Return the forecast of a run as text of several lines."""
    return "\n".join([*_parameter_lines(forecast), "", *_memory_lines(forecast), "", *_time_lines(forecast)])


def _parameter_lines(forecast: Forecast) -> Iterator[str]:
    yield f"{'parameters':28}{'trained':>15}{'frozen':>15}"
    for each in forecast.parameters:
        yield f"  {each.part:26}{each.trained:>15,}{each.frozen:>15,}"
    trained, frozen = (sum(getattr(each, name) for each in forecast.parameters) for name in ("trained", "frozen"))
    yield f"  {'total':26}{trained:>15,}{frozen:>15,}"


def _memory_lines(forecast: Forecast) -> Iterator[str]:
    memory = forecast.at(forecast.batch_size).memory
    yield f"memory on {forecast.device}, batch of {forecast.batch_size}{_basis(forecast)}"
    for name, label in MEMORY_ROWS.items():
        yield f"  {label:26}{_bytes(getattr(memory, name)):>15}"
    if memory.gaps:
        yield f"  {'gaps between tensors':26}{_bytes(_gaps(memory)):>15}"
    yield f"  {'peak':26}{_bytes(memory.peak):>15}"
    largest, free = forecast.largest_batch, _bytes(forecast.capacity)
    if largest == 0:
        yield f"largest batch that fits: none, {free} are free; use a smaller model, or a GPU with more memory"
    else:
        yield f"largest batch that fits: {largest:,} ({free} are free)"
        if largest < forecast.batch_size:
            yield (
                f"the batch of {forecast.batch_size} does not fit: set data.params.batch_size={largest} and "
                f"--accumulate_grad_batches {-(-forecast.batch_size * forecast.batches // largest)}"
            )


def _basis(forecast: Forecast) -> str:
    if forecast.large.items == forecast.batch_size:
        return ""
    return f", extrapolated from {forecast.small.items} and {forecast.large.items} items"


def _time_lines(forecast: Forecast) -> Iterator[str]:
    seconds = forecast.step_seconds
    items = forecast.batch_size * forecast.batches
    batches = f" of {forecast.batches} batches" if forecast.batches > 1 else ""
    yield f"time of a step{batches}: {_seconds(seconds)}, {items / seconds:.3g} images a second on one device"
    if forecast.loading > 0:
        processes = max(1, forecast.workers)
        loading = forecast.loading * forecast.batches
        yield f"loading its images: {_seconds(loading)} in one process; num_workers is {forecast.workers}"
        if forecast.workers == 0:
            seconds += loading
        elif loading / processes > seconds:
            seconds = loading / processes
            yield "loading is slower than training: raise data.params.num_workers"
    if forecast.steps is not None:
        total = timedelta(seconds=round(seconds * forecast.steps))
        yield f"{forecast.steps:,} steps: {total} without validation"
    else:
        yield f"{3600 / seconds:,.0f} steps an hour; --max_steps limits the run"


def _gaps(memory: Memory) -> int:
    return int(memory.peak * memory.gaps / (1 + memory.gaps))


def _bytes(number: int) -> str:
    return f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"


def _seconds(number: float) -> str:
    return f"{number:.2f} s" if number >= 1 else f"{1000 * number:.0f} ms"
