"""Tests of the command `class2img` with tiny models."""

from __future__ import annotations

import shlex
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import EMOJI_CLASSES, class_config, text_config, unconditional_config, write_model

from ldm.cli import replay
from ldm.cli.class2img import Class2Img, main
from ldm.cli.options import sampler_settings
from ldm.config.instantiate import instantiate_from_config
from ldm.config.model_config import read_config
from ldm.config.model_info import ModelInfo
from ldm.errors import UserError
from ldm.io.pixels import to_uint8
from ldm.models.diffusion.noise import SeededNoise
from ldm.pipelines.classes import ClassRequest, class_conditioning
from ldm.pipelines.loading import for_inference, load_model
from ldm.pipelines.sampling import decode, sample_latents

TASK = Class2Img()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return models with a null class, without one, with named classes, with text as classes, and without classes."""
    base = tmp_path_factory.mktemp("models")
    write_model(base / "guided", class_config(11, cond_dropout=0.1))
    write_model(base / "unguided", class_config(11))
    write_model(base / "imagenet", class_config(1001, class_names="imagenet"))
    write_model(base / "drawings", text_config(class_names=str(EMOJI_CLASSES)))
    write_model(base / "nothing", unconditional_config())
    return base


@pytest.fixture
def sample(models, tmp_path):
    """Return a function that runs the command in few steps and returns the images and their text."""

    def run(folder: str, model: str, *options: object) -> list[tuple[np.ndarray, dict[str, str]]]:
        fixed = ["--model", models / model, "--steps", 3, "--seed", 1, "--outdir", tmp_path / folder]
        assert main([str(each) for each in (*fixed, *options)]) == 0
        found = []
        for path in sorted((tmp_path / folder / "samples").iterdir()):
            with Image.open(path) as file:
                found.append((np.asarray(file).astype(int), file.text))
        return found

    return run


def test_each_class_is_a_row_of_the_grid(sample, tmp_path):
    found = sample("out", "imagenet", "--classes", "fire salamander", "992", "--n_samples", 3)
    assert [(text["class_label"], text["class"]) for _, text in found] == [
        *3 * [("25", "European fire salamander")],
        *3 * [("992", "agaric")],
    ]
    with Image.open(tmp_path / "out" / "grid-0000.png") as grid:
        assert grid.size == (3 * 18 + 2, 2 * 18 + 2)
        assert grid.text["class"] == "European fire salamander\nagaric"
    assert (found[0][0] != found[3][0]).any() and (found[0][0] != found[1][0]).any()


def test_image_equals_that_of_the_sampler(models, sample):
    """The sampler is called with class 4 as the conditioning, and the last class as the unconditional one."""
    (image, text), *_ = sample("out", "guided", "--classes", 4, "--n_samples", 1)
    model = load_model(models / "guided" / "config.yaml", models / "guided" / "model.ckpt")
    table = model.cond_stage_model.embedding.weight.detach()
    latents = sample_latents(
        model,
        (1, 3, 8, 8),
        sampler="ddim",
        steps=3,
        scale=3.0,
        cond=table[4][None, None],
        uncond=table[10][None, None],
        noise=SeededNoise([int(text["seed"])]),
    )
    assert (to_uint8(decode(model, latents))[0] == image).all()


@pytest.mark.parametrize("model", ["guided", "drawings"])
def test_image_does_not_depend_on_the_batch_size(sample, model):
    alone, threes, eights = (
        sample(f"b{n}", model, "--classes", "0-3", "--n_samples", 2, "--eta", 1, "--batch_size", n) for n in (1, 3, 8)
    )
    for i in range(8):
        assert np.abs(alone[i][0] - threes[i][0]).max() <= 1 and np.abs(alone[i][0] - eights[i][0]).max() <= 1


@pytest.mark.parametrize("model", ["guided", "drawings"])
def test_replay_is_identical(sample, tmp_path, capsys, model):
    sample("out", model, "--classes", 1, 2, "--n_samples", 2, "--batch_size", 3, "--dpm")
    paths = [str(path) for path in sorted((tmp_path / "out" / "samples").iterdir())]
    assert replay.main(paths) == 0
    assert capsys.readouterr().out.count(": identical\n") == 4


def test_class_names_make_a_text_model_class_conditional(sample):
    (_, text), *_ = sample("out", "drawings", "--classes", "Red Heart", "--n_samples", 1)
    assert text["class"] == "red heart" and text["scale"] == "3.0"


def test_default_classes_are_the_first_ones(sample):
    labels = [text["class_label"] for _, text in sample("out", "guided")]
    assert labels == [str(label) for label in range(4) for _ in range(6)]


BAD = {
    "no null class": (["--model", "{models}/unguided"], "no null class"),
    "no classes": (
        ["--model", "{models}/nothing"],
        "has no classes; sample from it with sample_diffusion",
    ),
    "unknown class": (["--model", "{models}/imagenet", "--classes", "goldfisch"], 'did you mean "goldfish"'),
    "class beyond": (["--model", "{models}/guided", "--classes", "10"], "are 0 to 9"),
    "steps": (["--model", "{models}/guided", "--steps", "101"], "100 or fewer"),
    "noisy dpm": (
        ["--model", "{models}/guided", "--dpm", "--eta", "1"],
        '"dpm" is deterministic; eta must be 0, got 1',
    ),
    "no such model": (["--model", "nope"], "no model"),
}


@pytest.mark.parametrize("case", BAD)
def test_error_is_one_line_and_writes_nothing(models, tmp_path, monkeypatch, capsys, case):
    options, message = BAD[case]
    monkeypatch.chdir(tmp_path)
    assert main([option.replace("{models}", str(models)) for option in options]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("error: ") and message in error[-1] and not list(tmp_path.iterdir())


def test_defaults_are_those_of_the_published_notebook():
    parsed = TASK.make_parser().parse_args([])
    args = {**vars(parsed), **sampler_settings(parsed)}
    published = {"steps": 20, "eta": 0.0, "scale": 3.0, "n_samples": 6, "sampler": "ddim"}
    assert {key: args[key] for key in published} == published


def test_default_model_is_the_published_one_or_the_bundled_one(models, tmp_path, monkeypatch):
    """Each has example classes; without either, an error names the download command."""
    monkeypatch.setattr("ldm.config.assets.ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    args = TASK.make_parser().parse_args([])
    with pytest.raises(UserError, match="run ldm download_weights cin256-v2"):
        TASK.choose_model(args)
    shutil.copytree(models / "drawings", tmp_path / "models/ldm/emoji64")
    assert TASK.inputs(args, ModelInfo.read(TASK.choose_model(args)))[0]["class"] == "red heart"
    shutil.copytree(models / "imagenet", tmp_path / "models/ldm/cin256-v2")
    labels = [each["class_label"] for each in TASK.inputs(args, ModelInfo.read(TASK.choose_model(args)))]
    assert labels == [label for label in (25, 187, 448, 992) for _ in range(6)]


def test_example_works_as_typed(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(models / "drawings", tmp_path / "models/ldm/emoji64")
    assert main(shlex.split(TASK.arguments)) == 0
    assert len(list((tmp_path / TASK.outdir / "samples").iterdir())) == 8


def test_published_model_suits_the_task(repo_root):
    """The shapes are checked on the meta device."""
    config = read_config(repo_root / "configs/latent-diffusion/cin256-v2.yaml")
    with torch.device("meta"):
        model = instantiate_from_config(for_inference(config))
    cond, uncond = class_conditioning(model, 4 * [ClassRequest(25, "European fire salamander")])
    assert cond.shape == uncond.shape == (4, 1, 512)
    latents = torch.empty(4, 3, 64, 64, device="meta")
    assert model.apply_model(latents, torch.empty(4, device="meta"), cond).shape == latents.shape
    images = model.decode_first_stage(latents[:1], force_not_quantize=True)  # autocast lacks the meta device
    pipeline = TASK.pipeline(TASK.make_parser().parse_args([]), ModelInfo("cin256-v2", config))
    assert images.shape == (1, 3, pipeline.height, pipeline.width) == (1, 3, 256, 256)
