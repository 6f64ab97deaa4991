"""Reading and writing weights: the only place that opens a checkpoint.

Nothing here ever runs code out of a file: pickles go through `torch.load(weights_only=True)`, and there is
no way round it. What a file is gets decided by its first bytes, never by its name.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.files import atomic_path
from ldm.util import UserError

logger = logging.getLogger(__name__)

# Entries that published files hold for no reader: sampler tables, and losses with their discriminators.
STRAY_PREFIXES = ("ddim_", "loss.")
EMA_PREFIX = "model_ema."
# Above this share of missing parameters a file is another model's, not an older version of this one's.
MAX_MISSING_SHARE = 1e-3
# Lightning 1.x wrote names of its own classes into checkpoints, e.g. as keys of `callbacks`.
_LIGHTNING = ("pytorch_lightning.", "lightning.")

_ZIP, _PICKLE, _MAX_HEADER = b"PK\x03\x04", b"\x80", 100_000_000


class _StandIn:
    """Takes the place of a class that a checkpoint names: accepts any arguments and state, keeps and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _StandIn:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


@dataclass(frozen=True)
class LoadReport:
    """What `load_weights` found: names that the file lacks, and names that the model lacks."""

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Everything a checkpoint holds, on the CPU, memory-mapped where the format allows.

    A safetensors file gives `{"state_dict": tensors, "metadata": strings}`.

    Raises:
        UserError: missing, unreadable, truncated, not a checkpoint, or a pickle that names foreign classes.
    """
    path = Path(path)
    kind = _kind(path)
    if kind == "safetensors":
        return _read_safetensors(path)
    return _read_torch(path, mmap=kind == "zip")


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The weights in a checkpoint, whether it wraps them in `state_dict` or is nothing but weights.

    Raises:
        UserError: as `read_checkpoint`, or there are no weights in it.
    """
    checkpoint = read_checkpoint(path)
    weights = checkpoint.get("state_dict", checkpoint)
    if not isinstance(weights, Mapping):
        weights = {}
    tensors = {str(name): value for name, value in weights.items() if isinstance(value, Tensor)}
    if not tensors:
        keys = ", ".join(map(str, list(checkpoint)[:5])) or "nothing"
        raise UserError(f'"{path}" holds no weights (it holds: {keys}); give a checkpoint with a "state_dict"')
    return tensors


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
    module.load_state_dict(fitting, strict=False)
    _log("missing from", where, [name for name in missing if not _begins(name, (*ignored, *STRAY_PREFIXES))])
    _log("not used of", where, unexpected)
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


def save_safetensors(
    weights: nn.Module | Mapping[str, Tensor],
    path: str | os.PathLike[str],
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write weights as one safetensors file, whole or not at all; tensors that share memory are written apart.

    Args:
        weights: a module or a state dict.
        path: the file; its folder is made when missing.
        metadata: stored as strings in the header.
    """
    from safetensors.torch import save_file

    state_dict = weights.state_dict() if isinstance(weights, nn.Module) else weights
    seen: set[int] = set()
    tensors = {}
    for name, value in state_dict.items():
        tensor = value.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    strings = {str(key): str(value) for key, value in (metadata or {}).items()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, {"format": "pt", **strings})


def _kind(path: Path) -> str:
    """`"safetensors"`, `"zip"` (torch since 1.6) or `"pickle"` (torch before), by content."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(64)
    except FileNotFoundError:
        raise UserError(f'there is no checkpoint "{path}"; check the path, or download it first') from None
    except OSError as error:
        raise UserError(f'cannot read the checkpoint "{path}": {error.strerror}; give a readable file') from None
    if head.startswith(_ZIP):
        return "zip"
    header = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and header < _MAX_HEADER:
        if size < 8 + header:
            raise _truncated(path)
        return "safetensors"
    if head.startswith(_PICKLE):
        return "pickle"
    if head.startswith(b"version https://git-lfs"):
        raise UserError(f'"{path}" is a Git LFS pointer, not the file itself; fetch it with "git lfs pull"')
    what = "is empty" if size == 0 else "is a web page" if head.lstrip()[:1] == b"<" else "is not a checkpoint"
    raise UserError(f'"{path}" {what}; give a file written by torch.save or safetensors, or download it again')


def _truncated(path: Path) -> UserError:
    return UserError(f'the checkpoint "{path}" is truncated or damaged; download or copy it again')


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        return {"state_dict": load_file(path), "metadata": header.get("__metadata__", {})}
    except (SafetensorError, ValueError, AttributeError, OSError) as error:
        logger.debug("%s: %s", path, error)
        raise _truncated(path) from None


def _read_torch(path: Path, mmap: bool) -> dict[str, Any]:
    try:
        # Only a path can be mapped; but torch judges paths by their suffix, and open files by their content.
        with torch.serialization.safe_globals(_stand_ins(path) if mmap else []), path.open("rb") as file:
            mmap = mmap and path.suffix != ".safetensors"
            checkpoint = torch.load(path if mmap else file, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise _refused(path, str(error)) from None
    except Exception as error:  # a damaged file fails in as many ways as it has bytes
        logger.debug("%s: %s: %s", path, type(error).__name__, error)
        raise _truncated(path) from None
    if not isinstance(checkpoint, Mapping):
        what = type(checkpoint).__name__
        raise UserError(f'"{path}" holds a {what}, not a checkpoint; give a file with a "state_dict" of weights')
    return dict(checkpoint)


def _stand_ins(path: Path) -> list[tuple[type, str]]:
    """An inert class for each of Lightning's that the file names, for one call of `torch.load`."""
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    return [(type(name.rpartition(".")[2], (_StandIn,), {}), name) for name in names if name.startswith(_LIGHTNING)]


def _refused(path: Path, reason: str) -> UserError:
    """The error for a pickle that torch would not open without running code out of it."""
    logger.debug("%s: %s", path, reason)
    named = re.search(r"GLOBAL ([\w.]+)", reason)
    if named is None:
        return UserError(
            f'"{path}" cannot be read as a checkpoint: it is damaged or no file of weights; give another file'
        )
    return UserError(
        f'"{path}" is refused: besides weights it holds "{named[1]}", and opening that could run code; '
        "save its state_dict alone, or as safetensors, where you trust the file"
    )


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
            f"first {first}: {tuple(given[first].shape)}, expected {tuple(own[first].shape)}; "
            "use the configuration that belongs to it"
        )


def _check_complete(module: nn.Module, missing: set[str], ignored: tuple[str, ...], where: str) -> None:
    optional = (*ignored, "loss.")  # a loss's own weights serve training alone
    sizes = {name: value.numel() for name, value in module.named_parameters() if not _begins(name, optional)}
    lost = [name for name in sizes if name in missing]
    share = sum(sizes[name] for name in lost) / max(1, sum(sizes.values()))
    if share > MAX_MISSING_SHARE:
        raise UserError(
            f"{where} is a foreign checkpoint: it lacks {share:.1%} of {type(module).__name__}'s parameters "
            f"({len(lost)} names, first {_first(lost)}); use the configuration that belongs to it"
        )


def _first(names: Iterable[str], count: int = 4) -> str:
    names = list(names)
    return ", ".join(names[:count]) + (", …" if len(names) > count else "")


def _log(what: str, where: str, names: Iterable[str]) -> None:
    names = list(names)
    if names:
        logger.warning("%d names %s %s: %s", len(names), what, where, _first(names))
