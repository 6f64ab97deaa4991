"""The commands that fetch weights, with the published names."""

from __future__ import annotations

import re
import resource
import signal
import subprocess
import sys
import time

import pytest
from file_server import ETAG, Answer, running

PATH = "/latent-diffusion/nitro/cin/model.ckpt"  # cin256-v2
BODY = bytes(range(256)) * 2000


@pytest.fixture
def server():
    with running() as server:
        server.files[PATH] = BODY
        yield server


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("download_weights")


@pytest.fixture
def start(server, tmp_path, repo_root):
    """Start the command in a process of its own."""

    def start(*arguments, **options):
        words = ["scripts/download_weights.py", "cin256-v2", "--models-dir", str(tmp_path), "--base-url", server.url]
        return subprocess.Popen(
            [sys.executable, *words, *arguments], cwd=repo_root, stderr=subprocess.PIPE, text=True, **options
        )

    return start


def weights(tmp_path):
    return tmp_path / "ldm" / "cin256-v2" / "model.ckpt"


def test_weights_are_fetched_once(script, server, tmp_path, capsys):
    words = ["cin256-v2", "--models-dir", str(tmp_path), "--base-url", server.url]
    assert script.main(words) == 0 and script.main(words) == 0
    assert weights(tmp_path).read_bytes() == BODY and len(server.requests) == 1
    script.main(["--list", *words])
    line = capsys.readouterr().out.splitlines()[1].split()
    assert line == ["cin256-v2", "large", "?", "there", str(weights(tmp_path)), server.url + PATH]


def test_failures_are_listed_and_give_status_1(script, server, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        script.main(["kl-f8", "cin256-v2", "--models-dir", str(tmp_path), "--base-url", server.url])
    assert ended.value.code == 1 and weights(tmp_path).exists()
    told = capsys.readouterr().out
    assert "1 of 2 could not be had:" in told and re.search("kl-f8: .*404", told)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["kl-f9"], "did you mean"),
        (["kl-f8", "--base-url", "ftp://host"], "no link to fetch from"),
        (["kl-f8", "--base-url", "host/x"], "no link to fetch from"),
    ],
)
def test_mistakes_give_status_2(script, words, told, capsys):
    assert script.main(words) == 2
    assert told in capsys.readouterr().err


def test_nothing_named_gives_status_2(script, capsys):
    with pytest.raises(SystemExit) as ended:
        script.main([])
    assert ended.value.code == 2 and "first-stages" in capsys.readouterr().err


def test_an_interruption_keeps_what_has_come(start, server, tmp_path):
    server.answers = [Answer(cut=400_000, stall=True)]
    # A shell that runs the tests in the background has them, and what they start, ignore Ctrl-C.
    process = start(preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    part = weights(tmp_path).with_name("model.ckpt.part")
    deadline = time.monotonic() + 20
    while not (part.exists() and part.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=20)
    assert process.returncode == 130 and "the same command goes on" in told and "Traceback" not in told
    size = part.stat().st_size
    assert 0 < size <= 400_000 and not weights(tmp_path).exists()
    process = start()
    process.communicate(timeout=20)
    assert process.returncode == 0 and weights(tmp_path).read_bytes() == BODY
    assert (server.requests[-1]["Range"], server.requests[-1]["If-Range"]) == (f"bytes={size}-", ETAG)


def test_a_full_disk_is_one_line(start, tmp_path):
    full = start(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000)))
    _, told = full.communicate(timeout=20)
    assert full.returncode == 1 and told.count("cannot write") == 1 and "Traceback" not in told
    assert weights(tmp_path).with_name("model.ckpt.part").stat().st_size == 300_000
    assert start().wait(timeout=20) == 0 and weights(tmp_path).read_bytes() == BODY


def shell_commands(repo_root):
    text = (repo_root / "README.md").read_text(encoding="utf-8")
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


def test_shell_commands_of_the_readme_exist(repo_root):
    assert all((repo_root / command).is_file() for command in shell_commands(repo_root))
