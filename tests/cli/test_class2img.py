"""The command that draws classes, on tiny models."""

from __future__ import annotations

import shlex
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import class_config, text_config, unconditional_config, write_model

from ldm.config.instantiate import instantiate_from_config
from ldm.config.model_config import read_config
from ldm.errors import UserError
from ldm.io.pixels import to_uint8
from ldm.models.diffusion.noise import SeededNoise
from ldm.pipelines.loading import for_inference, load_model
from ldm.pipelines.sampling import SamplerSettings, decode, sample_latents
from ldm.tasks.class2img import ClassToImage
from ldm.tasks.classes import class_conditioning

TASK = ClassToImage()


@pytest.fixture(scope="module")
def class2img(load_script):
    return load_script("class2img")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """One with a null class, one without, one of the drawings, one without classes."""
    base = tmp_path_factory.mktemp("models")
    write_model(base / "guided", class_config(11, cond_dropout=0.1))
    write_model(base / "unguided", class_config(11))
    write_model(base / "imagenet", class_config(1001))
    write_model(base / "drawings", text_config())
    write_model(base / "nothing", unconditional_config())
    return base


@pytest.fixture
def draw(class2img, models, tmp_path):
    """Run the command in few steps; gives the pictures and their text."""

    def run(folder: str, model: str, *options: object) -> list[tuple[np.ndarray, dict[str, str]]]:
        fixed = ["--model", models / model, "--steps", 3, "--seed", 1, "--outdir", tmp_path / folder]
        assert class2img.main([str(each) for each in (*fixed, *options)]) == 0
        found = []
        for path in sorted((tmp_path / folder / "samples").iterdir()):
            with Image.open(path) as file:
                found.append((np.asarray(file).astype(int), file.text))
        return found

    return run


def test_each_class_is_a_row_of_the_sheet(draw, tmp_path):
    found = draw("out", "imagenet", "--classes", "fire salamander", "992", "--n_samples", 3)
    assert [(text["class_label"], text["class"]) for _, text in found] == [
        *3 * [("25", "European fire salamander")],
        *3 * [("992", "agaric")],
    ]
    with Image.open(tmp_path / "out" / "grid-0000.png") as sheet:
        assert sheet.size == (3 * 18 + 2, 2 * 18 + 2)
        assert sheet.text["class"] == "European fire salamander\nagaric"
    assert (found[0][0] != found[3][0]).any() and (found[0][0] != found[1][0]).any()


def test_a_picture_is_what_the_sampler_draws_for_its_class(models, draw):
    """Against the sampler itself, told class 4 and led away from the last class."""
    (image, text), *_ = draw("out", "guided", "--classes", 4, "--n_samples", 1)
    model = load_model(models / "guided" / "config.yaml", models / "guided" / "model.ckpt")
    table = model.cond_stage_model.embedding.weight.detach()
    latents = sample_latents(
        model,
        (1, 3, 8, 8),
        SamplerSettings("ddim", 3, 0.0, 3.0),
        table[4][None, None],
        table[10][None, None],
        SeededNoise([int(text["seed"])]),
    )
    assert (to_uint8(decode(model, latents))[0] == image).all()


@pytest.mark.parametrize("model", ["guided", "drawings"])
def test_a_picture_is_the_same_at_every_batch_size(draw, model):
    alone, threes, eights = (
        draw(f"b{n}", model, "--classes", "0-3", "--n_samples", 2, "--eta", 1, "--batch_size", n) for n in (1, 3, 8)
    )
    for i in range(8):
        assert np.abs(alone[i][0] - threes[i][0]).max() <= 1 and np.abs(alone[i][0] - eights[i][0]).max() <= 1


@pytest.mark.parametrize("model", ["guided", "drawings"])
def test_pictures_are_drawn_again(draw, load_script, tmp_path, capsys, model):
    draw("out", model, "--classes", 1, 2, "--n_samples", 2, "--batch_size", 3, "--dpm")
    paths = [str(path) for path in sorted((tmp_path / "out" / "samples").iterdir())]
    assert load_script("replay").main(paths) == 0
    assert capsys.readouterr().out.count("identical") == 4


def test_the_drawings_are_classes_of_the_model_of_text(draw):
    (_, text), *_ = draw("out", "drawings", "--classes", "Red Heart", "--n_samples", 1)
    assert text["class"] == "red heart" and text["scale"] == "3.0"


def test_without_classes_examples_are_drawn(draw):
    labels = [text["class_label"] for _, text in draw("out", "guided")]
    assert labels == [str(label) for label in range(4) for _ in range(6)]


BAD = {
    "no null class": (["--model", "{models}/unguided"], "no null class"),
    "no classes": (["--model", "{models}/nothing"], "scripts/sample_diffusion.py"),
    "unknown class": (["--model", "{models}/imagenet", "--classes", "goldfisch"], 'did you mean "goldfish"'),
    "class beyond": (["--model", "{models}/guided", "--classes", "10"], "are 0 to 9"),
    "steps": (["--model", "{models}/guided", "--steps", "101"], "100 or fewer"),
    "noisy dpm": (["--model", "{models}/guided", "--dpm", "--eta", "1"], "deterministic"),
    "no such model": (["--model", "nope"], "no model"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_one_line_and_nothing_is_written(class2img, models, tmp_path, monkeypatch, capsys, case):
    options, message = BAD[case]
    monkeypatch.chdir(tmp_path)
    assert class2img.main([option.replace("{models}", str(models)) for option in options]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("error: ") and message in error[-1] and not list(tmp_path.iterdir())


def test_the_notebooks_settings_are_the_defaults():
    args = vars(TASK.make_parser().parse_args([]))
    published = {"steps": 20, "eta": 0.0, "scale": 3.0, "n_samples": 6, "sampler": "ddim"}
    assert {key: args[key] for key in published} == published


def test_a_model_is_chosen(repo_root, models, tmp_path, monkeypatch):
    """The published one with the classes of its notebook where it was downloaded, else the drawings, else a word."""
    monkeypatch.setattr("ldm.config.assets.ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    args = TASK.make_parser().parse_args([])
    with pytest.raises(UserError, match=r"run python scripts/download_weights\.py cin256-v2"):
        TASK.choose_model(args)
    shutil.copytree(models / "drawings", tmp_path / "models/ldm/emoji64")
    assert TASK.inputs(args, TASK.choose_model(args))[0]["class"] == "red heart"
    shutil.copytree(models / "imagenet", tmp_path / "models/ldm/cin256-v2")
    labels = [each["class_label"] for each in TASK.inputs(args, TASK.choose_model(args))]
    assert labels == [label for label in (25, 187, 448, 992) for _ in range(6)]


def test_the_example_works_as_typed(class2img, models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(models / "drawings", tmp_path / "models/ldm/emoji64")
    assert class2img.main(shlex.split(TASK.example)[2:]) == 0
    assert len(list((tmp_path / TASK.outdir / "samples").iterdir())) == 8


def test_the_published_model_goes_through(repo_root):
    """Its shapes, on the device that computes no values."""
    config = read_config(repo_root / "configs/latent-diffusion/cin256-v2.yaml")
    with torch.device("meta"):
        model = instantiate_from_config(for_inference(config))
    told, empty = class_conditioning(model, 4 * [{"class_label": 25, "class": "European fire salamander"}])
    assert told.shape == empty.shape == (4, 1, 512)
    latents = torch.empty(4, 3, 64, 64, device="meta")
    assert model.apply_model(latents, torch.empty(4, device="meta"), told).shape == latents.shape
    pictures = model.decode_first_stage(latents[:1], force_not_quantize=True)  # autocast knows no such device
    assert pictures.shape == (1, 3, *TASK.size(config).values()) == (1, 3, 256, 256)
