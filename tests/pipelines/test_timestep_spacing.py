"""Tests of the option `timestep_spacing`: in Python, in commands, in the settings of an image, and in a replay."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml
from library_tasks import random_images
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from sample_runs import run_of, samples
from tiny_models import make_model, text_config, unconditional_config, write_model

import ldm
from ldm.cli.replay import main as replay
from ldm.cli.sample_diffusion import main as sample_diffusion
from ldm.cli.txt2img import main as txt2img
from ldm.errors import UserError

SPACINGS = ("exact", "logsnr", "trailing", "uniform", "quad")
ZERO_SNR = {"parameterization": "v", "rescale_betas_zero_snr": True}


@pytest.fixture(scope="module")
def model():
    return make_model(text_config(**ZERO_SNR))


def sample(model, **options):
    options = {"prompts": "fox", "steps": 4, "seed": 1, "scale": 1.0, "progress": False, **options}
    return ldm.text_to_image(model, **{"output_type": "numpy", **options})[0]


@pytest.mark.parametrize("sampler", ["ddim", "dpm"])
def test_option_selects_the_grid(model, sampler):
    images = {spacing: sample(model, sampler=sampler, timestep_spacing=spacing) for spacing in SPACINGS}
    default = sample(model, sampler=sampler)
    own = "logsnr" if sampler == "dpm" else "exact"
    assert (images[own] == default).all() and (images["uniform"] == images["exact"]).all()
    assert all((images[spacing] != default).any() for spacing in ("trailing", "quad"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timestep_spacing": "trailling"}, r'no timestep_spacing "trailling" .did you mean "trailing"'),
        ({"timestep_spacing": "trailing", "sampler": "ddpm"}, "takes every timestep; leave out timestep_spacing"),
    ],
)
def test_invalid_spacing_raises_user_error(model, options, message):
    with pytest.raises(UserError, match=message):
        sample(model, **options)


@pytest.mark.parametrize("spacing", [None, *SPACINGS])
@pytest.mark.parametrize("steps", [4, 7])
def test_expected_number_of_steps_is_the_number_of_steps(model, spacing, steps):
    calls = []
    sample(model, timestep_spacing=spacing, steps=steps, callback=lambda *call: calls.append(call))
    assert calls == [(i + 1, calls[0][1]) for i in range(len(calls))] and calls[-1][0] == calls[-1][1]


@pytest.mark.parametrize("strength", [0.01, 0.3, 0.5, 0.76, 1.0])
def test_expected_number_of_steps_of_image_to_image(model, strength):
    calls = []
    options = {"strength": strength, "steps": 8, "seed": 1, "scale": 1.0, "progress": False}
    options |= {"timestep_spacing": "trailing", "callback": lambda *call: calls.append(call)}
    ldm.image_to_image(model, random_images(1, 16, 16)[0], "fox", **options)
    assert calls[-1] == (len(calls), len(calls))


# -- commands --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    base = tmp_path_factory.mktemp("models")
    write_model(base / "text", text_config(**ZERO_SNR))
    write_model(base / "faces", unconditional_config(timesteps=20, **ZERO_SNR))
    return base


@pytest.fixture
def image(models, tmp_path):
    """Return the file of an image that was sampled on the trailing grid."""
    options = ["--prompt", "fox", "--ddim_steps", "3", "--n_samples", "1", "--scale", "2", "--seed", "5", "--skip_grid"]
    options += ["--model", str(models / "text"), "--outdir", str(tmp_path)]
    assert txt2img([*options, "--timestep_spacing", "trailing"]) == 0
    return tmp_path / "samples/0000.png"


def test_image_records_the_grid_and_replays(image, models, capsys):
    with Image.open(image) as file:
        assert file.text["timestep_spacing"] == "trailing"
        assert json.loads(file.text["ldm"])["settings"]["timestep_spacing"] == "trailing"
        pixels = np.asarray(file)
    model = ldm.load(str(models / "text"))
    assert (sample(model, steps=3, seed=5, scale=2.0, timestep_spacing="trailing") == pixels).all()
    assert (sample(model, steps=3, seed=5, scale=2.0) != pixels).any()
    assert replay([str(image)]) == 0
    assert capsys.readouterr().out.strip().endswith("identical")


def test_earlier_record_without_the_setting_replays_on_the_default_grid(image, models, tmp_path, capsys):
    with Image.open(image) as file:
        record = json.loads(file.text["ldm"])
    del record["settings"]["timestep_spacing"]
    info = PngInfo()
    info.add_text("ldm", json.dumps(record))
    default = sample(ldm.load(str(models / "text")), steps=3, seed=5, scale=2.0)
    Image.fromarray(default).save(tmp_path / "earlier.png", pnginfo=info)
    assert replay([str(tmp_path / "earlier.png")]) == 0
    assert capsys.readouterr().out.strip().endswith("identical")


def test_sample_folder_records_the_grid(models, tmp_path, capsys):
    """A run of an earlier version has no such option in its file; it continues on the default grid."""
    options = ["-r", str(models / "faces"), "-l", str(tmp_path), "-c", "3", "--seed", "7", "-n", "2"]
    assert sample_diffusion([*options, "--timestep_spacing", "trailing"]) == 0
    folder = run_of(tmp_path)
    trailing = samples(folder)
    path = folder / "sampling_config.yaml"
    recorded = yaml.safe_load(path.read_text())
    assert recorded["timestep_spacing"] == "trailing"
    (folder / "img/sample_000001.png").unlink()
    assert sample_diffusion(["--continue", str(folder)]) == 0
    assert (samples(folder)[1] == trailing[1]).all()
    assert sample_diffusion(["--continue", str(folder), "--timestep_spacing", "exact"]) == 2
    assert "timestep_spacing exact differs from the run's trailing" in capsys.readouterr().err
    del recorded["timestep_spacing"]
    path.write_text(yaml.safe_dump(recorded))
    (folder / "img/sample_000001.png").unlink()
    assert sample_diffusion(["--continue", str(folder)]) == 0
    assert (samples(folder)[1] != trailing[1]).any()
