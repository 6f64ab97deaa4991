"""Read checkpoints: the only place that opens a file of weights.

Reading never runs code from the file: pickles go through `torch.load(weights_only=True)`. The first bytes of a file
decide its format, never its name.
"""

from __future__ import annotations

import logging
import os
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import IO, Any

import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.io.checkpoint.names import first_names, log_names, printable

logger = logging.getLogger(__name__)
# Lightning 1.x wrote names of its own classes into checkpoints, e.g. as keys of `callbacks`.
_LIGHTNING = ("pytorch_lightning.", "lightning.", "lightning_fabric.")
_NUMPY_SCALARS = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
_ZIP, _PICKLE, _TAR = b"PK\x03\x04", b"\x80", b"ustar"
_MAX_HEADER = 1 << 48  # of safetensors: a file of text would claim more
# Below this a tensor that repeats what it stores is an oddity; above, an attempt to fill the memory.
_MAX_EXPANDED_BYTES = 1 << 20


class _StandIn:
    """Takes the place of a class that a checkpoint names: accepts any arguments and state, keeps and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _StandIn:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _NumberType(_StandIn):
    """Takes the place of `numpy.dtype`: remembers the code of a number, such as f8, and its byte order."""

    def __init__(self, code: Any = "", *rest: Any) -> None:
        self.code, self.order = str(code), "<"

    def __setstate__(self, state: Any) -> None:
        self.order = ">" if isinstance(state, tuple) and ">" in state[1:2] else "<"


def _number(kind: Any = None, data: Any = b"") -> int | float | bool | None:
    """Takes the place of what makes NumPy's scalars, which learning-rate schedules left in published checkpoints."""
    import numpy as np

    if not isinstance(kind, _NumberType) or not isinstance(data, bytes) or not re.fullmatch("[biuf][1248]", kind.code):
        return None
    return np.frombuffer(data, kind.order + kind.code, count=1)[0].item()


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

    What stands among the weights and is none is left out, with a line in the log.

    Raises:
        UserError: as `read_checkpoint`; or there are no weights in it, or some that nothing here can use.
    """
    checkpoint = read_checkpoint(path)
    weights = checkpoint.get("state_dict", checkpoint)
    if not isinstance(weights, Mapping):
        weights = {}
    tensors = {name: value for name, value in weights.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        keys = first_names(map(printable, checkpoint)) or "nothing"
        raise UserError(f'"{path}" holds no weights (it holds: {keys}); give a checkpoint with a "state_dict"')
    for name, tensor in tensors.items():
        flaw = _flaw(tensor)
        if flaw is not None:
            raise UserError(f'"{path}" is refused: "{printable(name)}" {flaw}; save its weights as plain tensors')
    if weights is not checkpoint:
        log_names(
            "not tensors in the weights of", f'"{path}"', [printable(name) for name in weights if name not in tensors]
        )
    return tensors


def training_step(path: str | os.PathLike[str]) -> int:
    """After how many steps of training a checkpoint was written; 0 where it does not say.

    Raises:
        UserError: as `read_checkpoint`.
    """
    content = read_checkpoint(path)
    metadata = content.get("metadata")
    step = content.get("global_step", metadata.get("step") if isinstance(metadata, Mapping) else None)
    if isinstance(step, str):  # as safetensors keeps it
        step = int(step) if step.isdecimal() else None
    return step if isinstance(step, int) and step >= 0 else 0


def _flaw(tensor: Tensor) -> str | None:
    """Why a tensor cannot be a weight; None when it can."""
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
        return "is sparse, nested or quantized"
    if tensor.is_meta:
        return "has a shape but no values"
    size = tensor.numel() * tensor.element_size()
    if size > max(_MAX_EXPANDED_BYTES, tensor.untyped_storage().nbytes()):
        return "repeats a few stored values to a size that would fill the memory"
    return None


def _kind(path: Path) -> str:
    """`"safetensors"`, `"zip"` (torch since 1.6) or `"pickle"` (torch before), by content."""
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise UserError(f'cannot read the checkpoint "{path}": it is no ordinary file; give a readable file')
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(512)
    except FileNotFoundError:
        raise UserError(f'there is no checkpoint "{path}"; check the path, or download it first') from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f'cannot read the checkpoint "{path}": {reason}; give a readable file') from None
    if head.startswith(_ZIP):
        return "zip"
    header = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and header < _MAX_HEADER:
        if size < 8 + header:
            raise _damaged(path, "its header is longer than the file")
        return "safetensors"
    if head.startswith(_PICKLE):
        return "pickle"
    if head.startswith(b"version https://git-lfs"):
        raise UserError(f'"{path}" is a Git LFS pointer, not the file itself; fetch it with "git lfs pull"')
    raise UserError(
        f'"{path}" {_what_else(head)}; give a file written by torch.save or safetensors, or download it again'
    )


def _what_else(head: bytes) -> str:
    """What a file is that is no checkpoint."""
    if not head:
        return "is empty"
    if head.lstrip()[:1] == b"<":
        return "is a web page"
    if head[257:262] == _TAR:
        return "is a tar archive, as torch wrote before 0.1.10 or as downloads come packed"
    return "is not a checkpoint"


def _damaged(path: Path, reason: object) -> UserError:
    lines = str(reason).strip().splitlines() or [type(reason).__name__]
    return UserError(
        f'the checkpoint "{path}" is truncated or damaged ({printable(lines[0])}); download or copy it again'
    )


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return {
                "state_dict": {name: file.get_tensor(name) for name in file.keys()},  # noqa: SIM118
                "metadata": file.metadata() or {},
            }
    except (SafetensorError, ValueError, AttributeError, OSError) as error:
        raise _damaged(path, error) from None


def _read_torch(path: Path, mmap: bool) -> dict[str, Any]:
    if mmap:
        _check_zip(path)
    try:
        # Only a path can be mapped; but torch judges paths by their suffix, and open files by their content.
        with warnings.catch_warnings(), path.open("rb") as file:
            warnings.simplefilter("ignore")  # what is wrong with the file is told once, below
            names = torch.serialization.get_unsafe_globals_in_checkpoint(file) if mmap else _globals(file)
            file.seek(0)
            mmap = mmap and path.suffix != ".safetensors"
            with torch.serialization.safe_globals(_stand_ins(names)):
                checkpoint = torch.load(path if mmap else file, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise _refused(path, str(error)) from None
    except EOFError:
        raise _damaged(path, "it ends too early") from None
    except Exception as error:  # a damaged file fails in as many ways as it has bytes
        raise _damaged(path, error) from None
    if not isinstance(checkpoint, Mapping):
        what = type(checkpoint).__name__
        raise UserError(f'"{path}" holds a {what}, not a checkpoint; give a file with a "state_dict" of weights')
    return dict(checkpoint)


def _check_zip(path: Path) -> None:
    """Make sure that an archive is one that `torch.save` writes: its records as they are, one root, no surprises.

    Raises:
        UserError: it is not.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError):
        raise _damaged(path, "the list of its contents, which stands at its end, is missing or broken") from None
    names = [PurePosixPath(record.filename) for record in records]
    if any(name.name == "constants.pkl" for name in names):
        flaw = "is a TorchScript program, which would have to be run"
    elif not any(name.name == "data.pkl" and len(name.parts) == 2 for name in names):
        flaw = "is a zip archive without weights; if it was downloaded packed, unpack it"
    elif any(name.is_absolute() or ".." in name.parts for name in names) or len(set(names)) < len(names):
        flaw = "is refused: names in its archive lead outside of it, or are there twice"
    elif any(record.compress_type != zipfile.ZIP_STORED or record.flag_bits & 1 for record in records):
        flaw = "is refused: its contents are compressed or encrypted, as torch.save never does"
    elif sum(record.file_size for record in records) > path.stat().st_size:
        flaw = "is refused: its archive claims to hold more than the file is long"
    else:
        return
    raise UserError(f'"{path}" {flaw}; give a file written by torch.save or safetensors')


def _globals(file: IO[bytes]) -> set[str]:
    """What a file older than torch 1.6 names: it is four pickles, then the numbers."""
    names: set[str] = set()
    with suppress(ValueError):  # a broken pickle; torch says more about it
        for _ in range(4):
            names |= {arg.replace(" ", ".") for op, arg, _ in pickletools.genops(file) if op.name == "GLOBAL"}
    return names


def _stand_ins(names: Iterable[str]) -> list[tuple[Callable[..., Any], str]]:
    """Something inert for each of Lightning's classes and NumPy's scalars that a file names, for one `torch.load`."""
    found: list[tuple[Callable[..., Any], str]] = []
    for name in names:
        if name.startswith(_LIGHTNING) and name.endswith(".AttributeDict"):  # how it keeps hyperparameters
            found.append((dict, name))
        elif name.startswith(_LIGHTNING):
            found.append((type(name.rpartition(".")[2], (_StandIn,), {}), name))
        elif name in _NUMPY_SCALARS:
            found.append((_number, name))
        elif name == "numpy.dtype":
            found.append((_NumberType, name))
    return found


def _refused(path: Path, reason: str) -> UserError:
    """The error for a pickle that torch would not open without running code out of it."""
    logger.debug("%s: %s", path, reason)
    named = re.search(r"GLOBAL ([\w.]+)", reason)
    instruction = re.search(r"Unsupported operand (\d+)", reason)
    if named is not None:
        held = f'"{printable(named[1])}", and opening that could run code'
    elif instruction is not None and chr(int(instruction[1])) in pickletools.code2op:
        held = f"the pickle instruction {pickletools.code2op[chr(int(instruction[1]))].name}, which weights never need"
    elif re.search(r"call reduce|create new object|Can only build|persistent_load|persistent id", reason):
        held = "objects whose opening could run code"
    else:
        return UserError(
            f'"{path}" cannot be read as a checkpoint: it is damaged or no file of weights; give another file'
        )
    return UserError(
        f'"{path}" is refused: besides weights it holds {held}; '
        "save its state_dict alone, or as safetensors, where you trust the file"
    )
