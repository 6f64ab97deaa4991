"""Read checkpoints. All checkpoints of models are read here.

Only the weights of VGG16 and CLIP are read elsewhere, by torchvision and transformers. Reading never runs code from a
file: `torch.load(weights_only=True)` loads pickles. The first bytes of a file decide its format, not its name.
"""

from __future__ import annotations

import logging
import os
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.io.checkpoint.kinds import check_not_foreign
from ldm.io.checkpoint.names import first_names, log_names, printable
from ldm.io.checkpoint.wrappers import unwrapped

logger = logging.getLogger(__name__)
# Lightning 1.x wrote names of its own classes into checkpoints, e.g. as keys of `callbacks`.
_LIGHTNING = ("pytorch_lightning.", "lightning.", "lightning_fabric.")
_NUMPY_SCALARS = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
_ZIP, _PICKLE, _TAR = b"PK\x03\x04", b"\x80", b"ustar"
_MAX_HEADER = 1 << 48  # bytes in the header of a safetensors file; the first bytes of a text file state more
# Largest size of a tensor that repeats its stored values (stride 0); larger ones could exhaust the memory.
_MAX_EXPANDED_BYTES = 1 << 20
# Entries of a checkpoint that hold the weights. The first one wins; several of the others are an error.
HOLDERS = (
    "state_dict",
    "model_state_dict",
    "model",
    "module",
    "network",
    "net",
    "weights",
    "params",
    "ema",
    "ema_state_dict",
    "model_ema",
    "params_ema",
)
MAX_DEPTH = 3  # of entries in entries


class _StandIn:
    """Inert replacement of a class that a checkpoint names: accepts any arguments and state, and ignores them."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _StandIn:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _DtypeStandIn(_StandIn):
    """Replacement of `numpy.dtype` that stores the type code, such as f8, and the byte order."""

    def __init__(self, code: Any = "", *rest: Any) -> None:
        self.code, self.order = str(code), "<"

    def __setstate__(self, state: Any) -> None:
        self.order = ">" if isinstance(state, tuple) and ">" in state[1:2] else "<"


class _ParameterDict(dict):
    """Replacement of `torch.nn.ParameterDict`, which files of textual inversions contain: its parameters by name."""

    def __setstate__(self, state: Any) -> None:
        parameters = state.get("_parameters") if isinstance(state, dict) else None
        self.update(parameters if isinstance(parameters, Mapping) else {})


def _scalar(dtype: Any = None, data: Any = b"") -> int | float | bool | None:
    """Replacement of the constructor of NumPy scalars, which published checkpoints have in learning-rate schedules."""
    import numpy as np

    if not isinstance(dtype, _DtypeStandIn) or not isinstance(data, bytes):
        return None
    if not re.fullmatch("[biuf][1248]", dtype.code):
        return None
    return np.frombuffer(data, dtype.order + dtype.code, count=1)[0].item()


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the content of a checkpoint to the CPU, memory-mapped if the format allows it.

    A safetensors file returns `{"state_dict": tensors, "metadata": strings}`.

    Raises:
        UserError: the file is missing, unreadable, truncated or not a checkpoint; or its pickle names other classes
            than those of weights.
    """
    path = Path(path)
    file_format = _file_format(path)
    if file_format == "safetensors":
        return _read_safetensors(path)
    return _read_torch(path, mmap=file_format == "zip")


def read_state_dict(path: str | os.PathLike[str], as_written: bool = False) -> dict[str, Tensor]:
    """Read the weights of a checkpoint.

    They are its entry `state_dict`, another one of `HOLDERS`, or the whole file. Entries among the weights that are not
    tensors are dropped and logged.

    Args:
        path: the file, or a folder in the form of diffusers, whose weights are returned under our names.
        as_written: read the entry `state_dict` or the whole file only, and keep all names, as resuming a run needs.
            By default the parts of names that wrappers insert, such as `module.`, are left out and logged.

    Raises:
        UserError: as `read_checkpoint`; or there are no weights, several sets of them, or some are not plain tensors.
    """
    if Path(path).is_dir() and not as_written:
        from ldm.io.diffusers import files, pipeline

        if files.is_folder(Path(path)):
            return pipeline.read_weights(Path(path))
    checkpoint = read_checkpoint(path)
    holder, weights = _choose_weights(path, checkpoint, HOLDERS[:1] if as_written else HOLDERS)
    if holder not in ("", "state_dict"):
        logger.info('reading the weights of "%s" from its entry "%s"', path, holder)
    tensors = _tensors(weights)
    for name, tensor in tensors.items():
        fault = _tensor_fault(tensor)
        if fault is not None:
            raise UserError(f'"{path}" is refused: "{printable(name)}" {fault}; save its weights as plain tensors')
    if holder:
        log_names(
            "not tensors in the weights of", f'"{path}"', [printable(name) for name in weights if name not in tensors]
        )
    return tensors if as_written else _unwrapped(path, tensors)


@dataclass(frozen=True)
class Header:
    """Names and shapes of the weights in a checkpoint, and the metadata of a safetensors file."""

    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read names and shapes of the weights in a checkpoint; the values stay on disk if the format allows it.

    Raises:
        UserError: as `read_state_dict`.
    """
    path = Path(path)
    if _file_format(path) != "safetensors":
        _, weights = _choose_weights(path, read_checkpoint(path), HOLDERS)
        return Header(_unwrapped_shapes({name: tuple(value.shape) for name, value in _tensors(weights).items()}), {})
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (SafetensorError, ValueError, AttributeError, OSError) as error:
        raise _damaged(path, error) from None
    return Header(_unwrapped_shapes(shapes), metadata)


def _unwrapped_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    names = unwrapped(shapes)
    return {names[name]: shape for name, shape in shapes.items()}


def _choose_weights(
    path: str | os.PathLike[str], checkpoint: Mapping[str, Any], holders: Sequence[str]
) -> tuple[str, Mapping[Any, Any]]:
    """Return the weights in a checkpoint and the entry that holds them, "" for the whole checkpoint.

    Raises:
        UserError: there are no weights, or several sets of them.
    """
    found = _find_weights(checkpoint, holders, MAX_DEPTH if len(holders) > 1 else 1)
    if "state_dict" in checkpoint:  # tensors beside it are not weights
        found.pop("", None)
    if not found:
        check_not_foreign({name: () for name in checkpoint if isinstance(name, str)}, f'"{path}"', parts=False)
        keys = first_names(map(printable, checkpoint)) or "nothing"
        raise UserError(f'"{path}" contains no weights (it contains: {keys}); give a checkpoint with a "state_dict"')
    if len(found) > 1:
        names = ", ".join(f'"{name}"' for name in found)
        raise UserError(
            f'"{path}" contains several sets of weights, {names}; save one of them alone, under "state_dict"'
        )
    ((holder, weights),) = found.items()
    return holder, weights


def _find_weights(content: Any, holders: Sequence[str], depth: int) -> dict[str, Mapping[Any, Any]]:
    """Return the sets of weights in a checkpoint by their dotted position; that of the whole checkpoint is "".

    A `state_dict` is the only set, and a checkpoint with entries that hold weights is not a set itself.

    Args:
        content: the checkpoint.
        holders: entries that may hold weights.
        depth: number of entries inside each other.
    """
    if not isinstance(content, Mapping):
        return {}
    found: dict[str, Mapping[Any, Any]] = {}
    for holder in holders if depth else ():
        inner = _find_weights(content.get(holder), holders, depth - 1)
        found |= {f"{holder}.{name}" if name else holder: weights for name, weights in inner.items()}
        if holder == "state_dict" and found:
            break
    return found or ({"": content} if _tensors(content) else {})


def _tensors(weights: Mapping[Any, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in weights.items() if isinstance(name, str) and isinstance(value, Tensor)}


def _unwrapped(path: str | os.PathLike[str], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights without the parts of names that wrappers insert, and log an example."""
    names = unwrapped(tensors)
    changed = [name for name in tensors if names[name] != name]
    if changed:
        first = changed[0]
        logger.info(
            'the weights of "%s" are those of a wrapped model: %d names are read without its prefix, e.g. %s as %s',
            path,
            len(changed),
            printable(first),
            printable(names[first]),
        )
    return {names[name]: value for name, value in tensors.items()}


def training_step(path: str | os.PathLike[str]) -> int:
    """Return the training step at which a checkpoint was written; 0 if it states none, as folders of diffusers do.

    Raises:
        UserError: as `read_checkpoint`.
    """
    if Path(path).is_dir():
        return 0
    content = read_checkpoint(path)
    metadata = content.get("metadata")
    step = content.get("global_step", metadata.get("step") if isinstance(metadata, Mapping) else None)
    if isinstance(step, str):  # safetensors stores metadata as text
        step = int(step) if step.isdecimal() else None
    return step if isinstance(step, int) and step >= 0 else 0


def _tensor_fault(tensor: Tensor) -> str | None:
    """Return why a tensor cannot be a weight, or None."""
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
        return "is sparse, nested or quantized"
    if tensor.is_meta:
        return "has a shape but no values"
    size = tensor.numel() * tensor.element_size()
    if size > max(_MAX_EXPANDED_BYTES, tensor.untyped_storage().nbytes()):
        return "repeats a few stored values to a size that could exhaust the memory"
    return None


def _file_format(path: Path) -> str:
    """Return the format by content: "safetensors", "zip" (torch since 1.6) or "pickle" (torch before)."""
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise UserError(f'cannot read the checkpoint "{path}": it is not a regular file; give a readable file')
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
        f'"{path}" {_describe_content(head)}; give a file written by torch.save or safetensors, or download it again'
    )


def _describe_content(head: bytes) -> str:
    """Return what a file is that is not a checkpoint, by its first bytes."""
    if not head:
        return "is empty"
    if head.lstrip()[:1] == b"<":
        return "is a web page"
    if head[257:262] == _TAR:
        return "is a tar archive, as written by torch before 0.1.10 or packed for download"
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
        # torch maps only paths into memory. It treats paths by suffix, and open files by content.
        with warnings.catch_warnings(), path.open("rb") as file:
            warnings.simplefilter("ignore")  # the error below reports the fault
            names = torch.serialization.get_unsafe_globals_in_checkpoint(file) if mmap else _globals(file)
            file.seek(0)
            mmap = mmap and path.suffix != ".safetensors"
            with torch.serialization.safe_globals(_stand_ins(names)):
                checkpoint = torch.load(path if mmap else file, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise _refused(path, str(error)) from None
    except EOFError:
        raise _damaged(path, "it ends too early") from None
    except Exception as error:  # damaged files raise many types of errors
        raise _damaged(path, error) from None
    if not isinstance(checkpoint, Mapping):
        kind = type(checkpoint).__name__
        raise UserError(f'"{path}" contains a {kind}, not a checkpoint; give a file with a "state_dict" of weights')
    return dict(checkpoint)


def _check_zip(path: Path) -> None:
    """Raise an error if an archive is not one that `torch.save` writes: uncompressed records below one folder.

    Raises:
        UserError: the archive is damaged or of another kind.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError):
        raise _damaged(path, "the list of contents at its end is missing or broken") from None
    names = [PurePosixPath(record.filename) for record in records]
    if any(name.name == "constants.pkl" for name in names):
        fault = "is a TorchScript program, which can only be executed"
    elif not any(name.name == "data.pkl" and len(name.parts) == 2 for name in names):
        fault = "is a zip archive without weights; if the download was packed, unpack it"
    elif any(name.is_absolute() or ".." in name.parts for name in names) or len(set(names)) < len(names):
        fault = "is refused: names in its archive lead outside of it, or occur twice"
    elif any(record.compress_type != zipfile.ZIP_STORED or record.flag_bits & 1 for record in records):
        fault = "is refused: its content is compressed or encrypted, unlike that of torch.save"
    elif sum(record.file_size for record in records) > path.stat().st_size:
        fault = "is refused: its archive states a larger size than the file has"
    else:
        return
    raise UserError(f'"{path}" {fault}; give a file written by torch.save or safetensors')


def _globals(file: IO[bytes]) -> set[str]:
    """Return the names in a file of torch before 1.6, which consists of four pickles and then the values."""
    names: set[str] = set()
    with suppress(ValueError):  # a broken pickle; torch reports it
        for _ in range(4):
            names |= {str(arg).replace(" ", ".") for op, arg, _ in pickletools.genops(file) if op.name == "GLOBAL"}
    return names


def _stand_ins(names: Iterable[str]) -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """Return inert replacements of Lightning's classes and NumPy's scalars in a file, for one call of `torch.load`."""
    found: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = []
    for name in names:
        if name.startswith(_LIGHTNING) and name.endswith(".AttributeDict"):  # the type of hyperparameters
            found.append((dict, name))
        elif name.startswith(_LIGHTNING):
            found.append((type(name.rpartition(".")[2], (_StandIn,), {}), name))
        elif name in _NUMPY_SCALARS:
            found.append((_scalar, name))
        elif name == "numpy.dtype":
            found.append((_DtypeStandIn, name))
        elif name == "torch.nn.modules.container.ParameterDict":
            found.append((_ParameterDict, name))
    return found


def _refused(path: Path, reason: str) -> UserError:
    """Return the error for a pickle that torch does not load, because loading it could run code."""
    logger.debug("%s: %s", path, reason)
    named = re.search(r"GLOBAL ([\w.]+)", reason)
    instruction = re.search(r"Unsupported operand (\d+)", reason)
    opcodes = {opcode.code: opcode.name for opcode in pickletools.opcodes}
    if named is not None:
        content = f'"{printable(named[1])}", and loading that could run code'
    elif instruction is not None and chr(int(instruction[1])) in opcodes:
        content = f"the pickle instruction {opcodes[chr(int(instruction[1]))]}, which weights never need"
    elif re.search(r"call reduce|create new object|Can only build|persistent_load|persistent id", reason):
        content = "objects that could run code when loaded"
    else:
        return UserError(
            f'"{path}" cannot be read as a checkpoint: it is damaged or not a file of weights; give another file'
        )
    return UserError(
        f'"{path}" is refused: besides weights it contains {content}; '
        "if you trust the file, save its state_dict alone, or as safetensors"
    )
