"""Files from the web: resumed, tried again, checked, and there whole or not at all. Needs no torch."""

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
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ldm.errors import UserError
from ldm.io import files

logger = logging.getLogger(__name__)

ATTEMPTS = 5  # in a row that bring nothing new
TIMEOUT = 60.0  # seconds without a byte
LONGEST_PAUSE = 120.0  # seconds that a server may ask to wait
BLOCK = 1 << 18
PASSING = {408, 425, 429, 500, 502, 503, 504}  # HTTP statuses that may be gone a moment later
WEB_PAGE = re.compile(rb"\s*<(!doctype|html|head|\?xml)", re.IGNORECASE)
AGAIN = "run the same command again to go on from there"


class _Interrupted(Exception):
    """An attempt that failed in a way that may pass; the server asks for a pause of `pause` seconds."""

    def __init__(self, reason: str, pause: float = 0.0) -> None:
        super().__init__(reason)
        self.pause = pause


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows links to http(s) only, and never from https to http."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        check_link(newurl)
        if urlsplit(req.full_url).scheme == "https" and urlsplit(newurl).scheme != "https":
            raise UserError(f"{req.full_url} leads to {newurl}, which is not encrypted; nothing is fetched")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


_OPENER = urllib.request.build_opener(_Redirects)


def check_link(url: str) -> str:
    """`url`, if it is one to fetch from.

    Raises:
        UserError: it is none of http or https.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f'"{url}" is no link to fetch from; give one that begins with https:// or http://')
    return url


class Part:
    """What has come of the file `path`, in `<path>.part`, and of which version, in `<path>.part.json`."""

    def __init__(self, path: Path) -> None:
        self.file = path.with_name(f"{path.name}.part")
        self._note = path.with_name(f"{path.name}.part.json")

    @property
    def size(self) -> int:
        """Bytes that are there."""
        try:
            return self.file.stat().st_size
        except OSError:
            return 0

    def version(self, url: str) -> dict[str, Any]:
        """What `begin` noted for this link; empty where there is nothing to go on from."""
        try:
            note = json.loads(self._note.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return note if isinstance(note, dict) and note.get("url") == url and self.size else {}

    def begin(self, url: str, headers: Mapping[str, str], total: int | None) -> None:
        """Start anew with the version of the file that a response's `headers` describe."""
        header = next((name for name in ("ETag", "Last-Modified") if _identifies(name, headers.get(name))), None)
        value = headers.get(header) if header else None
        note = {"url": url, "total": total, "header": header, "value": value}
        with _writing(self.file):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_bytes(b"")
        with files.atomic_path(self._note) as temporary:
            temporary.write_text(json.dumps(note) + "\n", encoding="utf-8")

    def discard(self) -> None:
        """Forget what has come."""
        self.file.unlink(missing_ok=True)
        self._note.unlink(missing_ok=True)

    def finish(self, path: Path) -> None:
        """Give the whole file its name."""
        with _writing(path):
            os.replace(self.file, path)
        self._note.unlink(missing_ok=True)


def _identifies(header: str, value: str | None) -> bool:
    """Whether a response's header tells versions apart byte for byte, as `If-Range` needs (RFC 9110, 13.1.5)."""
    return bool(value) and not (header == "ETag" and value.startswith("W/"))


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turns an error of the disk into one line."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f'cannot write "{path}": {reason}; what has come stays: mend that, then {AGAIN}') from error


def fetch(url: str, path: Path, label: str, sha256: str | None = None) -> None:
    """Fetch `url` to `path`, going on from what an earlier try left beside it.

    Args:
        label: what the progress bar and the log call the file.
        sha256: what the file must have, in hexadecimal.

    Raises:
        UserError: it cannot be had or written, or is not what it should be. What has come of it stays for the next
            try, unless it is of no use.
    """
    check_link(url)
    part = Part(path)
    furthest, failures = part.size, 0
    while True:
        try:
            _attempt(url, part, label)
            break
        except _Interrupted as error:
            failures = 1 if part.size > furthest else failures + 1
            furthest = max(furthest, part.size)
            if failures == ATTEMPTS:
                raise UserError(f"{url}: {error}, {ATTEMPTS} times in a row; {AGAIN}") from None
            pause = min(max(error.pause, 2.0 ** (failures - 1)), LONGEST_PAUSE)
            logger.warning("%s: %s; trying again in %.0f s", label, error, pause)
            time.sleep(pause)
    if sha256 is not None and files.sha256(part.file) != sha256:
        part.discard()
        raise UserError(f"{url} is not the file that was published (its SHA-256 differs); it was not kept")
    part.finish(path)


def _attempt(url: str, part: Part, label: str) -> None:
    """One request, and what comes of it into `part`; returns when the file is whole."""
    version = part.version(url)
    headers = {"User-Agent": "ldm", "Accept-Encoding": "identity"}
    if version.get("header"):
        headers |= {"Range": f"bytes={part.size}-", "If-Range": version["value"]}
    try:
        with _OPENER.open(urllib.request.Request(url, headers=headers), timeout=TIMEOUT) as response:
            total = _meet(response, url, part, version)
            _copy(response, part, total, label)
    except urllib.error.HTTPError as error:
        with error:
            if not (error.code == 416 and _is_whole(error.headers, part, version)):
                _judge(error, url, part)
    except urllib.error.URLError as error:
        _judge_unreachable(error.reason, url)
    except (http.client.HTTPException, OSError) as error:
        raise _Interrupted(f"the connection broke ({type(error).__name__})") from error


def _meet(response: Any, url: str, part: Part, version: Mapping[str, Any]) -> int | None:
    """Make `part` ready for what the response brings; gives the whole file's size, None where it comes in chunks."""
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
            raise _Interrupted("the file on the server has changed; starting it anew")
        return int(found[2])
    length = headers.get("Content-Length", "")
    total = int(length) if length.isdecimal() else None
    if total is None and not response.chunked:
        raise UserError(f"{url}: the server does not tell the length, so a cut would not show; try another mirror")
    part.begin(url, headers, total)
    return total


def _copy(response: Any, part: Part, total: int | None, label: str) -> None:
    """Append a response to `part`."""
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
        raise _Interrupted("more came than was announced")
    if total is not None and part.size < total:
        raise _Interrupted(f"the connection ended after {part.size:,} of {total:,} bytes")


def _progress(label: str, start: int, total: int | None) -> Any:
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        raise UserError("progress needs the package tqdm; install the project first: pip install -e .") from None
    return tqdm(desc=label, initial=start, total=total, unit="B", unit_scale=True, disable=None, leave=False)


def _is_whole(headers: Mapping[str, str], part: Part, version: Mapping[str, Any]) -> bool:
    """Whether "there is nothing beyond that" (416) means that all has come already."""
    whole = headers.get("Content-Range") == f"bytes */{part.size}"
    return part.size > 0 and whole and version.get("total") in (None, part.size)


def _judge(error: urllib.error.HTTPError, url: str, part: Part) -> None:
    """Raise what an HTTP status means."""
    told = f"the server answers {error.code} {error.reason}"
    if error.code == 416:
        part.discard()
        raise _Interrupted(f"{told}; starting the file anew")
    if error.code in PASSING:
        raise _Interrupted(told, _retry_after(error.headers.get("Retry-After", "")))
    raise UserError(f"{url}: {told}; the file may have moved: look for a mirror of it")


def _retry_after(text: str) -> float:
    """Seconds, from either form of the header `Retry-After`; 0 where it says nothing."""
    if text.isdecimal():
        return float(text)
    with suppress(TypeError, ValueError):
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    return 0.0


def _judge_unreachable(reason: Any, url: str) -> None:
    """Raise what it means that no server answered."""
    if isinstance(reason, ssl.SSLCertVerificationError):
        raise UserError(f"{url}: the server's certificate is not valid ({reason}); nothing is fetched")
    if isinstance(reason, socket.gaierror) and reason.errno != socket.EAI_AGAIN:
        raise UserError(f"{url}: there is no such server, or no network ({reason.strerror}); check the connection")
    raise _Interrupted(f"the server cannot be reached ({getattr(reason, 'strerror', None) or reason})")


def _web_page(url: str) -> UserError:
    return UserError(f"{url} is a web page, not the file; it may have moved: look for a mirror of it")
