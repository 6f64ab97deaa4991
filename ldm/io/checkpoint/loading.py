"""Copy weights into a module, and select weights of a state dict: moving averages, or one part of a model.

All parameters must fit: a missing parameter or another shape is an error. Training can start from a part of another
model: parameters whose names start with one of `ignore_keys` keep their initial values and are not checked.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.io.checkpoint.kinds import check_not_foreign
from ldm.io.checkpoint.names import EMA_PREFIX, first_names, log_names, printable, respelled
from ldm.io.checkpoint.reading import read_state_dict
from ldm.io.checkpoint.wrappers import under_own_names

logger = logging.getLogger(__name__)
# Only training uses the weights of a loss. Nothing uses those of a first stage inside a diffusion model.
LOSS_PREFIXES = ("loss.", "first_stage_model.loss.")
# Entries of published files that no model reads: tables of samplers, losses and discriminators.
UNUSED_PREFIXES = ("ddim_", *LOSS_PREFIXES)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# With a larger share of missing parameters, a file belongs to another model, not to an older version of this one.
MAX_MISSING_SHARE = 1e-3


@dataclass(frozen=True)
class LoadReport:
    """Result of `load_weights`: names that the file lacks, and names that the model lacks."""

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()


def load_weights(
    module: nn.Module,
    weights: str | os.PathLike[str] | Mapping[str, Tensor],
    ignore_keys: Iterable[str] = (),
    source: str | None = None,
) -> LoadReport:
    """Copy weights into `module`, convert them to its dtypes, and log every name without a counterpart.

    A log line also names weights with NaN or infinite values. Tables in half precision that `module` has computed from
    its configuration in full precision are not copied.

    Args:
        module: receives the weights; unchanged if they do not fit.
        weights: a file, or a state dict.
        ignore_keys: names that start with one of these are not loaded.
        source: name of the weights in messages (default: the file).

    Raises:
        UserError: as `read_state_dict`; or a shape differs, or more than 0.1 % of the parameters are missing.
    """
    where = source or (f'"{weights}"' if isinstance(weights, str | os.PathLike) else "the given weights")
    state_dict = weights if isinstance(weights, Mapping) else read_state_dict(weights)
    ignored = tuple(ignore_keys)
    own = module.state_dict()
    state_dict = _in_own_spelling(under_own_names(state_dict, own), own)
    selected = {name: value for name, value in state_dict.items() if not name.startswith(ignored)}
    fitting = {name: value for name, value in selected.items() if name in own}
    unexpected = tuple(name for name in selected if name not in own and not name.startswith(UNUSED_PREFIXES))
    missing = tuple(name for name in own if name not in fitting)

    _check_shapes(own, selected, type(module).__name__, where)
    _check_complete(module, set(missing), ignored, where, selected)
    tables = _computed_buffers(module)
    # Scalars may be stored with or without a dimension.
    shaped = {name: value.reshape(own[name].shape) for name, value in fitting.items()}
    rounded = {name for name in tables & shaped.keys() if _is_rounded_copy(shaped[name], own[name])}
    module.load_state_dict({name: value for name, value in shaped.items() if name not in rounded}, strict=False)
    parameters = dict(module.named_parameters())
    known = set() if tables & fitting.keys() else tables  # files of other programs may hold no table
    unnamed = [name for name in missing if name not in known and not name.startswith((*ignored, *UNUSED_PREFIXES))]
    log_names("missing from", where, unnamed)
    log_names("not used of", where, unexpected)
    _warn_if_not_finite({name: value for name, value in fitting.items() if name in parameters}, where)
    return LoadReport(missing, unexpected)


def _computed_buffers(module: nn.Module) -> set[str]:
    """Return the names of buffers that a module computes from its configuration, such as a noise schedule."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, child in module.named_modules()
        for name in getattr(child, "computed_buffers", ())
    }


def _is_rounded_copy(value: Tensor, own: Tensor) -> bool:
    """Return whether `value` is `own` in half precision, to a rounding step.

    A table of the noise schedule loses its first timesteps in half precision: 1 - ᾱ is 0.00085 there, and a rounding
    step of ᾱ 0.0005. The table that the configuration determines is exact.
    """
    if value.dtype not in (torch.float16, torch.bfloat16) or own.dtype not in (torch.float32, torch.float64):
        return False
    info = torch.finfo(value.dtype)
    value, limited = value.to(own), own.clamp(info.min, info.max)  # 1 / ᾱ may exceed the range of float16
    return torch.allclose(value.clamp(info.min, info.max), limited, rtol=info.eps, atol=info.tiny * info.eps)


def _in_own_spelling(state_dict: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    names = respelled(state_dict, own)
    if not names:
        return state_dict
    return {new: value for name, value in state_dict.items() if (new := names.get(name, name)) is not None}


def ema_names(state_dict: Mapping[str, Tensor]) -> dict[str, str]:
    """Map live names to the names of their moving averages, for weights with both in `state_dict`.

    The name of an average is `model_ema.` and the live name inside the averaged module, without dots.
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
    """Return `state_dict` without moving averages; with `use_average` they replace the live weights."""
    averages = ema_names(state_dict) if use_average else {}
    return {name: state_dict[averages.get(name, name)] for name in state_dict if not name.startswith(EMA_PREFIX)}


def part_of(state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the weights with `prefix`, under the names without it; all weights if no name starts with `prefix`."""
    part = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
    return part or dict(state_dict)


def choose_weights(state_dict: Mapping[str, Tensor], kind: str, source: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Select the live weights or their moving averages.

    Args:
        state_dict: the weights.
        kind: "live", "ema" (averages under the live names) or "both" (unchanged).
        source: origin of the weights, for the message.

    Raises:
        UserError: there are no averages.
    """
    if kind != "live" and not ema_names(state_dict):
        raise UserError(f'"{source}" has no averaged weights; choose the live ones')
    return dict(state_dict) if kind == "both" else without_ema(state_dict, kind == "ema")


def _warn_if_not_finite(weights: Mapping[str, Tensor], where: str) -> None:
    """Log the names of weights with NaN or infinite values; reading them takes a third of a second for 10⁹ values."""
    broken = [
        name
        for name, value in weights.items()
        if value.dtype in FLOATS and value.numel() and not all(bound.isfinite() for bound in value.aminmax())
    ]
    if broken:
        logger.warning(
            "weights of %s have values that are not finite: %s; images may fail, use another checkpoint",
            where,
            first_names(broken),
        )


def _check_shapes(own: Mapping[str, Tensor], given: Mapping[str, Tensor], model: str, where: str) -> None:
    wrong = [
        name
        for name, value in given.items()
        if name in own and value.shape != own[name].shape and value.numel() * own[name].numel() != 1
    ]
    if wrong:
        first = wrong[0]
        check_not_foreign({name: value.shape for name, value in given.items()}, where, parts=False)
        raise UserError(
            f"{where} belongs to another model: {len(wrong)} of its shapes differ from {model}'s, "
            f"first {printable(first)}: {tuple(given[first].shape)}, expected {tuple(own[first].shape)}; "
            "use its own configuration"
        )


def _check_complete(
    module: nn.Module, missing: set[str], ignored: tuple[str, ...], where: str, given: Mapping[str, Tensor]
) -> None:
    optional = (*ignored, *LOSS_PREFIXES)
    sizes = {name: value.numel() for name, value in module.named_parameters() if not name.startswith(optional)}
    lost = [name for name in sizes if name in missing]
    share = sum(sizes[name] for name in lost) / max(1, sum(sizes.values()))
    if share <= MAX_MISSING_SHARE:
        return
    check_not_foreign({name: value.shape for name, value in given.items()}, where, parts=False)
    prefixes = _prefixes(lost, given)
    if prefixes:
        raise UserError(
            f"{where} names the weights of {type(module).__name__} with the prefix "
            f"{' or '.join(prefixes)}; save them without it"
        )
    raise UserError(
        f"{where} belongs to another model: it lacks {share:.1%} of {type(module).__name__}'s parameters "
        f"({len(lost)} names, first {first_names(lost)}); use its own configuration"
    )


def _prefixes(lost: Sequence[str], given: Iterable[str]) -> list[str]:
    """Return the prefixes, in quotes, with which all the names in `lost` are among the names in a file."""
    given = set(given)
    ends = {name.removesuffix(lost[0]) for name in given if name.endswith(f".{lost[0]}")}
    return [f'"{printable(end)}"' for end in sorted(ends) if all(end + name in given for name in lost)]
