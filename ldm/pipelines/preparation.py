"""Prepare a model for many evaluations: pack its weights in the layout of the CPU, cache the keys of its context.

Only this module packs weights for sampling, and only `ldm.pipelines.generation` uses it. `packing_pays` decides if a
run is packed, unless the caller of `generate` does: a replay, or a run of `sample_diffusion`, which can be continued.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from ldm.modules.attention import cached_contexts
from ldm.modules.packing import packed_weights

# Packing and unpacking the weights of a U-Net take as long as a dozen of its evaluations save.
PAYS_FROM = 12


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
    packing = packed_weights(*parts) if packed else nullcontext()
    caching = cached_contexts(network) if network is not None else nullcontext()
    with packing, caching:
        yield
