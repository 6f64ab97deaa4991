"""Files that are not valid checkpoints: some would run code, some are damaged, some only look like weights.

`hostile` and `damaged` return their bytes by name. A hostile file creates the folder `trap` when its code runs.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import subprocess
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import torch

EXTENSION = 241  # a code of copyreg's extension registry, where the tests put os.mkdir
WEIGHTS = {"first.weight": torch.arange(12.0).reshape(3, 4), "first.bias": torch.zeros(3)}


class Calls:
    """Object whose unpickling calls `function(*args)`."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple[Any, tuple]:
        return self.call


class SetsState:
    """Object whose unpickling passes a folder to create to `__setstate__`."""

    def __init__(self, trap: str) -> None:
        self.trap = trap

    def __setstate__(self, state: dict[str, str]) -> None:
        os.mkdir(state["trap"])


class CreatesAgain:
    """Object whose unpickling passes a folder to create to `__new__`."""

    def __new__(cls, trap: str) -> CreatesAgain:
        os.mkdir(trap)
        return object.__new__(cls)

    @classmethod
    def armed(cls, trap: str) -> CreatesAgain:
        instance = object.__new__(cls)
        instance.trap = trap
        return instance

    def __getnewargs__(self) -> tuple[str]:
        return (self.trap,)


class CreatesAgainByKeyword(CreatesAgain):
    """The same with another pickle instruction."""

    def __getnewargs_ex__(self) -> tuple[tuple, dict[str, str]]:
        return (), {"trap": self.trap}


# -- pickles ---------------------------------------------------------------------------------------------------


def text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def short(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


def pickles(trap: Path) -> dict[str, bytes]:
    """Return pickles that create the folder `trap`, each with other instructions."""
    path, make = str(trap), text(str(trap)) + b"\x85R."  # one argument, call, stop
    code = text(f"__import__('os').mkdir({path!r})")
    imported = b"cbuiltins\ngetattr\ncimportlib\nimport_module\n" + text("os") + b"\x85R" + text("mkdir") + b"\x86R"
    return {
        "GLOBAL": b"\x80\x02cos\nmkdir\n" + make,
        "GLOBAL of posix": b"\x80\x02cposix\nmkdir\n" + make,
        "STACK_GLOBAL": b"\x80\x04" + short("os") + short("mkdir") + b"\x93" + make,
        "INST": b"\x80\x02(" + text(path) + b"ios\nmkdir\n.",
        "OBJ": b"\x80\x02(cos\nmkdir\n" + text(path) + b"o.",
        "EXT1": b"\x80\x02\x82" + bytes([EXTENSION]) + make,
        "EXT2": b"\x80\x02\x83" + struct.pack("<H", EXTENSION) + make,
        "NEWOBJ": pickle.dumps(CreatesAgain.armed(path), protocol=2),
        "NEWOBJ_EX": pickle.dumps(CreatesAgainByKeyword.armed(path), protocol=4),
        "BUILD": pickle.dumps(SetsState(path), protocol=2),
        "BUILD of protocol 4": pickle.dumps(SetsState(path), protocol=4),
        "eval": b"\x80\x02cbuiltins\neval\n" + code + b"\x85R.",
        "exec of Python 2": b"\x80\x02c__builtin__\nexec\n" + code + b"\x85R.",
        "getattr of an import": b"\x80\x02" + imported + make,
        "subprocess": pickle.dumps(Calls(subprocess.check_call, ["mkdir", path]), protocol=2),
        "a call deep inside": pickle.dumps({"state_dict": {"w": [(Calls(os.mkdir, path),)]}}, protocol=2),
        "a call thrown away": b"\x80\x02cos\nmkdir\n" + text(path) + b"\x85R0}.",
        "protocol 0": pickle.dumps(Calls(os.mkdir, path), protocol=0),
    }


def in_zip(pickled: bytes, **records: bytes) -> bytes:
    """Return a pickle inside the archive that torch writes since 1.6."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in {"data.pkl": pickled, "version": b"3\n", **records}.items():
            archive.writestr(f"archive/{name}", content)
    return buffer.getvalue()


def in_old_file(pickled: bytes, keys: tuple[str, ...] = (), magic: int = 0x1950A86A20F9469CFC6C) -> bytes:
    """Return the file format of torch before 1.6."""
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    head = b"".join(pickle.dumps(part, protocol=2) for part in (magic, 1001, system))
    return head + pickled + pickle.dumps(list(keys), protocol=2)


def bare(pickled: bytes) -> bytes:
    return pickled


def saved(content: Any, new: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=new)
    return buffer.getvalue()


def places(trap: Path) -> dict[str, Any]:
    """Return checkpoints of Lightning with a call in one of their entries."""
    call = Calls(os.mkdir, str(trap))
    return {
        "among the weights": {"state_dict": {**WEIGHTS, "x": call}},
        "as a name of the weights": {"state_dict": {**WEIGHTS, call: torch.ones(1)}},
        "in the hyperparameters": {"state_dict": WEIGHTS, "hyper_parameters": {"lr": [call]}},
        "as a key of the callbacks": {"state_dict": WEIGHTS, "callbacks": {call: {}}},
        "in the optimizer": {"state_dict": WEIGHTS, "optimizer_states": [{"state": {0: {"step": call}}}]},
        "in the schedule": {"state_dict": WEIGHTS, "lr_schedulers": [{"_last_lr": (call,)}]},
        "as an attribute of a weight": {"state_dict": {"x": with_attribute(call)}},
    }


def with_attribute(value: Any) -> torch.Tensor:
    tensor = torch.nn.Parameter(torch.ones(1))
    tensor.note = value
    return tensor


def tar(trap: Path) -> bytes:
    """Return the file format of torch before 0.1.10: three pickles in a tar archive."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("storages", "tensors", "pickle"):
            info = tarfile.TarInfo(name)
            content = pickle.dumps(Calls(os.mkdir, str(trap)), protocol=2)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def hostile(trap: Path) -> dict[str, bytes]:
    """Return every file that tries to create the folder `trap`."""
    wrappers = {"zip": in_zip, "old file": in_old_file, "bare pickle": bare}
    files = {
        f"{name} in a {kind}": wrap(pickled)
        for kind, wrap in wrappers.items()
        for name, pickled in pickles(trap).items()
    }
    for where, content in places(trap).items():
        files[f"a call {where}"] = saved(content)
        files[f"a call {where}, old file"] = saved(content, new=False)
    files["tar"] = tar(trap)
    return files


# -- damaged files, and files of another kind ------------------------------------------------------------------


def safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded) if length is None else length) + encoded + data


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def good_safetensors() -> bytes:
    from safetensors.torch import save

    return save(WEIGHTS)


def repacked(compression: int = zipfile.ZIP_STORED, **extra: bytes) -> bytes:
    """Return a valid archive, packed again by another program."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved(WEIGHTS))) as old, zipfile.ZipFile(buffer, "w", compression) as new:
        for record in old.infolist():
            new.writestr(record.filename, old.read(record))
        for name, content in extra.items():
            new.writestr(name, content)
    return buffer.getvalue()


def boasting() -> bytes:
    """Return an archive whose directory claims that its first record is 2 GB long."""
    content = bytearray(saved(WEIGHTS))
    at = content.index(b"PK\x01\x02")
    content[at + 20 : at + 28] = struct.pack("<II", 2**31, 2**31)
    return bytes(content)


def encrypted() -> bytes:
    content = bytearray(repacked())
    at = content.index(b"PK\x01\x02")
    content[at + 8] |= 1
    return bytes(content)


def persistent(identifier: bytes) -> bytes:
    return b"\x80\x02}" + text("w") + identifier + b"Qs."


def tensor(count: int, key: str = "0", old: bool = False) -> bytes:
    """Return the pickle of a dict with one tensor, whose storage claims to hold `count` values."""
    number = b"\x8a\x08" + struct.pack("<q", count)
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu") + number
    storage += b"NtQ" if old else b"tQ"
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00" + number + b"\x85K\x01\x85\x89"
    return b"\x80\x02}" + text("w") + call + b"ccollections\nOrderedDict\n)RtRs."


def damaged() -> dict[str, tuple[bytes, str]]:
    """Return files without code: their bytes, and the expected part of the error."""
    new, old, safe = saved({"state_dict": WEIGHTS}), saved(WEIGHTS, new=False), good_safetensors()
    header, big = {"a": entry([2], 0, 8)}, tensor(2**20, old=True)
    cut = {
        f"{name} of which {length} bytes are left": (content[:length], "")
        for name, content in {"zip": new, "old file": old, "safetensors": safe}.items()
        for length in (1, 4, 9, 60, len(content) // 2, len(content) - 30, len(content) - 1)
    }
    return cut | {
        "empty": (b"", "is empty"),
        "text": (b"hello, this is no checkpoint at all", "is not a checkpoint"),
        "page of a failed download": (b"\n<!DOCTYPE html><html><body>404</body></html>", "web page"),
        "Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        "picture": (b"\x89PNG\r\n\x1a\n" + bytes(100), "is not a checkpoint"),
        "random bytes": (bytes(range(255, 0, -1)) * 9, "is not a checkpoint"),
        "zeros": (bytes(1000), "is not a checkpoint"),
        "gzip": (b"\x1f\x8b\x08\x00" + bytes(100), "is not a checkpoint"),
        "other zip": (other_zip(), "unpack it"),
        "zip of no pickle": (in_zip(b"not a pickle"), "damaged"),
        "zip of an empty pickle": (in_zip(b""), "damaged"),
        "TorchScript": (in_zip(pickle.dumps({}, 2), **{"constants.pkl": b"", "code/x.py": b""}), "TorchScript"),
        "names that lead outside": (repacked(**{"archive/../../etc/cron.d/x": b"x"}), "lead outside"),
        "absolute names": (repacked(**{"/etc/cron.d/x": b"x"}), "lead outside"),
        "a bomb of zeros": (repacked(zipfile.ZIP_DEFLATED, **{"archive/data/9": bytes(5_000_000)}), "compressed"),
        "encrypted": (encrypted(), "encrypted"),
        "a record longer than the file": (boasting(), "a larger size than the file has"),
        "storage that is not there": (in_zip(tensor(3, "7")), "damaged"),
        "storage longer than the file": (in_zip(tensor(2**40), **{"data/0": bytes(12)}), "damaged"),
        "storage of negative size": (in_zip(tensor(-3), **{"data/0": bytes(12)}), "damaged"),
        "old storage longer than memory": (in_old_file(tensor(2**60, old=True), ("0",)), "damaged"),
        "old storage longer than the file": (
            in_old_file(big, ("0",)) + struct.pack("<q", 2**20),
            "damaged",
        ),
        "wrong magic number": (in_old_file(pickle.dumps(WEIGHTS, 2), magic=12345), "magic"),
        "plain pickle": (pickle.dumps({"state_dict": {"a": 1.0}}, protocol=2), "magic"),
        "persistent id in text": (in_zip(b"\x80\x02}" + text("w") + b"P12\ns."), "PERSID"),
        "persistent id of a module": (in_zip(persistent(b"(" + text("module") + b"NNNt")), "could run code"),
        "persistent id that is none": (in_zip(persistent(b"N")), "could run code"),
        "endless text": (in_zip(b"\x80\x02X\xff\xff\xff\xff."), "damaged"),
        "endless nesting": (in_zip(b"\x80\x02" + b"(" * 100_000 + b"."), ""),
        "NumPy scalar of objects": (in_zip(numpy_scalar("O8")), ""),
        "NumPy scalar without its bytes": (in_zip(numpy_scalar("f8")), ""),
        "safetensors, header longer than the file": (safetensors(header, bytes(8), 10**9), "longer than the file"),
        "safetensors, header of 2^63 bytes": (safetensors(header, bytes(8), 2**63), "is not a checkpoint"),
        "safetensors, broken JSON": (safetensors(b'{"a":]'), "damaged"),
        "safetensors, JSON without end": (safetensors(b'{"a":' * 100_000), "damaged"),
        "safetensors, offsets overlap": (safetensors({**header, "b": entry([2], 4, 12)}, bytes(12)), "damaged"),
        "safetensors, offsets beyond the end": (safetensors({"a": entry([2], 800, 808)}, bytes(8)), "damaged"),
        "safetensors, offsets backwards": (safetensors({"a": entry([2], 8, 0)}, bytes(8)), "damaged"),
        "safetensors, negative shape": (safetensors({"a": entry([-2], 0, 8)}, bytes(8)), "damaged"),
        "safetensors, shape overflows": (safetensors({"a": entry([2**62, 2**62], 0, 8)}, bytes(8)), "damaged"),
        "safetensors, shape of other size": (safetensors({"a": entry([3], 0, 8)}, bytes(8)), "damaged"),
        "safetensors, unknown type": (safetensors({"a": entry([2], 0, 8, "F99")}, bytes(8)), "damaged"),
        "safetensors, metadata of numbers": (safetensors({"__metadata__": {"a": [1]}}), "damaged"),
        "safetensors, data nobody names": (safetensors(header, bytes(80)), "damaged"),
        "no state_dict": (saved({"epoch": 3, "global_step": 7}), "it contains: epoch, global_step"),
        "a list": (saved([torch.ones(1)]), "contains a list"),
        "a tensor": (saved(torch.ones(1)), "contains a Tensor"),
        "state_dict without tensors": (saved({"state_dict": {"a": 1}}), "contains no weights"),
        "state_dict that is a list": (saved({"state_dict": [torch.ones(1)]}), "contains no weights"),
        "names that are no text": (saved({"state_dict": {3: torch.ones(1)}}), "contains no weights"),
        "keys with line breaks": (saved({"a\nb\x1b[31m": 1}), "it contains: a?b?[31m"),
        "shapes without values": (saved({"state_dict": {"w": torch.empty(3, device="meta")}}), '"w" has a shape but'),
        "sparse": (saved({"state_dict": {"w": torch.eye(3).to_sparse()}}), '"w" is sparse'),
        "a tensor that fills the memory": (saved({"state_dict": {"w": torch.ones(1).expand(2**45)}}), '"w" repeats'),
    }


def other_zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("model.ckpt", b"\x80")
    return buffer.getvalue()


def numpy_scalar(code: str, data: str = "") -> bytes:
    """Return the pickle of a NumPy scalar of type `code` with the bytes `data`, as Latin-1."""
    state = b"(K\x03" + text("<") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    kind = b"cnumpy\ndtype\n" + text(code) + b"\x89\x88\x87R" + state
    content = b"c_codecs\nencode\n" + text(data) + text("latin1") + b"\x86R"
    return b"\x80\x02cnumpy.core.multiarray\nscalar\n" + kind + content + b"\x86R."
