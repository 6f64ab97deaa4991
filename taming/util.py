import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldm.errors import UserError
from ldm.io.download import fetch

URL_MAP = {"vgg_lpips": "https://heibox.uni-heidelberg.de/f/607503859c864bc1b30b/?dl=1"}
CKPT_MAP = {"vgg_lpips": "vgg.pth"}
MD5_MAP = {"vgg_lpips": "d507d7349b931f0638a25a48a722f98a"}


def download(url: str, local_path: str, chunk_size: int = 1024) -> None:
    """Download `url` to a file; an interrupted download resumes. `chunk_size` has no effect.

    Raises:
        UserError: the file cannot be downloaded or written.
    """
    path = Path(local_path)
    fetch(url, path, path.name)


def md5_hash(path: str) -> str:
    """Return the MD5 hash of a file."""
    return hashlib.md5(Path(path).read_bytes(), usedforsecurity=False).hexdigest()


def get_ckpt_path(name: str, root: str, check: bool = False) -> str:
    """Return the path of the weights `name` in the folder `root`, downloaded if they are missing.

    Args:
        name: a key of `URL_MAP`.
        root: the folder.
        check: download again if the file is another one.

    Raises:
        KeyError: there are no such weights.
        UserError: the file cannot be downloaded, or has another hash than the published one.
    """
    path = Path(root) / CKPT_MAP[name]
    if not path.is_file() or (check and md5_hash(str(path)) != MD5_MAP[name]):
        path.unlink(missing_ok=True)
        download(URL_MAP[name], str(path))
        if md5_hash(str(path)) != MD5_MAP[name]:
            raise UserError(f'"{path}" from {URL_MAP[name]} is not the published file; delete it and try again')
    return str(path)


class KeyNotFoundError(Exception):
    """Error of `retrieve`: a key is missing.

    Attributes:
        cause: the first error.
        keys: the keys of the path.
        visited: the keys that were found.
    """

    def __init__(self, cause: Exception, keys: Sequence[str] | None = None, visited: Sequence[str] | None = None):
        self.cause = cause
        self.keys = keys
        self.visited = visited
        lines = [] if keys is None else [f"Key not found: {keys}"]
        lines += [] if visited is None else [f"Visited: {visited}"]
        super().__init__("\n".join([*lines, f"Cause:\n{cause}"]))


def retrieve(
    list_or_dict: Any,
    key: str,
    splitval: str = "/",
    default: Any = None,
    expand: bool = True,
    pass_success: bool = False,
) -> Any:
    """Return the entry of nested dicts and lists at a path of keys, such as "model/params/0".

    Args:
        list_or_dict: the dicts and lists.
        key: the path; indices of lists are numbers.
        splitval: separator of the path.
        default: value of a missing entry; None raises an error.
        expand: call functions on the way, which return dicts or lists.
        pass_success: return `(value, was found)`.

    Raises:
        KeyNotFoundError: a key is missing and there is no default, or a function is not to be called.
    """
    keys, visited, value = key.split(splitval), [], list_or_dict
    try:
        for part in keys:
            if callable(value):
                if not expand:
                    raise KeyError(f"{part}: the entry before it is a function, and expand is False")
                value = value()
            value = value[int(part)] if isinstance(value, list) else value[part]
            visited.append(part)
        value = value() if expand and callable(value) else value
    except (KeyError, IndexError, ValueError, TypeError) as error:
        if default is None:
            raise KeyNotFoundError(error, keys=keys, visited=visited) from error
        return (default, False) if pass_success else default
    return (value, True) if pass_success else value
