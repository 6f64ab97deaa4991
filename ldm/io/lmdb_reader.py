"""Databases of LMDB: folders with a `data.mdb`, which map keys to the bytes of files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from ldm.config.distribution import install_hint
from ldm.errors import UserError

DATA_FILE = "data.mdb"


def is_database(path: Path) -> bool:
    """Return whether a folder is a database of LMDB."""
    return (path / DATA_FILE).is_file()


# Path of each open database → the process that opened it, and the database. A process may open a database only once,
# and a database from before a fork must not be used after it.
_open: dict[str, tuple[int, Any]] = {}


class LmdbReader:
    """Reader of a database, which each process opens for itself at its first use.

    It can be pickled, and used by the workers of a data loader however they are started.

    Args:
        path: the folder of the database.

    Raises:
        UserError: the package is missing, or the folder is not a database.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._environment()

    def keys(self) -> np.ndarray:
        """Return all keys in order, (N,) bytes.

        Raises:
            UserError: the database is damaged.
        """
        import lmdb

        try:
            with self._environment().begin() as transaction:
                return np.array(list(transaction.cursor().iternext(values=False)), dtype=bytes)
        except lmdb.Error as error:
            raise self._unreadable(error) from None

    def get(self, key: bytes) -> bytes | None:
        """Return the value of a key, or None.

        Raises:
            UserError: the database is damaged.
        """
        import lmdb

        try:
            with self._environment().begin() as transaction:
                return transaction.get(key)
        except lmdb.Error as error:
            raise self._unreadable(error) from None

    def _environment(self) -> Any:
        """Return the database, opened in this process.

        Raises:
            UserError: the package is missing, or the folder is not a database.
        """
        name = os.path.realpath(self.path)
        process, environment = _open.get(name, (0, None))
        if process == os.getpid():
            return environment
        try:
            import lmdb
        except ModuleNotFoundError:
            hint = install_hint("datasets")
            raise UserError(f'"{self.path}" needs the package lmdb; install it with {hint}') from None
        try:
            if environment is not None:
                environment.close()
            # Without a lock, the database may be on a drive that cannot be written to. Nothing here changes it.
            environment = lmdb.open(name, readonly=True, lock=False, create=False, readahead=False, meminit=False)
        except lmdb.Error as error:
            raise self._unreadable(error) from None
        _open[name] = os.getpid(), environment
        return environment

    def _unreadable(self, error: Exception) -> UserError:
        return UserError(f'cannot read the database "{self.path}": {error}; unpack or copy it again')
