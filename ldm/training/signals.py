"""Signals that ask a training run for a checkpoint or for its end, in one process or several."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import socket
import threading
from types import FrameType
from typing import TYPE_CHECKING, Any

from torch.utils.data import get_worker_info

from ldm.errors import Terminated
from ldm.training.processes import any_process, end_launched, spawns

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

logger = logging.getLogger(__name__)

# Seconds until a run ends without a checkpoint: after SIGTERM, and after a second SIGTERM or Ctrl-C.
GRACE_SECONDS, SHORT_GRACE_SECONDS = 30.0, 5.0
STATUS_AFTER_INTERRUPT, STATUS_AFTER_SIGTERM = 128 + 2, 128 + 15


class SignalRequests:
    """Requests that signals make during training.

    SIGUSR1 requests a checkpoint, Ctrl-C (SIGINT) and SIGTERM a checkpoint and the end, and SIGUSR2 the debugger. The
    first three only set a flag, which is read at the end of the current batch, because the weights change in between.
    There all processes take the decision together, since saving involves all of them and the signal may have reached
    only one. A second Ctrl-C or SIGTERM stops immediately, as does the first one before training has started.

    Python does not run the handler of a signal while its main thread waits inside a library, e.g. for another process.
    A thread therefore watches the signals too. It ends a run that has not stopped within `GRACE_SECONDS`.
    """

    def __init__(self) -> None:
        self._save = self._stop = self._stop_agreed = self._is_sigterm = False
        self._has_begun = False
        self._trainer: Trainer | None = None
        self._previous_handlers: dict[int, Any] = {}
        self._watcher: _Watcher | None = None

    def __getstate__(self) -> dict[str, Any]:
        # `ddp_spawn` sends callbacks to new processes, which install handlers of their own.
        return {**self.__dict__, "_previous_handlers": {}, "_watcher": None}

    @property
    def stop_requested(self) -> bool:
        """Return whether a signal has asked this process to stop."""
        return self._stop

    @property
    def stop_agreed(self) -> bool:
        """Return whether all processes have agreed to stop."""
        return self._stop_agreed

    def install(self, trainer: Trainer) -> None:
        """Install the handlers and the watching thread for `trainer`; only the main thread can do this."""
        self._trainer = trainer
        self._install_handlers()
        if self._watcher is None and threading.current_thread() is threading.main_thread():
            self._watcher = _Watcher(self)

    def _install_handlers(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        handlers = {
            "SIGUSR1": self._request_checkpoint,
            "SIGUSR2": _debug,
            "SIGINT": self._request_end,
            "SIGTERM": self._request_end,
        }
        for name, handler in handlers.items():
            if hasattr(signal, name):  # Windows has no SIGUSR1
                number = getattr(signal, name)
                self._previous_handlers.setdefault(number, signal.signal(number, handler))

    def restore(self) -> None:
        """Restore the previous handlers."""
        if self._watcher is not None:
            self._watcher.close()
            self._watcher = None
        while self._previous_handlers:
            signal.signal(*self._previous_handlers.popitem())

    def begin(self, trainer: Trainer) -> None:
        """Start to collect requests for the end of the current batch of `trainer`, and replace Lightning's handlers."""
        self._has_begun, self._trainer = True, trainer
        self._install_handlers()

    def take(self) -> tuple[bool, bool]:
        """Return whether a checkpoint and whether the end is requested, in any process; forget the first."""
        save, stop, is_sigterm = any_process(self._save, self._stop, self._is_sigterm)
        if save:  # one that arrives meanwhile is for the next batch
            self._save = False
        self._agree(stop, is_sigterm)
        return save, stop

    def take_stop(self) -> bool:
        """Return whether the end is requested, in any process."""
        stop, is_sigterm = any_process(self._stop, self._is_sigterm)
        self._agree(stop, is_sigterm)
        return stop

    def interruption(self) -> BaseException:
        """Return the exception that ends this process after all have agreed to stop."""
        # The parent of a process of `ddp_spawn` waits for its result forever, unless it ends with an error status.
        if multiprocessing.parent_process() is not None:
            return SystemExit(STATUS_AFTER_SIGTERM if self._is_sigterm else STATUS_AFTER_INTERRUPT)
        return self.reported_interruption()

    def reported_interruption(self) -> KeyboardInterrupt:
        """Return the interruption that decides the exit status of the command."""
        return Terminated() if self._is_sigterm else KeyboardInterrupt()

    def _agree(self, stop: bool, is_sigterm: bool) -> None:
        self._stop_agreed = self._stop_agreed or stop
        self._is_sigterm = self._is_sigterm or is_sigterm  # a signal may have arrived meanwhile
        if stop:
            self.allow_time()

    def allow_time(self) -> None:
        """Let the run take any time from here on, because it saves a checkpoint."""
        if self._watcher is not None:
            self._watcher.cancel()

    def _request_checkpoint(self, number: int, frame: FrameType | None) -> None:
        self._save = True
        self._forward(number)

    def _request_end(self, number: int, frame: FrameType | None) -> None:
        forwarded = self._forward(number)
        self._is_sigterm = self._is_sigterm or number == signal.SIGTERM
        if self._stop or not (self._has_begun or forwarded):
            raise self.reported_interruption()
        self._stop = True
        if os.environ.get("LOCAL_RANK", "0") == "0":
            again = "press Ctrl-C again" if number == signal.SIGINT else "send the signal again"
            logger.warning("stopping after this batch; %s to stop immediately", again)

    def _forward(self, number: int) -> bool:
        """Send a signal to the processes that train instead of this one, if there are any, and return if there are."""
        launcher: Any = self._trainer.strategy.launcher if self._trainer and spawns(self._trainer) else None
        if launcher is None or not launcher.procs:
            return False
        launcher.kill(number)
        return True

    def end_launched_processes(self) -> None:
        """End the processes that this one has launched, as `processes.end_launched`."""
        if self._trainer is not None:
            end_launched(self._trainer)


class _Watcher:
    """Thread that ends the process some time after SIGTERM, even if the main thread never runs Python again."""

    def __init__(self, requests: SignalRequests) -> None:
        self._requests = requests
        self._counts: dict[int, int] = {signal.SIGTERM: 0, signal.SIGINT: 0}
        self._timer: threading.Timer | None = None
        self._closed = False
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        # The interpreter writes the number of each signal at once, also while the main thread waits.
        self._previous = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="signal-watcher", daemon=True).start()

    def _watch(self) -> None:
        while numbers := self._reader.recv(64):
            for number in numbers:
                if number in self._counts:
                    self._counts[number] += 1
                    if self._counts[number] > 1:
                        self._start(SHORT_GRACE_SECONDS)
                    elif number == signal.SIGTERM:
                        self._start(GRACE_SECONDS)
        self._reader.close()

    def _start(self, seconds: float) -> None:
        self.cancel()
        if self._closed:
            return
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True
        self._timer.start()

    def _end(self) -> None:
        os.write(2, b"error: the run did not stop in time after a signal and was ended without a checkpoint\n")
        try:
            self._requests.end_launched_processes()
        finally:
            os._exit(STATUS_AFTER_SIGTERM)

    def cancel(self) -> None:
        """Stop the countdown, if there is one."""
        if self._timer is not None:
            self._timer.cancel()

    def close(self) -> None:
        """End the thread; signals are no longer watched."""
        self._closed = True
        self.cancel()
        signal.set_wakeup_fd(self._previous)
        self._writer.close()  # `recv` returns nothing then


def leave_signals_to_main_process() -> None:
    """Ignore Ctrl-C in a worker of a data loader, and do not report signals to the watcher of its parent process."""
    if get_worker_info() is not None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _debug(number: int, frame: FrameType | None) -> None:
    import pdb

    pdb.Pdb(nosigint=True).set_trace(frame)
