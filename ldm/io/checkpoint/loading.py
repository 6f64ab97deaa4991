"""Copy weights into a module, and select weights of a state dict: moving averages, or one part of a model.

A model must fit as a whole: a missing or differently shaped parameter is an error. Training may start from a part of
another model: names that begin with one of `ignore_keys` keep their initial values and do not count.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from ldm.errors import UserError
from ldm.io.checkpoint.names import first_names, log_names, printable
from ldm.io.checkpoint.reading import read_state_dict

logger = logging.getLogger(__name__)
# A loss's own weights serve training alone; those of a first stage within a diffusion model serve nobody.
LOSS_PREFIXES = ("loss.", "first_stage_model.loss.")
# Entries that files hold for no reader: sampler tables, and losses with their discriminators.
STRAY_PREFIXES = ("ddim_", *LOSS_PREFIXES)
EMA_PREFIX = "model_ema."
# Above this share of missing parameters a file is another model's, not an older version of this one's.
MAX_MISSING_SHARE = 1e-3


@dataclass(frozen=True)
class LoadReport:
    """What `load_weights` found: names that the file lacks, and names that the model lacks."""

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()


def load_weights(
    module: nn.Module,
    weights: str | os.PathLike[str] | Mapping[str, Tensor],
    ignore_keys: Iterable[str] = (),
    source: str | None = None,
) -> LoadReport:
    """Copy weights into `module`, converting to its data types, and log every name that did not find its match.

    Args:
        module: gets the weights; left untouched when they do not fit.
        weights: a file, or a state dict that was already read.
        ignore_keys: names that begin with one of these are not loaded.
        source: what to call the weights in messages (default: the file).

    Raises:
        UserError: as `read_state_dict`; or a shape differs, or more than 0.1 % of the parameters are missing.
    """
    where = source or (f'"{weights}"' if isinstance(weights, str | os.PathLike) else "the given weights")
    given = weights if isinstance(weights, Mapping) else read_state_dict(weights)
    ignored = tuple(ignore_keys)
    own = module.state_dict()
    chosen = {name: value for name, value in given.items() if not _begins(name, ignored)}
    fitting = {name: value for name, value in chosen.items() if name in own}
    unexpected = tuple(name for name in chosen if name not in own and not _begins(name, STRAY_PREFIXES))
    missing = tuple(name for name in own if name not in fitting)

    _check_shapes(own, fitting, type(module).__name__, where)
    _check_complete(module, set(missing), ignored, where)
    # One number is one number, stored with a dimension or without.
    module.load_state_dict({name: value.reshape(own[name].shape) for name, value in fitting.items()}, strict=False)
    log_names("missing from", where, [name for name in missing if not _begins(name, (*ignored, *STRAY_PREFIXES))])
    log_names("not used of", where, unexpected)
    return LoadReport(missing, unexpected)


def ema_names(state_dict: Mapping[str, Tensor]) -> dict[str, str]:
    """Live name → name of its moving average, for the weights of which `state_dict` holds both.

    The averages are named `model_ema.` + the live name within the averaged module, without its dots.
    """
    pairs = {}
    for name in state_dict:
        for live in (name.removeprefix("model."), name):
            average = EMA_PREFIX + live.replace(".", "")
            if average in state_dict and not name.startswith(EMA_PREFIX):
                pairs[name] = average
                break
    return pairs


def without_ema(state_dict: Mapping[str, Tensor], use_average: bool = True) -> dict[str, Tensor]:
    """`state_dict` without its moving averages; with `use_average` they replace the live weights first."""
    averages = ema_names(state_dict) if use_average else {}
    return {name: state_dict[averages.get(name, name)] for name in state_dict if not name.startswith(EMA_PREFIX)}


def part_of(state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights of a model's part under the part's own names: those that begin with `prefix`, or else all."""
    part = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
    return part or dict(state_dict)


def choose_weights(state_dict: Mapping[str, Tensor], kind: str, source: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The "live" weights, their moving averages under the live names ("ema"), or "both" as they are.

    Raises:
        UserError: there are no averages in `source`, where `state_dict` comes from.
    """
    if kind != "live" and not ema_names(state_dict):
        raise UserError(f'"{source}" holds no averaged weights; choose the live ones')
    return dict(state_dict) if kind == "both" else without_ema(state_dict, kind == "ema")


def _begins(name: str, prefixes: tuple[str, ...]) -> bool:
    return name.startswith(prefixes)


def _check_shapes(own: Mapping[str, Tensor], given: Mapping[str, Tensor], model: str, where: str) -> None:
    wrong = [
        name
        for name, value in given.items()
        if value.shape != own[name].shape and value.numel() * own[name].numel() != 1
    ]
    if wrong:
        first = wrong[0]
        raise UserError(
            f"{where} is a foreign checkpoint: {len(wrong)} of its shapes differ from {model}'s, "
            f"first {printable(first)}: {tuple(given[first].shape)}, expected {tuple(own[first].shape)}; "
            "use the configuration that belongs to it"
        )


def _check_complete(module: nn.Module, missing: set[str], ignored: tuple[str, ...], where: str) -> None:
    optional = (*ignored, *LOSS_PREFIXES)
    sizes = {name: value.numel() for name, value in module.named_parameters() if not _begins(name, optional)}
    lost = [name for name in sizes if name in missing]
    share = sum(sizes[name] for name in lost) / max(1, sum(sizes.values()))
    if share > MAX_MISSING_SHARE:
        raise UserError(
            f"{where} is a foreign checkpoint: it lacks {share:.1%} of {type(module).__name__}'s parameters "
            f"({len(lost)} names, first {first_names(lost)}); use the configuration that belongs to it"
        )
