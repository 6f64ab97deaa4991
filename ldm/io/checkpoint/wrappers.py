"""Parts of names that wrappers of a model insert, such as `module.` before all names of a parallel model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from torch import Tensor

from ldm.io.checkpoint.names import EMA_PREFIX

# Parts that torch.compile, activation checkpointing, FSDP and Lightning Fabric insert. No model uses them.
RESERVED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_forward_module")
# Part that DataParallel, DistributedDataParallel and, beside its counter, AveragedModel insert. A model may use it too.
PARALLEL, COUNTER = "module", "n_averaged"
# Starts of names of the published models. A part before all of them comes from a class that holds the model.
STARTS = (
    "model.diffusion_model.",
    "first_stage_model.",
    "cond_stage_model.",
    EMA_PREFIX,
    "encoder.conv_in.",
    "decoder.conv_in.",
)


def unwrapped(names: Iterable[str]) -> dict[str, str]:
    """Map the names of a state dict to the same names without the parts that wrappers insert, at any depth.

    `module` is such a part if it has no sibling, and so is a prefix of all names before those of a published model. All
    names stay as they are if two would become equal.
    """
    paths = {name: tuple(name.split(".")) for name in names}
    siblings: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for path in paths.values():
        for depth, part in enumerate(path):
            siblings[path[:depth]].add(part)
    clean: dict[str, str] = {}
    averages: dict[str, str] = {}
    for name, path in paths.items():
        kept = [depth for depth in range(len(path)) if not _is_wrapper(path, depth, siblings)]
        clean[name] = ".".join(path[depth] for depth in kept)
        if len(kept) < len(path):
            averages |= _flat_names(path, kept)
    clean = {name: averages.get(new, new) for name, new in clean.items()}
    length = len(_prefix(clean.values()))
    clean = {name: new[length:] for name, new in clean.items()}
    return clean if len(set(clean.values())) == len(clean) else {name: name for name in paths}


def under_own_names(state_dict: Mapping[str, Tensor], own: Iterable[str]) -> Mapping[str, Tensor]:
    """Return unwrapped weights under the names of a module that has such parts in its own names."""
    own = set(own)
    wrapped = {new: name for name, new in unwrapped(own).items() if new != name}
    return {name if name in own else wrapped.get(name, name): value for name, value in state_dict.items()}


def _prefix(names: Iterable[str]) -> str:
    """Return the prefix of all names before those of a published model, with its last dot; "" if there is none."""
    names, prefix = list(names), ""
    while names and not any(name.startswith(STARTS) for name in names):
        first = names[0].partition(".")[0] + "."
        if not all(name.startswith(first) for name in names):
            return ""
        prefix += first
        names = [name.removeprefix(first) for name in names]
    return prefix


def _is_wrapper(path: tuple[str, ...], depth: int, siblings: Mapping[tuple[str, ...], set[str]]) -> bool:
    if depth == len(path) - 1:  # the parameter itself
        return False
    return path[depth] in RESERVED or (path[depth] == PARALLEL and siblings[path[:depth]] <= {PARALLEL, COUNTER})


def _flat_names(path: tuple[str, ...], kept: list[int]) -> dict[str, str]:
    """Map the names that the moving average of a weight may have to those without the parts of wrappers.

    An average is called `model_ema.` and the name of its weight inside the averaged module, without dots.
    """
    flat = {}
    for first in range(len(path)):
        rest = "".join(path[depth] for depth in kept if depth >= first)
        flat[EMA_PREFIX + "".join(path[first:])] = EMA_PREFIX + rest
    return flat
