"""Downloads from unreliable local servers."""

from __future__ import annotations

import random
import socket
import ssl
import time
import urllib.error
from types import SimpleNamespace

import pytest
from file_server import ETAG, Answer, running

from ldm.errors import UserError
from ldm.io import download
from ldm.io.download import ATTEMPTS, fetch

BODY = random.Random(0).randbytes(300_000)


@pytest.fixture
def server():
    with running() as server:
        server.files["/a.bin"] = BODY
        yield server


@pytest.fixture
def pauses(monkeypatch):
    """Record the pauses between attempts without waiting."""
    made = []
    monkeypatch.setattr(download, "time", SimpleNamespace(sleep=made.append, time=time.time))
    return made


@pytest.fixture
def get(server, tmp_path, pauses):
    def get():
        fetch(f"{server.url}/a.bin", tmp_path / "new" / "a.bin", "a")
        assert [file.name for file in (tmp_path / "new").iterdir()] == ["a.bin"]
        return (tmp_path / "new" / "a.bin").read_bytes()

    return get


def files_in_folder(tmp_path):
    return sorted(file.name for file in (tmp_path / "new").glob("*"))


def test_a_good_server_needs_one_request(get, server, pauses):
    assert get() == BODY
    assert len(server.requests) == 1 and not pauses and "Range" not in server.requests[0]


def test_a_cut_connection_is_resumed(get, server, pauses):
    server.answers = [Answer(cut=100_000), Answer(cut=50_000)]
    assert get() == BODY
    assert [request.get("Range") for request in server.requests] == [None, "bytes=100000-", "bytes=150000-"]
    assert server.requests[1]["If-Range"] == ETAG and pauses == [1, 1]


def test_the_next_run_resumes(get, server, tmp_path):
    server.answers = [Answer(cut=100_000), *[Answer(status=503)] * (ATTEMPTS - 1)]
    with pytest.raises(UserError, match=r"503 .* 5 times in a row; run the same command again"):
        get()
    assert files_in_folder(tmp_path) == ["a.bin.part", "a.bin.part.json"]
    assert get() == BODY and server.requests[-1]["Range"] == "bytes=100000-"


def test_pauses_grow_and_follow_the_server(get, server, pauses):
    soon = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 90))
    server.answers = [
        Answer(status=500),
        Answer(status=429, headers={"Retry-After": "30"}),
        Answer(status=503, headers={"Retry-After": soon}),
        Answer(status=503, headers={"Retry-After": "99999"}),
    ]
    assert get() == BODY
    assert pauses[:2] == [1, 30] and 80 < pauses[2] <= 90 and pauses[3] == download.MAX_PAUSE


def test_new_bytes_reset_the_count_of_attempts(get, server):
    server.answers = [Answer(cut=30_000) for _ in range(2 * ATTEMPTS - 1)]
    assert get() == BODY


def test_without_ranges_the_download_starts_from_scratch(get, server):
    server.answers = [Answer(cut=100_000), Answer(ignore_range=True)]
    assert get() == BODY


@pytest.mark.parametrize("tags", [{"ETag": '"two"'}, {"Last-Modified": "Sun, 02 Jan 2022 00:00:00 GMT"}])
def test_a_changed_file_starts_from_scratch(get, server, tmp_path, tags):
    first = {"ETag": ETAG} if "ETag" in tags else {"Last-Modified": "Sat, 01 Jan 2022 00:00:00 GMT"}
    server.tags = first
    server.answers = [Answer(cut=100_000), *[Answer(status=500)] * (ATTEMPTS - 1)]
    with pytest.raises(UserError):
        get()
    server.tags, server.files["/a.bin"] = tags, BODY[::-1]
    assert get() == BODY[::-1]
    assert server.requests[-1]["If-Range"] == next(iter(first.values()))


def test_a_range_of_another_file_is_noticed(get, server):
    other = BODY[::-1]
    headers = {"ETag": '"two"', "Content-Range": f"bytes 100000-{len(other) - 1}/{len(other)}"}
    server.answers = [Answer(cut=100_000), Answer(headers=headers, body=other), Answer(body=other)]
    assert get() == other


def test_without_a_version_nothing_is_resumed(get, server):
    server.tags = {"ETag": 'W/"weak"'}
    server.answers = [Answer(cut=100_000)]
    assert get() == BODY
    assert "Range" not in server.requests[1]


def test_another_link_starts_from_scratch(server, tmp_path, pauses):
    server.files["/b.bin"] = BODY[::-1]
    server.answers = [Answer(cut=100_000), *[Answer(status=500)] * (ATTEMPTS - 1)]
    with pytest.raises(UserError):
        fetch(f"{server.url}/a.bin", tmp_path / "a.bin", "a")
    fetch(f"{server.url}/b.bin", tmp_path / "a.bin", "a")
    assert (tmp_path / "a.bin").read_bytes() == BODY[::-1]


def test_a_complete_part_is_only_renamed(get, server, tmp_path):
    part = download.PartialFile(tmp_path / "new" / "a.bin")
    part.begin(f"{server.url}/a.bin", {"ETag": ETAG}, len(BODY))
    part.file.write_bytes(BODY)
    assert get() == BODY  # the server answers 416
    assert server.requests[0]["Range"] == f"bytes={len(BODY)}-"


def test_a_part_that_is_too_long_starts_from_scratch(get, server, tmp_path):
    part = download.PartialFile(tmp_path / "new" / "a.bin")
    part.begin(f"{server.url}/a.bin", {"ETag": ETAG}, len(BODY))
    part.file.write_bytes(BODY + b"more")
    assert get() == BODY and len(server.requests) == 2


@pytest.mark.parametrize("note", ["", "[1]", '{"url": "http://elsewhere/a.bin"}', "\x00"])
def test_a_damaged_note_starts_from_scratch(get, server, tmp_path, note):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "a.bin.part").write_bytes(b"what")
    (tmp_path / "new" / "a.bin.part.json").write_text(note)
    assert get() == BODY and "Range" not in server.requests[0]


@pytest.mark.parametrize("status", [400, 403, 404, 410])
def test_permanent_errors_are_not_retried(get, server, tmp_path, status):
    server.answers = [Answer(status=status)]
    with pytest.raises(UserError, match=rf"a\.bin: the server answers {status}"):
        get()
    assert len(server.requests) == 1 and not files_in_folder(tmp_path)


def test_a_length_that_is_never_reached_raises_user_error(get, server, tmp_path):
    server.answers = [Answer(length=len(BODY) + 10) for _ in range(20)]
    with pytest.raises(UserError, match="in a row"):
        get()
    assert "a.bin" not in files_in_folder(tmp_path)
    assert len(server.requests) <= 2 * ATTEMPTS


def test_chunked_transfer_detects_a_cut_connection(get, server):
    server.answers = [Answer(chunked=True, cut=100_000), Answer(chunked=True)]
    assert get() == BODY


def test_a_missing_length_is_refused(get, server):
    server.answers = [Answer(length=-1)]
    with pytest.raises(UserError, match="does not state the length"):
        get()


@pytest.mark.parametrize(
    "answer",
    [
        Answer(headers={"Content-Type": "text/html; charset=utf-8"}),
        Answer(body=b"\n<!DOCTYPE html><html>gone</html>"),
        Answer(headers={"Content-Encoding": "gzip"}),
    ],
)
def test_web_pages_and_encoded_files_are_refused(get, server, tmp_path, answer):
    server.answers = [answer]
    with pytest.raises(UserError, match=r"web page|encoded"):
        get()
    assert len(server.requests) == 1 and "a.bin.part" not in files_in_folder(tmp_path)


def test_redirects_to_other_schemes_are_refused(get, server):
    server.answers = [Answer(status=302, headers={"Location": "/a.bin"})]
    assert get() == BODY
    for target in ("file:///etc/passwd", "ftp://127.0.0.1/a"):
        server.answers = [Answer(status=302, headers={"Location": target})]
        with pytest.raises(UserError, match=r"not allowed|not a web address"):
            get()
    request = SimpleNamespace(full_url="https://safe/a")
    with pytest.raises(UserError, match="not encrypted"):
        download._RedirectHandler().redirect_request(request, None, 302, "", {}, "http://safe/a")


@pytest.mark.parametrize("link", ["file:///etc/passwd", "ftp://host/a", "a.bin", "", "http:///a"])
def test_other_links_are_refused(tmp_path, link):
    with pytest.raises(UserError, match="not a web address"):
        fetch(link, tmp_path / "a", "a")


@pytest.mark.parametrize(
    ("reason", "message", "attempts"),
    [
        (ssl.SSLCertVerificationError("bad"), "certificate", 1),
        (socket.gaierror(socket.EAI_NONAME, "unknown"), "no such server", 1),
        (socket.gaierror(socket.EAI_AGAIN, "failing"), "in a row", ATTEMPTS),
        (ConnectionRefusedError(111, "refused"), r"refused\), 5 times", ATTEMPTS),
    ],
)
def test_unreachable_servers_raise_user_error(tmp_path, pauses, monkeypatch, reason, message, attempts):
    def fail(*args, **kwargs):
        raise urllib.error.URLError(reason)

    monkeypatch.setattr(download._OPENER, "open", fail)
    with pytest.raises(UserError, match=message):
        fetch("https://host/a", tmp_path / "a", "a")
    assert len(pauses) == attempts - 1


def test_certificates_are_checked():
    handler = next(h for h in download._OPENER.handlers if type(h).__name__ == "HTTPSHandler")
    context = getattr(handler, "_context", None) or ssl._create_default_https_context()
    assert context.verify_mode == ssl.CERT_REQUIRED and context.check_hostname


def test_a_path_that_cannot_be_written_raises_user_error(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        fetch(f"{server.url}/a.bin", tmp_path / "file" / "a.bin", "a")
