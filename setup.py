"""Build step that puts the project's small files into `ldm/assets`; everything else is in pyproject.toml."""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
# MANIFEST.in lists the same files for source distributions.
ASSETS = (
    "configs/**/*.yaml",
    "configs/**/*.txt",
    "models/**/config.yaml",
    "models/ldm/emoji64*/*.txt",
    "models/ldm/emoji64*/model.safetensors",
    "data/emoji/*",
    "data/*_examples/**/*",
)


def asset_files() -> list[Path]:
    """Return the files that an installed package carries, relative to the repository."""
    found = {path for pattern in ASSETS for path in ROOT.glob(pattern) if path.is_file()}
    return sorted(path.relative_to(ROOT) for path in found)


class BuildWithAssets(build_py):
    """`build_py` that copies the assets, except for editable installs, which read them from the checkout."""

    def run(self) -> None:
        """Build the packages from scratch: an earlier build may hold modules that were moved since."""
        if not self.editable_mode:
            for package in ("ldm", "taming"):
                shutil.rmtree(Path(self.build_lib, package), ignore_errors=True)
        super().run()
        if not self.editable_mode:
            for source, target in self._asset_targets().items():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """Return every file that the build writes."""
        assets = [] if self.editable_mode else [str(target) for target in self._asset_targets().values()]
        return [*super().get_outputs(include_bytecode), *assets]

    def _asset_targets(self) -> dict[Path, Path]:
        return {ROOT / file: Path(self.build_lib, "ldm", "assets", file) for file in asset_files()}


setup(cmdclass={"build_py": BuildWithAssets})
