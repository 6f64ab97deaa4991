"""Prepare a model for many evaluations: pack its weights in the layout of the CPU, cache the keys of its context.

Only this module packs weights for sampling, and only `ldm.pipelines.generation` uses it. `packing_pays` decides if a
run is packed, unless the caller of `generate` does: a replay, or a run of `sample_diffusion`, which can be continued.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from torch import nn

from ldm.modules.attention import cached_contexts
from ldm.modules.packing import packed_weights

# Packing the weights of a U-Net takes as long as three of its evaluations save. The number is the same on every
# machine, because packing affects the rounding of an image.
PAYS_FROM = 4
# Plain weights are kept beside the packed ones if the memory holds this many copies of them.
COPIES = 4


def packing_pays(evaluations: int) -> bool:
    """Return whether `evaluations` of the network save more time than packing its weights takes."""
    return evaluations >= PAYS_FROM


@contextmanager
def prepared(model: Any, packed: bool) -> Iterator[None]:
    """Run with the keys and values of the context computed once, and with `packed` weights.

    Results stay the same up to rounding. Inside, the model only runs: its weights cannot be trained, moved or saved.
    `ema_scope` goes around this context; inside it is an error.

    Args:
        model: a diffusion model with its network in `model` and, if it is latent, a `first_stage_model`; or an
            autoencoder.
        packed: pack the weights, from the first evaluation on.
    """
    network = getattr(model, "model", None)
    stage = getattr(model, "first_stage_model", None if network is not None else model)
    parts = [*([network] if network is not None else []), *(stage.children() if stage is not None else ())]
    packing = packed_weights(*parts, keep_originals=_fits_into_memory(parts)) if packed else nullcontext()
    caching = cached_contexts(network) if network is not None else nullcontext()
    with packing, caching:
        yield


def _fits_into_memory(parts: Sequence[nn.Module]) -> bool:
    """Return whether the available memory holds `COPIES` copies of the weights; False if it is unknown."""
    size = sum(parameter.nbytes for part in parts for parameter in part.parameters())
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        available = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return False
    return available > COPIES * size
