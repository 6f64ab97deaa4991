"""Write weights as checkpoints of `torch.save` or safetensors files, completely or not at all."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.io.checkpoint.integrity import append_hash
from ldm.io.checkpoint.names import printable
from ldm.io.files import atomic_path

logger = logging.getLogger(__name__)


def cast(name: str, value: Tensor, dtype: torch.dtype, remedy: str) -> Tensor:
    """Convert `value` to `dtype`.

    Args:
        name: name of the value in the message.
        value: tensor of any shape.
        dtype: floating-point type.
        remedy: what the user can do, for the message.

    Raises:
        UserError: a finite number overflows in `dtype`.
    """
    converted = value.detach().to(dtype)
    if (value.isfinite() & ~converted.isfinite()).any():
        raise UserError(f"{printable(name)} does not fit into {str(dtype).removeprefix('torch.')}; {remedy}")
    return converted


def save_checkpoint(
    weights: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    metadata: Mapping[str, Any] | None = None,
    replace: bool = True,
) -> None:
    """Write weights as a checkpoint of `torch.save`, under `state_dict`.

    Args:
        weights: a state dict.
        path: the file; a missing folder is created.
        metadata: stored beside the weights; a "step" becomes Lightning's `global_step`.
        replace: replace an existing file.
    """
    rest = dict(metadata or {})
    step = {"global_step": rest.pop("step")} if "step" in rest else {}
    save_atomically({"state_dict": dict(weights), **step, "metadata": rest}, path, replace)


def save_atomically(content: Mapping[str, Any], path: str | os.PathLike[str], replace: bool = True) -> None:
    """Write `content` with `torch.save` and a hash, completely or not at all; a missing folder is created.

    Args:
        content: anything that `torch.save` stores.
        path: the file.
        replace: replace an existing file.

    Raises:
        UserError: the file cannot be written, or exists and may not be replaced.
        DiskFullError: the disk is full.
    """
    with atomic_path(path, replace, sync=True) as temporary:
        try:
            torch.save(content, temporary)
        except RuntimeError as error:  # torch reports a full disk this way
            raise _file_error(temporary, error) from error
        append_hash(temporary)


def _file_error(path: Path, error: Exception) -> OSError:
    """Return the error of the file system that made writing `path` fail with `error`, which may not say it."""
    try:
        with path.open("ab") as file:
            file.write(bytes(1 << 20))
    except OSError as reason:
        return reason
    return OSError(str(error).splitlines()[0])


def save_safetensors(
    weights: nn.Module | Mapping[str, Tensor],
    path: str | os.PathLike[str],
    metadata: Mapping[str, Any] | None = None,
    replace: bool = True,
) -> None:
    """Write weights as one safetensors file; tensors that share memory are written separately.

    Args:
        weights: a module or a state dict.
        path: the file; a missing folder is created.
        metadata: stored as strings in the header.
        replace: replace an existing file.
    """
    from safetensors import SafetensorError
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
    with atomic_path(path, replace, sync=True) as temporary:
        temporary.touch()
        default_mode = temporary.stat().st_mode
        try:
            save_file(tensors, temporary, {"format": "pt", **strings})
        except SafetensorError as error:  # safetensors reports a full disk this way
            raise _file_error(temporary, error) from error
        temporary.chmod(default_mode)  # safetensors creates files that only their owner can read
