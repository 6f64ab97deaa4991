"""Tests of the command `download_weights` and of the published shell scripts."""

from __future__ import annotations

import re
import resource
import signal
import subprocess
import sys
import time

import pytest
from file_server import ETAG, Answer, running

from ldm.cli.download_weights import main

PATH = "/latent-diffusion/nitro/cin/model.ckpt"  # cin256-v2
BODY = bytes(range(256)) * 2000


@pytest.fixture
def server():
    with running() as server:
        server.files[PATH] = BODY
        yield server


@pytest.fixture
def start(server, tmp_path, repo_root):
    """Return a function that starts the published script in a process of its own."""

    def start(*arguments, **options):
        words = ["scripts/download_weights.py", "cin256-v2", "--models-dir", str(tmp_path), "--base-url", server.url]
        return subprocess.Popen(
            [sys.executable, *words, *arguments], cwd=repo_root, stderr=subprocess.PIPE, text=True, **options
        )

    return start


def weights(tmp_path):
    return tmp_path / "ldm" / "cin256-v2" / "model.ckpt"


def test_weights_are_downloaded_once(server, tmp_path, capsys):
    words = ["cin256-v2", "--models-dir", str(tmp_path), "--base-url", server.url]
    assert main(words) == 0 and main(words) == 0
    assert weights(tmp_path).read_bytes() == BODY and len(server.requests) == 1
    main(["--list", *words])
    line = capsys.readouterr().out.splitlines()[1].split()
    assert line == ["cin256-v2", "large", "?", "there", str(weights(tmp_path)), server.url + PATH]


def test_failures_are_listed_and_the_status_is_1(server, tmp_path, capsys):
    assert main(["kl-f8", "cin256-v2", "--models-dir", str(tmp_path), "--base-url", server.url]) == 1
    assert weights(tmp_path).exists()
    printed = capsys.readouterr().out
    assert "1 of 2 downloads failed:" in printed and re.search("kl-f8: .*404", printed)


@pytest.mark.parametrize(
    ("words", "printed"),
    [
        (["kl-f9"], "did you mean"),
        (["kl-f8", "--base-url", "ftp://host"], "not a web address"),
        (["kl-f8", "--base-url", "host/x"], "not a web address"),
    ],
)
def test_wrong_options_return_status_2(words, printed, capsys):
    assert main(words) == 2
    assert printed in capsys.readouterr().err


def test_no_names_exit_with_status_2(capsys):
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 2 and "first-stages" in capsys.readouterr().err


def test_an_interruption_keeps_the_received_part(start, server, tmp_path):
    server.answers = [Answer(cut=400_000, stall=True)]
    # Background processes of a shell ignore Ctrl-C, and so do the processes that they start.
    process = start(preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    part = weights(tmp_path).with_name("model.ckpt.part")
    deadline = time.monotonic() + 20
    while not (part.exists() and part.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate(timeout=20)
    assert process.returncode == 130 and "the same command resumes" in printed and "Traceback" not in printed
    size = part.stat().st_size
    assert 0 < size <= 400_000 and not weights(tmp_path).exists()
    process = start()
    process.communicate(timeout=20)
    assert process.returncode == 0 and weights(tmp_path).read_bytes() == BODY
    assert (server.requests[-1]["Range"], server.requests[-1]["If-Range"]) == (f"bytes={size}-", ETAG)


def test_a_full_disk_is_one_line(start, tmp_path):
    full = start(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000)))
    _, printed = full.communicate(timeout=20)
    assert full.returncode == 1 and printed.count("cannot write") == 1 and "Traceback" not in printed
    assert weights(tmp_path).with_name("model.ckpt.part").stat().st_size == 300_000
    assert start().wait(timeout=20) == 0 and weights(tmp_path).read_bytes() == BODY


def shell_commands(repo_root):
    documents = [repo_root / "README.md", *repo_root.glob("docs/**/*.md")]
    text = "\n".join(document.read_text(encoding="utf-8") for document in documents)
    return re.findall(r"^bash (scripts/\w+\.sh)", text, flags=re.M)


@pytest.mark.parametrize(("name", "group", "count"), [("first_stages", "kl-f4", 9), ("models", "celeba256", 11)])
def test_the_published_commands(repo_root, tmp_path, name, group, count):
    command = f"scripts/download_{name}.sh"
    assert command in shell_commands(repo_root)
    done = subprocess.run(
        ["bash", str(repo_root / command), "--list", "--models-dir", "elsewhere"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == count + 1 and lines[1].split()[0] == group
    assert all(" elsewhere/" in line for line in lines[1:])


def test_shell_commands_of_the_documents_exist(repo_root):
    assert all((repo_root / command).is_file() for command in shell_commands(repo_root))
