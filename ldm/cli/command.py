"""Shared parts of all commands: the parser, the exit status, the log lines."""

from __future__ import annotations

import argparse
import functools
import io
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, Protocol

from ldm.config import targets
from ldm.errors import Terminated, UserError, UserErrors, did_you_mean, is_out_of_memory

# Name of the program in help and errors; None is that of the script. `sys.argv` stays as it is, because training in
# several processes starts the command again from it.
_program: str | None = None


def set_program(name: str | None) -> None:
    """Set the name that parsers show, such as "ldm txt2img"; None shows the name of the script."""
    global _program
    _program = name


class Parser(argparse.ArgumentParser):
    """Argument parser that reports a mistake in one line, with the nearest known option."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"prog": _program, **kwargs})

    def error(self, message: str) -> NoReturn:
        """Print `error: …` and exit with status 2."""
        prefix = "unrecognized arguments: "
        if message.startswith(prefix):
            word = message.removeprefix(prefix).split("=")[0].split(" ")[0]
            message += did_you_mean(word, self._option_string_actions)
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


class Main(Protocol):
    """`main` of a command."""

    def __call__(self, argv: Sequence[str] | None = None) -> int:
        """Run the command line, by default that of the process, and return the exit status."""


def command(main: Callable[[Sequence[str] | None], int | None]) -> Main:
    """Make `main(argv)` return an exit status: its own if it has one, else 0.

    A mistake of the user returns 2, with one line on stderr. An interruption returns 130, and one by SIGTERM 143.
    """

    @functools.wraps(main)
    def wrapped(argv: Sequence[str] | None = None) -> int:
        _log_to_stderr()
        if isinstance(sys.stdout, io.TextIOWrapper):  # print "\xd7" where the encoding lacks "×"
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            with targets.allowing():  # targets that --allow-target adds are allowed until the command ends
                return main(argv) or 0
        except UserErrors as errors:
            return _fail("\n".join(f"error: {message}" for message in errors.messages), 2)
        except UserError as error:
            return _fail(f"error: {error}", 2)
        except KeyboardInterrupt as interruption:
            return _fail("interrupted", 143 if isinstance(interruption, Terminated) else 130)
        except BrokenPipeError:  # the reader of the output has closed it
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (Python flushes it when it ends)
            return 1
        except OSError as error:
            reason = " ".join(str(error.strerror or error).split())  # some libraries use several lines
            return _fail(f"error: {_shortened(error.filename)}: {reason}", 2)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return _fail("error: out of memory; use a smaller batch or smaller images", 2)

    return wrapped


def example(name: str, arguments: str) -> str:
    """Return an example of a command for its help, in the form in which it was called.

    Args:
        name: of the command, such as "txt2img".
        arguments: the rest of the line.
    """
    program = f"python scripts/{name}.py" if _program is None else _program
    return f"example: {program} {arguments}"


def program_of(name: str) -> str:
    """Return how to call another command, such as "train", in the form in which this one was called."""
    if _program is not None:
        return f"ldm {name}"
    return "python main.py" if name == "train" else f"python scripts/{name}.py"


def say(text: str) -> None:
    """Print a result on stdout."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _shortened(path: object, length: int = 200) -> str:
    text = f'"{path}"' if path is not None else "reading or writing failed"
    return text if len(text) <= length else f'{text[:length]}…"'


def _fail(message: str, status: int) -> int:
    sys.stderr.write(f"{message}\n")
    return status


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno <= logging.INFO else f"{record.levelname.lower()}: {text}"


class _Handler(logging.StreamHandler):
    """Log handler that writes above a progress bar, not behind it."""

    def emit(self, record: logging.LogRecord) -> None:
        bars = sys.modules.get("tqdm")
        if bars is None:
            return super().emit(record)
        with bars.tqdm.external_write_mode(file=self.stream):
            super().emit(record)


def _log_to_stderr() -> None:
    handler = _Handler()
    handler.setFormatter(_Formatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("ldm").setLevel(logging.INFO)
