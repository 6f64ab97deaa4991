"""Fixtures of all tests: no network, a fixed seed, the repository root, loaded scripts."""

from __future__ import annotations

import builtins
import importlib.util
import os
import random
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

# Before any test imports a Hugging Face package: a missing file is an error at once, not a retry.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

LOCAL_HOSTS = {"localhost", "127.0.0.1", "::1", "0.0.0.0", ""}


class NetworkError(RuntimeError):
    """Raised when a test uses the network."""


def _is_local(sock: socket.socket, address: object) -> bool:
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return True  # sockets of the operating system, e.g. between worker processes
    host = address[0] if isinstance(address, tuple) and address else ""
    return host in LOCAL_HOSTS


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Let connections to other computers fail."""

    def guarded(name):
        original = getattr(socket.socket, name)

        def connect(self, address):
            if not _is_local(self, address):
                raise NetworkError(f"tests have no network; something connects to {address}")
            return original(self, address)

        monkeypatch.setattr(socket.socket, name, connect)

    guarded("connect")
    guarded("connect_ex")
    original_lookup = socket.getaddrinfo

    def lookup(host, *args, **kwargs):
        if host not in (None, *LOCAL_HOSTS, socket.gethostname()):
            raise NetworkError(f"tests have no network; something looks up {host}")
        return original_lookup(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", lookup)


@pytest.fixture
def seed() -> int:
    """Seed every random generator; return the seed."""
    import numpy as np
    import torch

    value = 23
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)
    return value


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """Return the folder of pyproject.toml."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def load_script(repo_root) -> Callable[..., ModuleType]:
    """Return a function: `load_script("txt2img")` loads scripts/txt2img.py once and returns the module."""

    def load(name: str, folder: str = "scripts") -> ModuleType:
        full_name = f"{folder}.{name}"
        if full_name not in sys.modules:
            spec = importlib.util.spec_from_file_location(full_name, repo_root / folder / f"{name}.py")
            sys.modules[full_name] = module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        return sys.modules[full_name]

    return load


@pytest.fixture
def hide_package(monkeypatch):
    """Return a function that makes a package look as if it were not installed."""

    def hide(package: str) -> None:
        real = builtins.__import__

        def without(name, *args, **kwargs):
            if name.partition(".")[0] == package:
                raise ModuleNotFoundError(f"No module named {package!r}", name=package)
            return real(name, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", without)

    return hide
