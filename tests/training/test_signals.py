"""Requests of signals in one process."""

import os
import signal
import subprocess
import sys
import types

import pytest

from ldm.cli.command import command
from ldm.errors import Terminated
from ldm.training import signals
from ldm.training.signals import SignalRequests

INTERRUPTIONS = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}
TRAINER = types.SimpleNamespace(strategy=types.SimpleNamespace(launcher=None))


@pytest.fixture
def requests():
    """Return installed requests, whose handlers are removed afterwards."""
    numbers = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    requests = SignalRequests()
    requests.install(TRAINER)
    yield requests
    requests.restore()
    assert [signal.getsignal(number) for number in numbers] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_checkpoint_is_requested_once(requests):
    requests.begin(TRAINER)
    assert requests.take() == (False, False)
    signal.raise_signal(signal.SIGUSR1)
    assert not requests.take_stop()
    assert requests.take() == (True, False)
    assert requests.take() == (False, False)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_end_is_requested_and_a_second_signal_stops_immediately(number, requests, caplog):
    requests.begin(TRAINER)
    signal.raise_signal(number)
    assert not requests.stop_agreed
    assert requests.take() == (False, True)
    assert requests.take_stop() and requests.stop_agreed
    assert [record.getMessage().split(";")[0] for record in caplog.records] == ["stopping after this batch"]
    assert type(requests.interruption()) is INTERRUPTIONS[number]
    with pytest.raises(INTERRUPTIONS[number]):
        signal.raise_signal(number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_before_the_first_batch_stops_immediately(number, requests):
    with pytest.raises(KeyboardInterrupt) as raised:
        signal.raise_signal(number)
    assert raised.type is INTERRUPTIONS[number]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_sigterm_exits_with_143_and_ctrl_c_with_130(number, status, requests, capsys):
    assert command(lambda argv: signal.raise_signal(number))([]) == status
    assert capsys.readouterr().err == "interrupted\n"


def test_request_of_another_process_is_followed(requests, monkeypatch):
    requests.begin(TRAINER)
    monkeypatch.setattr(signals, "any_process", lambda *flags: (True,) * len(flags))
    assert requests.take() == (True, True)
    assert requests.stop_agreed


def test_handlers_replace_those_that_lightning_installs(requests):
    """Lightning's handler of SIGTERM sends a message to the other processes, which may wait for another one."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    requests.begin(TRAINER)
    signal.raise_signal(signal.SIGTERM)
    assert requests.take_stop()


BLOCKED = """
import ctypes, sys, types
from ldm.training import signals

signals.GRACE_SECONDS = 0.2
requests = signals.SignalRequests()
launcher = types.SimpleNamespace(kill=lambda number: print("killed", number, flush=True))
requests.install(types.SimpleNamespace(strategy=types.SimpleNamespace(launcher=launcher)))
mutex = ctypes.create_string_buffer(128)
print("ready", flush=True)
for _ in range(2):  # the second call waits for ever, and no Python code runs
    ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the mutex is that of Linux")
def test_sigterm_ends_a_process_that_waits_for_others(repo_root):
    command = [sys.executable, "-c", BLOCKED]
    environment = {**os.environ, "PYTHONPATH": str(repo_root)}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    try:
        assert process.stdout.readline() == "ready\n"
        process.terminate()
        output, error = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 143
    assert output == f"killed {signal.SIGKILL.value}\n"
    assert error == "error: the run did not stop in time after a signal and was ended without a checkpoint\n"
