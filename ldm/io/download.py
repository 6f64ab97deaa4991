"""Download files: resume, retry, check, and keep them only when they are complete. Needs no torch."""

from __future__ import annotations

import email.utils
import http.client
import json
import logging
import os
import re
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from email.message import Message
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit

from ldm.config.distribution import install_hint
from ldm.errors import UserError
from ldm.io import files

logger = logging.getLogger(__name__)

ATTEMPTS = 5  # in a row that receive no new bytes
TIMEOUT = 60.0  # seconds without new bytes
MAX_PAUSE = 120.0  # upper limit of the pause that a server may ask for, in seconds
BLOCK = 1 << 18
TEMPORARY_STATUSES = {408, 425, 429, 500, 502, 503, 504}  # HTTP statuses that are worth a retry
WEB_PAGE = re.compile(rb"\s*<(!doctype|html|head|\?xml)", re.IGNORECASE)
RESUME_HINT = "run the same command again to resume"


class _TemporaryError(Exception):
    """Failure of one attempt that is worth a retry after `pause` seconds, if the server asked for a pause."""

    def __init__(self, reason: str, pause: float = 0.0) -> None:
        super().__init__(reason)
        self.pause = pause


class _RedirectHandler(urllib.request.HTTPRedirectHandler):
    """Redirect handler that accepts http and https only, and never changes from https to http."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        check_link(newurl)
        if urlsplit(req.full_url).scheme == "https" and urlsplit(newurl).scheme != "https":
            raise UserError(f"{req.full_url} redirects to {newurl}, which is not encrypted; nothing was downloaded")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


_OPENER = urllib.request.build_opener(_RedirectHandler)


def check_link(url: str) -> str:
    """Return `url` if it is a web address.

    Raises:
        UserError: the scheme is not http or https, or the host is missing.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f'"{url}" is not a web address; give one that starts with https:// or http://')
    return url


def open_url(url: str) -> BinaryIO:
    """Open a web address to read its content once, from the start; `TIMEOUT` applies to each read.

    Raises:
        OSError: the server cannot be reached, or has no such file.
        UserError: the address, or one that it redirects to, is refused.
    """
    return cast(BinaryIO, _OPENER.open(urllib.request.Request(check_link(url)), timeout=TIMEOUT))


class PartialFile:
    """Received part of the file `path`, in `<path>.part`, with a note about its version in `<path>.part.json`."""

    def __init__(self, path: Path) -> None:
        self.file = path.with_name(f"{path.name}.part")
        self._note = path.with_name(f"{path.name}.part.json")

    @property
    def size(self) -> int:
        """Number of bytes received."""
        try:
            return self.file.stat().st_size
        except OSError:
            return 0

    def version(self, url: str) -> dict[str, Any]:
        """Return what `begin` noted about this link; an empty dict if there is nothing to resume."""
        try:
            note = json.loads(self._note.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return note if isinstance(note, dict) and note.get("url") == url and self.size else {}

    def begin(self, url: str, headers: Mapping[str, str], total: int | None) -> None:
        """Start from scratch with the version of the file that the `headers` of a response describe."""
        header = next((name for name in ("ETag", "Last-Modified") if _is_strong(name, headers.get(name))), None)
        value = headers.get(header) if header else None
        note = {"url": url, "total": total, "header": header, "value": value}
        with _writing(self.file):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_bytes(b"")
        with files.atomic_path(self._note) as temporary:
            temporary.write_text(json.dumps(note) + "\n", encoding="utf-8")

    def discard(self) -> None:
        """Delete the received part."""
        self.file.unlink(missing_ok=True)
        self._note.unlink(missing_ok=True)

    def finish(self, path: Path) -> None:
        """Rename the complete file to `path`."""
        with _writing(path):
            os.replace(self.file, path)
        self._note.unlink(missing_ok=True)


def _is_strong(header: str, value: str | None) -> bool:
    """Return whether a header identifies a version byte for byte, as `If-Range` needs (RFC 9110, 13.1.5)."""
    if not value:
        return False
    return header != "ETag" or not value.startswith("W/")


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn an error of the file system into a `UserError`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f'cannot write "{path}": {reason}; the received part is kept: solve this, then {RESUME_HINT}'
        ) from error


def fetch(url: str, path: Path, label: str) -> None:
    """Download `url` to `path`, and resume an earlier attempt that left a part beside it.

    Args:
        label: name of the file in the progress bar and the log.

    Raises:
        UserError: the file cannot be downloaded or written, or is a web page. The received part is kept for the next
            attempt if it is usable.
    """
    check_link(url)
    part = PartialFile(path)
    received, failures = part.size, 0
    while True:
        try:
            _attempt(url, part, label)
            break
        except _TemporaryError as error:
            failures = 1 if part.size > received else failures + 1
            received = max(received, part.size)
            if failures == ATTEMPTS:
                raise UserError(f"{url}: {error}, {ATTEMPTS} times in a row; {RESUME_HINT}") from None
            pause = min(max(error.pause, 2.0 ** (failures - 1)), MAX_PAUSE)
            logger.warning("%s: %s; trying again in %.0f s", label, error, pause)
            time.sleep(pause)
    part.finish(path)


def _attempt(url: str, part: PartialFile, label: str) -> None:
    """Send one request and append the response to `part`; return when the file is complete."""
    version = part.version(url)
    headers = {"User-Agent": "ldm", "Accept-Encoding": "identity"}
    if version.get("header"):
        headers |= {"Range": f"bytes={part.size}-", "If-Range": version["value"]}
    try:
        with _OPENER.open(urllib.request.Request(url, headers=headers), timeout=TIMEOUT) as response:
            total = _prepare(response, url, part, version)
            _copy(response, part, total, label)
    except urllib.error.HTTPError as error:
        with error:
            if not (error.code == 416 and _is_complete(error.headers, part, version)):
                _raise_for_status(error, url, part)
    except urllib.error.URLError as error:
        _raise_for_connection(error.reason, url)
    except (http.client.HTTPException, OSError) as error:
        raise _TemporaryError(f"the connection broke ({type(error).__name__})") from error


def _prepare(response: Any, url: str, part: PartialFile, version: Mapping[str, Any]) -> int | None:
    """Prepare `part` for the body of a response, and return the size of the whole file; None for chunked transfer."""
    headers = response.headers
    if headers.get_content_type() == "text/html":
        raise _web_page(url)
    if headers.get("Content-Encoding", "identity") != "identity":
        raise UserError(f"{url}: the server sends the file encoded ({headers['Content-Encoding']}); try another mirror")
    if response.status == 206:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", headers.get("Content-Range", ""))
        same = headers.get(version.get("header") or "", version.get("value")) == version.get("value")
        if found is None or int(found[1]) != part.size or not same or version.get("total") not in (None, int(found[2])):
            part.discard()
            raise _TemporaryError("the file on the server has changed; starting from scratch")
        return int(found[2])
    length = headers.get("Content-Length", "")
    total = int(length) if length.isdecimal() else None
    if total is None and not response.chunked:
        raise UserError(f"{url}: the server does not state the length, so a cut would go unnoticed; try another mirror")
    part.begin(url, headers, total)
    return total


def _copy(response: Any, part: PartialFile, total: int | None, label: str) -> None:
    """Append the body of a response to `part`."""
    start = part.size
    with _writing(part.file):
        out = part.file.open("ab", buffering=0)
    with out, _progress(label, start, total) as bar:
        while block := response.read(BLOCK):
            if part.size == 0 and WEB_PAGE.match(block):
                part.discard()
                raise _web_page(response.url)
            with _writing(part.file):
                view = memoryview(block)
                while view:
                    view = view[out.write(view) :]
            bar.update(len(block))
    if total is not None and part.size > total:
        part.discard()
        raise _TemporaryError("the server sent more bytes than announced")
    if total is not None and part.size < total:
        raise _TemporaryError(f"the connection ended after {part.size:,} of {total:,} bytes")


def _progress(label: str, start: int, total: int | None) -> Any:
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        raise UserError(f"progress needs the package tqdm; install it with {install_hint()}") from None
    return tqdm(desc=label, initial=start, total=total, unit="B", unit_scale=True, disable=None, leave=False)


def _is_complete(headers: Message, part: PartialFile, version: Mapping[str, Any]) -> bool:
    """Return whether status 416 (range not satisfiable) means that the whole file was received before."""
    whole = headers.get("Content-Range") == f"bytes */{part.size}"
    return part.size > 0 and whole and version.get("total") in (None, part.size)


def _raise_for_status(error: urllib.error.HTTPError, url: str, part: PartialFile) -> None:
    """Raise the error that an HTTP status stands for."""
    reason = f"the server answers {error.code} {error.reason}"
    if error.code == 416:
        part.discard()
        raise _TemporaryError(f"{reason}; starting from scratch")
    if error.code in TEMPORARY_STATUSES:
        raise _TemporaryError(reason, _retry_after(error.headers.get("Retry-After", "")))
    raise UserError(f"{url}: {reason}; the file may have moved: look for a mirror of it")


def _retry_after(text: str) -> float:
    """Return the seconds that the header `Retry-After` asks for, in either of its forms; 0 if there are none."""
    if text.isdecimal():
        return float(text)
    with suppress(TypeError, ValueError):
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    return 0.0


def _raise_for_connection(reason: Any, url: str) -> None:
    """Raise the error for a server that did not answer."""
    if isinstance(reason, ssl.SSLCertVerificationError):
        raise UserError(f"{url}: the server's certificate is not valid ({reason}); nothing was downloaded")
    if isinstance(reason, socket.gaierror) and reason.errno != socket.EAI_AGAIN:
        raise UserError(f"{url}: there is no such server, or no network ({reason.strerror}); check the connection")
    raise _TemporaryError(f"the server cannot be reached ({getattr(reason, 'strerror', None) or reason})")


def _web_page(url: str) -> UserError:
    return UserError(f"{url} is a web page, not the file; it may have moved: look for a mirror of it")
