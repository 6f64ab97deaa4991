"""The wheel and the source distribution hold everything that an installed package needs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("ldm", "taming")
SOURCES = ("configs", "data", "models", *PACKAGES)
FILES = ("CHANGELOG.md", "LICENSE", "MANIFEST.in", "README.md", "constraints.txt", "pyproject.toml", "setup.py")
ASSETS = (
    "configs/emoji/prompts.txt",
    "configs/latent-diffusion/txt2img-1p4B-eval.yaml",
    "configs/retrieval-augmented-diffusion/768x768.yaml",
    "data/emoji/LICENSE-APACHE-2.0.txt",
    "data/emoji/LICENSE-OFL-1.1.txt",
    "data/emoji/drawings-64.webp",
    "data/emoji/vocab.txt",
    "data/inpainting_examples/coffee_mask.png",
    "data/inpainting_examples/drawings/penguin.png",
    "data/layout_examples/lake.json",
    "models/first_stage_models/kl-f8/config.yaml",
    "models/ldm/emoji64/class_names.txt",
    "models/ldm/emoji64/config.yaml",
    "models/ldm/emoji64/model.safetensors",
    "models/ldm/emoji64/vocab.txt",
    "models/ldm/emoji64-inpaint/model.safetensors",
    "models/ldm/emoji64-superres/model.safetensors",
)
# What an installed package does, from a folder that is not the checkout.
READ_ASSETS = """
import ldm, taming
from pathlib import Path
from ldm.config.assets import IS_CHECKOUT, ROOT, locate
from ldm.config.distribution import install_hint, version
from ldm.config.model_config import read_config
from ldm.config.model_files import available_models, find_model

here = Path(ldm.__file__).parent
assert not IS_CHECKOUT and ROOT == here / "assets", ROOT
assert read_config(find_model("emoji64").config)["target"]
assert locate("data/emoji/vocab.txt") == ROOT / "data/emoji/vocab.txt"
assert {"emoji64", "emoji64-inpaint", "emoji64-superres"} <= set(available_models())
print(version(), install_hint("clip"))
"""
SAMPLE = """
import ldm

model = ldm.load("emoji64", device="cpu")
image, = ldm.text_to_image(model, ["rocket on a blue background"], steps=2, seed=1, progress=False)
image.save("rocket.png")
print(image.size)
"""

pytestmark = pytest.mark.slow


def run(*command: str, cwd: Path, **environment: str) -> str:
    inherited = {name: value for name, value in os.environ.items() if name not in ("LDM_HOME", "PYTHONPATH")}
    done = subprocess.run(command, cwd=cwd, env={**inherited, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def source_tree(tmp_path_factory) -> Path:
    """Copy of what the build reads, with leftovers that it must not pick up."""
    tree = tmp_path_factory.mktemp("source")
    for folder in SOURCES:
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__", "*.ckpt", "rdm"))
    for file in FILES:
        shutil.copy(ROOT / file, tree)
    for leftover in ("build/lib/ldm/old.py", "models/ldm/celeba256/model.ckpt", "data/rdm/x.npz", "tests/test_x.py"):
        (tree / leftover).parent.mkdir(parents=True, exist_ok=True)
        (tree / leftover).touch()
    return tree


def build_wheel(tree: Path, target: Path) -> Path:
    options = ("--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(target))
    run(sys.executable, "-m", "pip", "wheel", *options, ".", cwd=tree)
    (wheel,) = target.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(source_tree, tmp_path_factory) -> Path:
    return build_wheel(source_tree, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """Folder into which the wheel is installed."""
    target = tmp_path_factory.mktemp("installed")
    options = ("--no-deps", "--no-index", "--quiet", "--target", str(target))
    run(sys.executable, "-m", "pip", "install", *options, str(wheel), cwd=target)
    return target


def relative(paths: Iterable[Path], folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in paths}


def files_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_the_wheel_holds_the_packages_and_their_assets(source_tree, wheel):
    assert wheel.name.startswith("latent_diffusion_models-") and wheel.name.endswith("-py3-none-any.whl")
    files = files_in(wheel)
    assert {name.partition("/")[0] for name in files} == set(PACKAGES)
    modules = {path for package in PACKAGES for path in (source_tree / package).rglob("*.py")}
    assert {name for name in files if name.endswith(".py")} == relative(modules, source_tree)
    assert {f"ldm/assets/{path}" for path in ASSETS} <= files
    configurations = {*source_tree.glob("configs/**/*.yaml"), *source_tree.glob("models/**/config.yaml")}
    shipped = {name.removeprefix("ldm/assets/") for name in files if name.endswith(".yaml")}
    assert len(shipped) > 40 and shipped == relative(configurations, source_tree)
    assert not [name for name in files if name.endswith((".ckpt", ".npz", ".pyc", ".ipynb"))]
    assert wheel.stat().st_size < 80_000_000


def test_the_wheel_has_the_command_and_the_licence(wheel):
    with zipfile.ZipFile(wheel) as archive:
        read = {name.partition(".dist-info/")[2]: name for name in archive.namelist()}
        assert "ldm = ldm.cli.main:main" in archive.read(read["entry_points.txt"]).decode()
        assert "licenses/LICENSE" in read


def test_a_source_distribution_builds_the_same_wheel(source_tree, wheel, tmp_path):
    build = f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})"
    run(sys.executable, "-c", build, cwd=source_tree)
    (archive,) = tmp_path.glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path, filter="data")
    tree = tmp_path / archive.name.removesuffix(".tar.gz")
    assert not (tree / "tests").exists() and not (tree / "data" / "rdm").exists()
    assert files_in(build_wheel(tree, tmp_path / "rebuilt")) == files_in(wheel)


def test_an_installed_package_finds_its_assets(installed, tmp_path):
    said = run(sys.executable, "-c", READ_ASSETS, cwd=tmp_path, PYTHONPATH=str(installed))
    version = next(installed.glob("*.dist-info")).name.removesuffix(".dist-info").partition("-")[2]
    assert said.strip() == f'{version} pip install "latent-diffusion-models[clip]"'


def test_the_installed_command_generates_an_image(installed, tmp_path):
    command = [str(installed / "bin" / "ldm"), "txt2img", "--prompt", "rocket", "--ddim_steps", "2", "--n_samples", "1"]
    run(*command, "--seed", "1", "--outdir", "out", cwd=tmp_path, PYTHONPATH=str(installed))
    assert [path.name for path in (tmp_path / "out" / "samples").iterdir()] == ["0000.png"]


def test_an_installed_package_generates_an_image(installed, tmp_path):
    assert run(sys.executable, "-c", SAMPLE, cwd=tmp_path, PYTHONPATH=str(installed)).strip() == "(64, 64)"
    assert [path.name for path in tmp_path.iterdir()] == ["rocket.png"]
