"""Packages that compute the metrics, and their versions."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from ldm.config import distribution
from ldm.errors import UserError

PACKAGES = ("torch-fidelity", "torchmetrics", "torch", "numpy", "pillow")


def check_installed() -> None:
    """Raise an error unless torch-fidelity can be imported.

    Raises:
        UserError: it is not installed.
    """
    if find_spec("torch_fidelity") is None:
        hint = distribution.install_hint("evaluation")
        raise UserError(f'the package "torch-fidelity" computes the metrics and is not installed; {hint}')


def versions() -> dict[str, str]:
    """Return the versions of this project and of the packages that a figure depends on."""
    found = {"ldm": distribution.version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found
