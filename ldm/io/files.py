"""Write files and folders atomically, reserve names for new ones, and compute hashes of files."""

from __future__ import annotations

import errno
import hashlib
import itertools
import logging
import os
import re
import secrets
import shutil
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ldm.errors import DiskFullError, UserError

logger = logging.getLogger(__name__)


@contextmanager
def atomic_path(path: str | os.PathLike[str], replace: bool = True, sync: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`; the file written there becomes `path` when the block succeeds.

    Missing parent folders are created. When the block fails, the temporary file is deleted and `path` is unchanged.

    Args:
        path: the file.
        replace: replace an existing file; False never does, even if it was created while the block ran.
        sync: let the file reach the disk before its name does, so that a loss of power cannot leave it incomplete.

    Raises:
        UserError: the folder cannot be created or written to, or `path` exists and may not be replaced.
        DiskFullError: the disk is full.
    """
    with _temporary_file(Path(path)) as temporary:
        yield temporary
        if sync:
            _sync(temporary)
        if replace:
            os.replace(temporary, path)
        else:
            _rename_to_new(temporary, Path(path))
        if sync:
            with suppress(OSError):  # some systems cannot open folders
                _sync(Path(path).parent)


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_temporary_files(folder: Path) -> None:
    """Remove what processes that were killed while they wrote files to `folder` have left there.

    No other process may be writing to the folder.
    """
    for path in folder.glob(".*.tmp") if folder.is_dir() else ():
        if re.fullmatch(r"\.\d+-[0-9a-f]{8}\.tmp", path.name) and path.is_file():
            with suppress(OSError):
                path.unlink()


def write_new(paths: Iterable[Path], write: Callable[[Path], object]) -> Path:
    """Write a file completely under the first of `paths` that does not exist, and return that path.

    No file is ever replaced, also if several processes write to one folder at the same time.

    Args:
        paths: paths in one folder, in order of preference. A missing folder is created.
        write: writes the content to the path that it is called with.

    Raises:
        FileExistsError: all paths exist.
        UserError: the folder cannot be created or written to.
        DiskFullError: the disk is full.
    """
    candidates = iter(paths)
    first = next(candidates)
    with _temporary_file(first) as temporary:
        write(temporary)
        for path in itertools.chain([first], candidates):
            try:
                _rename_to_new(temporary, path)
                return path
            except FileExistsError:
                continue
            except OSError as error:
                raise write_error(path, error) from error
    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(first))


def variants(path: Path) -> Iterator[Path]:
    """Yield names for a new file: `path`, then `name-1.suffix`, `name-2.suffix` and so on."""
    yield path
    for number in itertools.count(1):
        yield path.with_name(f"{path.stem}-{number}{path.suffix}")


def folded_name(name: str) -> str:
    """Return `name` in a form that is equal for names that a file system may treat as one.

    Some file systems ignore case, and the difference between precomposed and decomposed characters.
    """
    return unicodedata.normalize("NFC", name).lower()


@contextmanager
def _temporary_file(target: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `target`, which is deleted afterwards if it still exists."""
    temporary = _temporary_name(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
    except OSError as error:
        raise write_error(target, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _temporary_name(target: Path, suffix: str = "tmp") -> Path:
    """Return an unused path in the folder of `target`; it is short, whatever the length of `target` is."""
    return target.with_name(f".{os.getpid()}-{secrets.token_hex(4)}.{suffix}")


def _rename_to_new(temporary: Path, target: Path) -> None:
    """Rename `temporary` to `target` in one step.

    Raises:
        FileExistsError: `target` exists.
    """
    try:
        os.link(temporary, target)
    except FileExistsError:
        raise
    except OSError:  # the file system has no hard links, or the rename fails for the same reason
        _rename_under_lock(temporary, target)


def _rename_under_lock(temporary: Path, target: Path) -> None:
    """Rename `temporary` to `target` unless it exists; an empty folder excludes other processes meanwhile.

    Raises:
        FileExistsError: `target` exists, or another process is writing it.
    """
    digest = hashlib.sha256(os.fsencode(folded_name(target.name))).hexdigest()
    lock = target.with_name(f".{digest[:16]}.lock")
    lock.mkdir()
    try:
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        os.rename(temporary, target)
    finally:
        with suppress(OSError):
            lock.rmdir()


def write_error(path: str | os.PathLike[str], error: OSError) -> UserError:
    """Return the error for users about a file or folder that cannot be written."""
    kind = DiskFullError if error.errno in (errno.ENOSPC, errno.EDQUOT) else UserError
    remedy = "choose a shorter name" if error.errno == errno.ENAMETOOLONG else "choose another place to write to"
    return kind(f'cannot write "{path}": {error.strerror or error}; {remedy}')


@contextmanager
def locked(path: Path, message: str, wait: bool = False) -> Iterator[None]:
    """Hold the lock file `path`, which is deleted afterwards; it excludes other processes that do the same.

    The system releases the lock of a process that was killed, even if processes that it has started go on. Systems
    without such locks exclude nobody.

    Args:
        path: the lock file; a missing folder is created.
        message: the error if another process holds the lock.
        wait: wait for that process instead.

    Raises:
        UserError: another process holds the lock; or the folder cannot be written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = _open_locked(path)
        except BlockingIOError:
            if not wait:
                raise UserError(message) from None
            logger.warning("%s; waiting until it has finished", message)
            descriptor = _open_locked(path, wait=True)
    except OSError as error:
        raise write_error(path, error) from error
    _held.add(descriptor)
    try:
        yield
    finally:
        _held.discard(descriptor)
        with suppress(OSError):
            path.unlink(missing_ok=True)
        os.close(descriptor)


# Descriptors of the locks that this process holds. Processes that it forks close them, so that they hold no locks.
_held: set[int] = set()


def _close_held() -> None:
    while _held:
        with suppress(OSError):
            os.close(_held.pop())


if hasattr(os, "register_at_fork"):  # Windows does not fork
    os.register_at_fork(after_in_child=_close_held)


def _open_locked(path: Path, wait: bool = False) -> int:
    """Create, open and lock a file.

    Raises:
        BlockingIOError: another process holds the lock, and `wait` is False.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise
        except (ModuleNotFoundError, OSError):  # Windows, or the file system, has no such locks
            return descriptor
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        os.close(descriptor)  # the process that held the lock has deleted the file meanwhile


def check_writable(folder: Path, option: str) -> None:
    """Raise an error if files cannot be written to `folder`, which need not exist yet.

    Args:
        folder: the folder.
        option: the option that named it, for the message.

    Raises:
        UserError: part of the path is a file, or the folder is not writable.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f'{option} "{folder}": "{existing}" is a file; name a folder')
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f'{option} "{folder}" cannot be written to; name another folder')


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; it replaces `path` and its content when the block succeeds.

    When the block fails, the temporary folder is deleted and `path` is unchanged.

    Raises:
        UserError: the folder cannot be created, written to or replaced, or the disk is full.
    """
    target = Path(path).resolve()  # a symbolic link is kept
    temporary, replaced = _temporary_name(target), _temporary_name(target, "old")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        if target.exists():
            target.rename(replaced)  # a folder that is not empty cannot be overwritten
        temporary.rename(target)
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        for leftover in (temporary, replaced):
            shutil.rmtree(leftover, ignore_errors=True)


def reserve_folder(path: str | os.PathLike[str]) -> Path:
    """Create a new folder and return it: `path`, or if that exists, the first free of `path_1`, `path_2`, ….

    Of several processes that ask for one path at the same time, each gets a folder of its own.

    Raises:
        UserError: the folder cannot be created.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for number in itertools.count():
            folder = target.with_name(f"{target.name}_{number}") if number else target
            with suppress(FileExistsError):
                folder.mkdir()
                return folder
    except OSError as error:
        raise write_error(target, error) from error
    raise AssertionError("unreachable")


def sha256(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
