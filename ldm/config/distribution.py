"""Name and version of the installed distribution, and how to install one of its extras."""

from __future__ import annotations

from ldm.config import assets

DISTRIBUTION = "latent-diffusion-models"  # the name that pip knows; the packages are `ldm` and `taming`


def version() -> str:
    """Return the version of this project, such as "0.2.0".

    A checkout states it in `pyproject.toml`, an installed package in its metadata. Without either it is "unknown".
    """
    stated = assets.REPOSITORY / "pyproject.toml"
    if assets.IS_CHECKOUT and stated.is_file():
        import tomllib

        with stated.open("rb") as file:
            return tomllib.load(file)["project"]["version"]
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed_version

    try:
        return installed_version(DISTRIBUTION)
    except PackageNotFoundError:
        return "unknown"


def install_hint(extra: str = "") -> str:
    """Return the command that installs the project with one of its extras, for messages about a missing package.

    Args:
        extra: a name from `[project.optional-dependencies]`, such as "clip"; none for the core dependencies.
    """
    what = "." if assets.IS_CHECKOUT else DISTRIBUTION
    what = f'"{what}[{extra}]"' if extra else what
    return f"pip install -e {what}" if assets.IS_CHECKOUT else f"pip install {what}"
