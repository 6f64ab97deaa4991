"""Tests of the command `sample_diffusion` with tiny models."""

from __future__ import annotations

import shlex
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from sample_runs import array, run_of, same, samples
from tiny_models import EMOJI_CLASSES, class_config, pixel_config, text_config, unconditional_config, write_model

from ldm.cli import replay
from ldm.cli.sample_diffusion import SampleDiffusion, main
from ldm.config.instantiate import instantiate_from_config
from ldm.config.model_config import read_config
from ldm.config.model_info import ModelInfo
from ldm.pipelines.classes import class_conditioning
from ldm.pipelines.loading import for_inference, load_model
from ldm.pipelines.preparation import prepared

TASK = SampleDiffusion()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return unconditional, class-conditional and text-conditional models, a pixel-space one, and one of layouts."""
    base = tmp_path_factory.mktemp("models")
    write_model(base / "faces", unconditional_config(timesteps=20), global_step=1234)
    write_model(base / "guided", class_config(4, cond_dropout=0.1))
    write_model(base / "unguided", class_config(3))
    write_model(base / "drawings", text_config(class_names=str(EMOJI_CLASSES)))
    write_model(base / "pixels", pixel_config(timesteps=20))
    write_model(base / "boxes", text_config(cond_stage_key="coordinates_bbox"))
    return base


@pytest.fixture
def sample(models, tmp_path):
    """Return a function that runs the command in few steps and returns its exit status."""

    def run(model: str | None, *options: object) -> int:
        fixed = [] if model is None else ["-r", models / model, "-l", tmp_path, "-c", 3, "--seed", 7]
        return main([str(each) for each in (*fixed, *options)])

    return run


@pytest.mark.parametrize("options", [(), ("-v",), ("-e", 0), ("--dpm",), ("--plms",)], ids=str)
def test_sample_does_not_depend_on_the_batch_size(sample, tmp_path, options):
    runs = []
    for size in (1, 3, 8):
        assert sample("faces", "-n", 8, "--batch_size", size, "-l", tmp_path / str(size), *options) == 0
        runs.append(samples(run_of(tmp_path / str(size))))
    for alone, threes, eights in zip(*runs, strict=True):
        assert np.abs(alone - threes).max() <= 1 and np.abs(alone - eights).max() <= 1
    assert (runs[0][0] != runs[0][1]).any()


def test_vanilla_sampling_equals_that_of_the_model(models, sample, tmp_path):
    """It takes every timestep, as `p_sample_loop` does from the same noise."""
    from ldm.io.pixels import to_uint8
    from ldm.models.diffusion.noise import SeededNoise

    assert sample("pixels", "-n", 2, "-v") == 0
    model = load_model(models / "pixels" / "config.yaml", models / "pixels" / "model.ckpt")
    with prepared(model, packed=True):
        sampled = model.p_sample_loop((2, 3, 8, 8), noise_sampler=SeededNoise([7, 8]), verbose=False)
    assert same(samples(run_of(tmp_path, "pixels")), list(to_uint8(sampled.clamp(-1, 1))))
    text = Image.open(run_of(tmp_path, "pixels") / "img/sample_000000.png").text
    assert (text["sampler"], text["steps"]) == ("ddpm", "20")


def test_samples_cycle_through_the_classes(sample, tmp_path):
    assert sample("guided", "-n", 8) == 0
    arrays = array(run_of(tmp_path, "guided"))
    assert arrays["arr_1"].tolist() == [0, 1, 2, 0, 1, 2, 0, 1] and arrays["arr_1"].dtype == np.int64


def test_chosen_classes_are_guided(sample, tmp_path):
    for scale in (1, 3):
        assert sample("guided", "-n", 4, "--classes", "2", "0-1", "--scale", scale, "-l", tmp_path / str(scale)) == 0
    plain, guided = (run_of(tmp_path / str(scale), "guided") for scale in (1, 3))
    assert array(plain)["arr_1"].tolist() == [2, 0, 1, 2]
    assert all((a != b).any() for a, b in zip(samples(plain), samples(guided), strict=True))


def test_class_names_make_a_text_model_class_conditional(sample, tmp_path):
    assert sample("drawings", "-n", 2, "--classes", "red heart", "fox", "--scale", 3) == 0
    folder = run_of(tmp_path, "drawings")
    assert [Image.open(folder / f"img/sample_00000{i}.png").text["class"] for i in range(2)] == ["red heart", "fox"]
    assert array(folder)["arr_1"].tolist() == [150, 1160]


@pytest.mark.parametrize("model", ["faces", "guided", "drawings"])
def test_replay_is_identical(sample, tmp_path, capsys, model):
    assert sample(model, "-n", 5, "--batch_size", 3) == 0
    paths = [str(path) for path in sorted((run_of(tmp_path, model) / "img").iterdir())]
    assert replay.main(paths) == 0
    assert capsys.readouterr().out.count(": identical\n") == 5


def test_overrides_change_the_configuration(sample, tmp_path):
    given = "model.params.scale_factor=0.3"
    for folder, options in (("a", ()), ("b", ("--classes", "0", given)), ("c", (given, "--classes", "0"))):
        assert sample("guided", "-n", 1, "-l", tmp_path / folder, *options) == 0
    one, two, three = (run_of(tmp_path / folder, "guided") for folder in "abc")
    assert same(samples(two), samples(three)) and not same(samples(one), samples(two))
    assert replay.main([str(two / "img" / "sample_000000.png")]) == 0


BAD = {
    "no model named": ([], "name its folder with -r"),
    "no such model": (["-r", "nope"], "no model"),
    "two models": (["-r", "{models}/faces", "--model", "x"], "leave out --model"),
    "layouts": (["-r", "{models}/boxes"], "choose a class-conditional model"),
    "classes of an unconditional model": (["-r", "{models}/faces", "--classes", "1"], "leave out --classes"),
    "guidance of an unconditional model": (["-r", "{models}/faces", "--scale", "2"], "leave out --scale"),
    "no null class": (["-r", "{models}/unguided", "--scale", "2"], "no null class"),
    "unknown class": (["-r", "{models}/drawings", "--classes", "rockett"], 'did you mean "rocket"'),
    "class beyond": (["-r", "{models}/guided", "--classes", "0-3"], "are 0 to 2"),
    "steps": (["-r", "{models}/faces", "-c", "21"], "20 or fewer"),
    "noisy dpm": (["-r", "{models}/faces", "--dpm", "-e", "1"], 'sampler "dpm" is deterministic; eta must be 0, got 1'),
    "stray word": (["-r", "{models}/faces", "words"], "model.key.sub=value"),
    "another section": (["-r", "{models}/faces", "data.params.x=1"], "model.key.sub=value"),
    "unknown value": (["-r", "{models}/faces", "model.params.timestep=9"], 'did you mean "timesteps"'),
    "logdir is a file": (["-r", "{models}/faces", "-l", "{models}/faces/config.yaml"], "is a file"),
}


@pytest.mark.parametrize("case", BAD)
def test_error_is_one_line_and_writes_nothing(models, tmp_path, monkeypatch, capsys, case):
    options, message = BAD[case]
    monkeypatch.chdir(tmp_path)
    before = sorted(models.rglob("*"))
    assert main(["-n", "1", "-c", "1", *(option.replace("{models}", str(models)) for option in options)]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("error: ") and message in error[-1]
    assert not list(tmp_path.iterdir()) and sorted(models.rglob("*")) == before


def test_published_options_keep_their_defaults():
    args = vars(TASK.make_parser().parse_args([]))
    published = {"resume": None, "n_samples": 50_000, "vanilla_sample": False, "logdir": "none", "steps": 50}
    assert {key: args[key] for key in published} == published and args["batch_size"] == 10
    settings = TASK.pipeline(TASK.parse([]), ModelInfo("x", unconditional_config(timesteps=50))).settings()
    assert {key: settings[key] for key in ("sampler", "steps", "eta")} == {"sampler": "ddim", "steps": 50, "eta": 1.0}


def test_example_works_as_typed(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(models / "drawings", tmp_path / "models/ldm/emoji64")
    assert main([*shlex.split(TASK.arguments), "-c", "1"]) == 0
    folder = run_of(tmp_path / "outputs", "emoji64")
    assert array(folder)["arr_0"].shape == (64, 16, 16, 3)
    assert Image.open(folder / "grid.png").size == (8 * 18 + 2, 8 * 18 + 2)


@pytest.mark.parametrize("name", ["celeba256", "ffhq256", "lsun_beds256", "lsun_churches256"])
def test_published_models_suit_the_task(repo_root, name):
    """The shapes are checked on the meta device."""
    config = read_config(repo_root / "models" / "ldm" / name / "config.yaml")
    with torch.device("meta"):
        model = instantiate_from_config(for_inference(config))
    pipeline = TASK.pipeline(TASK.parse([]), ModelInfo(name, config))
    assert (pipeline.height, pipeline.width) == (256, 256) and class_conditioning(model, [None]) == (None, None)
    side = 256 // model.downsampling
    latents = torch.empty(2, model.channels, side, side, device="meta")
    assert model.apply_model(latents, torch.empty(2, device="meta"), None).shape == latents.shape
