"""Tests of the command `superres` with a tiny model."""

from __future__ import annotations

import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from task_checks import pixels
from tiny_models import superresolution_config, write_model

from ldm.cli import replay
from ldm.cli.superres import Superres, main
from ldm.config.instantiate import instantiate_from_config
from ldm.config.model_config import read_config
from ldm.config.model_info import ModelInfo
from ldm.pipelines import loading
from ldm.pipelines.loading import for_inference

TASK = Superres()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    write_model(folder, superresolution_config())
    return folder


@pytest.fixture
def enlarge(model, tmp_path):
    """Return a function that runs the command on `in`, or on the inputs of the options, and returns its exit status."""

    def run(*options: object, outdir: str = "out") -> int:
        fixed = ["--model", model, "--steps", 2, "--seed", 1, "--outdir", tmp_path / outdir]
        source = [] if "--image" in options else ["--indir", tmp_path / "in"]
        return main([str(each) for each in (*fixed, *source, *options)])

    return run


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


def make_image(height: int = 8, width: int = 8, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8))


def test_name_that_is_too_long_does_not_stop_the_others(enlarge, folder, tmp_path, caplog, capsys):
    """Names may have 255 bytes. The two inputs of one stem have results that are named after the whole input."""
    long, longest = "b" * 244, "c" * 251
    for name in ("a.png", f"{long}.png", f"{longest}.bmp", f"{longest}.png", "d.png"):
        make_image().save(folder / name)
    assert enlarge("--skip_grid") == 2
    errors = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert errors == [
        f'cannot write "{tmp_path / "out" / longest}.{suffix}.png": File name too long; choose a shorter name'
        for suffix in ("bmp", "png")
    ]
    assert capsys.readouterr().err.strip().endswith("error: 2 of 5 failed; see above")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", f"{long}.png", "d.png"]


def test_inputs_with_similar_names_have_results_of_their_own(enlarge, folder, tmp_path):
    names = ["a.bmp", "a.png", "a.png.png", "b.png", "c.png"]
    for index, name in enumerate(names):
        Image.new("RGB", (8, 8), (40 * index, 0, 0)).save(folder / name)
    assert enlarge("--skip_grid") == 0
    results = sorted((tmp_path / "out").iterdir())
    assert [path.name for path in results] == ["a.bmp.png", "a.png.png", "a.png.png.png", "b.png", "c.png"]
    assert [Image.open(path).text["image"].rpartition("/")[2] for path in results] == names


@pytest.mark.parametrize("size", [(8, 8), (5, 7), (1, 1), (9, 21)])
@pytest.mark.parametrize("tile", [[], ["--tile", 0], ["--tile", 8]], ids=str)
def test_images_of_any_size_are_doubled(enlarge, folder, tmp_path, size, tile):
    make_image(*size).save(folder / "x.png")
    assert enlarge(*tile) == 0
    assert pixels(tmp_path / "out" / "x.png").shape == (2 * size[0], 2 * size[1], 3)
    grid = pixels(tmp_path / "out" / "grid-0000.png")
    assert grid.shape == (2 * size[0] + 4, 4 * size[1] + 6, 3), "bicubic beside the result"


@pytest.mark.parametrize("options", [(), ("--eta", 0), ("--plms",), ("--dpm",)], ids=str)
def test_image_does_not_depend_on_the_batch_size(enlarge, folder, tmp_path, options):
    for i in range(8):
        make_image(8, 12, seed=i).save(folder / f"{i}.png")
    for size in (1, 3, 8):
        assert enlarge("--batch_size", size, "--skip_grid", *options, outdir=f"b{size}") == 0
    for i in range(8):
        alone, three, eight = (pixels(tmp_path / f"b{size}" / f"{i}.png") for size in (1, 3, 8))
        assert np.abs(alone - three).max() <= 1 and np.abs(alone - eight).max() <= 1


def test_replay_is_identical(enlarge, folder, tmp_path):
    make_image(9, 12).save(folder / "x.png")
    assert enlarge("--eta", 0.5) == 0
    assert replay.main([str(tmp_path / "out" / "x.png")]) == 0
    with Image.open(tmp_path / "out" / "x.png") as file:
        assert file.text["factor"] == "2" and file.text["tile"] == "16"


def test_unreadable_image_is_one_line_and_the_others_are_enlarged(enlarge, folder, tmp_path, caplog):
    for stem in ("a", "x", "z"):
        make_image().save(folder / f"{stem}.png")
    (folder / "x.png").write_text("text")
    assert enlarge() == 2
    (error,) = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert "x.png" in error and "cannot read" in error and "\n" not in error
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "grid-0000.png", "z.png"]


OPTIONS = {
    "no folder": (["--indir", "nowhere"], "there is no such folder"),
    "tile": (["--image", "{x}", "--tile", "9"], "tile 9 is not a multiple of 4"),
    "outdir": (["--image", "{x}", "--outdir", "{in}"], "is the folder of the input"),
    "eta": (["--image", "{x}", "--dpm", "--eta", "0.5"], 'sampler "dpm" is deterministic; eta must be 0, got 0.5'),
    "text model": (
        ["--image", "{x}", "--model", "emoji64"],
        '"caption", not on "LR_image"; choose a super-resolution model',
    ),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_invalid_option_is_one_line(model, folder, tmp_path, capsys, monkeypatch, case):
    options, message = OPTIONS[case]
    make_image().save(folder / "x.png")
    monkeypatch.setattr(loading, "load_files", None)  # not reached
    options = [option.format(**{"in": folder, "x": folder / "x.png"}) for option in options]
    fixed = [] if "--model" in options else ["--model", str(model)]
    assert main([*fixed, "--outdir", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error and not (tmp_path / "out").exists()


PHOTOGRAPHS = "--indir data/superres_examples --outdir outputs/superres --seed 1"


@pytest.mark.parametrize(
    ("line", "images"),
    [
        (TASK.arguments, ["alarm_clock", "octopus", "penguin", "pineapple", "strawberry", "sunflower"]),
        (PHOTOGRAPHS, ["astronaut", "chelsea"]),
    ],
)
def test_examples_work_as_typed(repo_root, model, tmp_path, monkeypatch, line, images):
    """A tiny model replaces the real one; the command is the script."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(repo_root / "data")
    options = shlex.split(line)
    command = [
        sys.executable,
        repo_root / "scripts/superres.py",
        *options,
        "--model",
        model,
        "--steps",
        "1",
        "--tile",
        "0",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    results = sorted(path.name for path in (tmp_path / "outputs/superres").iterdir())
    assert results == sorted(f"{name}.png" for name in [*images, "grid-0000"])


@pytest.mark.parametrize(
    ("path", "small", "latent"),
    [("models/ldm/bsr_sr/config.yaml", (16, 24), (16, 24)), ("configs/emoji/superres_64.yaml", (16, 32), (8, 16))],
)
def test_configurations_suit_the_task(repo_root, path, small, latent):
    """The published and the bundled model enlarge four times; their networks take the conditioning of the task."""
    config = read_config(repo_root / path)
    pipeline = TASK.pipeline(TASK.make_parser().parse_args(["--image", "x"]), ModelInfo("m", config))
    pipeline.check(ModelInfo("m", config))
    assert pipeline.factor == 4 and pipeline.steps == 100 and pipeline.eta == 1
    with torch.device("meta"):
        model = instantiate_from_config(for_inference(config))
        conditioning = model.get_learned_conditioning(torch.zeros(2, 3, *small))
        latents = torch.zeros(2, model.channels, *latent)
        assert model.apply_model(latents, torch.zeros(2), conditioning).shape == latents.shape
    assert pipeline.tile == model.image_size * model.downsampling
