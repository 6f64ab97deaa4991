"""The variational bound in bits per dimension, against closed forms."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from feature_networks import random_images, write_images
from tiny_models import class_config, make_model, pixel_config, unconditional_config, write_model

from ldm.cli.main import main as ldm
from ldm.errors import UserError
from ldm.evaluation.data_sets import DatasetImages
from ldm.evaluation.likelihood import measure_bound


class Items:
    """Data set of four images with classes."""

    def __init__(self, size=8):
        self.size = size

    def __len__(self):
        return 4

    def __getitem__(self, index):
        pixels = np.random.default_rng(index).uniform(-1, 1, (self.size, self.size, 3)).astype(np.float32)
        return {"image": pixels, "class_label": index}


def bound(model, every=1, size=8, batch_size=30, **options):
    return measure_bound(model, DatasetImages(Items(size), "x"), every, batch_size, progress=False, **options)


def prior(model, x):
    alpha = float(model.alphas_cumprod[-1])
    divergence = 0.5 * (alpha * np.square(x.astype(float)).mean() - alpha - math.log(1 - alpha))
    return divergence / math.log(2)


def test_prediction_of_zero_has_the_sum_of_all_weights(monkeypatch):
    """The expected squared error of a prediction of no noise is 1 for each dimension."""
    model = make_model(pixel_config())
    monkeypatch.setattr(model, "apply_model", lambda x, t, cond=None: torch.zeros_like(x))
    found = bound(model)
    weights = model.lvlb_weights.double()
    expected = float(weights.sum()) / math.log(2) + np.mean([prior(model, Items()[i]["image"]) for i in range(4)])
    assert np.mean(found.total) == pytest.approx(expected, rel=0.03)
    ranges = [float(part.sum()) / math.log(2) for part in weights.split(10)]
    assert found.ranges == pytest.approx(ranges, rel=0.12)
    assert found.size == (3, 8, 8)


def test_perfect_prediction_has_the_prior_alone(monkeypatch):
    model = make_model(pixel_config())
    images = [torch.from_numpy(Items()[i]["image"]).permute(2, 0, 1) for i in range(4)]
    original = model.q_sample
    noises = []

    def q_sample(x, t, noise=None):
        noises.append(noise)
        return original(x, t, noise)

    monkeypatch.setattr(model, "q_sample", q_sample)
    monkeypatch.setattr(model, "apply_model", lambda x, t, cond=None: noises[-1])
    found = bound(model)
    assert found.ranges == [0.0] * 10
    assert found.total == pytest.approx(found.prior)
    assert found.prior == pytest.approx([prior(model, image.numpy()) for image in images], rel=1e-4)


def test_expected_bound_does_not_depend_on_every(monkeypatch):
    model = make_model(pixel_config())
    monkeypatch.setattr(model, "apply_model", lambda x, t, cond=None: torch.zeros_like(x))
    monkeypatch.setattr(model, "lvlb_weights", torch.linspace(0.1, 1.0, 100))
    whole = np.mean(bound(model).total)
    for every in (5, 7, 100):
        values = [np.mean(bound(model, every, seed=seed).total) for seed in range(0, 60_000, 1000)]
        assert np.mean(values) == pytest.approx(whole, rel=0.08)


@pytest.mark.parametrize(
    "config", [pixel_config(), unconditional_config(), class_config()], ids=["pixel", "ldm", "class"]
)
def test_bound_is_that_of_the_loss_that_training_logs(config):
    """The mean of `loss_vlb` over timesteps, times their number, is the part without the prior."""
    size = 8 if "first_stage_config" not in config["params"] else 16
    model = make_model(config)
    found = bound(model, size=size)
    batch = {"image": torch.stack([torch.from_numpy(Items(size)[i]["image"]) for i in range(4)])}
    batch["class_label"] = torch.arange(4)
    torch.manual_seed(0)
    losses = []
    with torch.no_grad():
        for t in range(model.num_timesteps):
            if hasattr(model, "first_stage_model"):
                z, c = model.get_input(batch, "image", force_c_encode=True)
                _, log = model.p_losses(z, c, torch.full((4,), t))
            else:
                _, log = model.p_losses(model.get_input(batch, "image"), torch.full((4,), t))
            losses.append(float(log["val/loss_vlb"]))
    assert np.mean(found.total) - np.mean(found.prior) == pytest.approx(sum(losses) / math.log(2), rel=0.05)


def test_bound_depends_on_the_seed_and_not_on_the_batch_size():
    model = make_model(pixel_config())
    first, second = bound(model, batch_size=7), bound(model, batch_size=40)
    assert first.total == pytest.approx(second.total, rel=1e-5)
    assert first.total != bound(model, seed=1).total


def test_too_few_timesteps_raise_user_error():
    with pytest.raises(UserError, match="--every 101 is larger than the 100 timesteps of the model"):
        bound(make_model(pixel_config()), 101)


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "tiny", unconditional_config())
    write_images(tmp_path / "photos", random_images(5))
    (tmp_path / "c.yaml").write_text(
        "data:\n  params:\n    validation:\n      target: ldm.data.folder.FolderValidation\n"
        "      params: {data_root: photos, size: 16}\n"
    )
    words = ["evaluate", "likelihood", "--model", "tiny", "--data", "c.yaml", "--device", "cpu", "--every", "20"]
    for name in "ab":
        assert ldm([*words, "--json", f"{name}.json"]) == 0
    found = json.loads((tmp_path / "a.json").read_text())
    bits = found["figures"][""]["bits"]["value"]
    assert bits == pytest.approx(np.mean(found["per_image"][""]["bits"]))
    assert bits == pytest.approx(sum(found["extra"]["ranges"]) + found["extra"]["prior"])
    assert found == json.loads((tmp_path / "b.json").read_text())
    out = capsys.readouterr().out
    assert "timesteps 0 to 9: " in out and "timesteps 90 to 99: " in out and f"| tiny | {bits:.4f} ± " in out
    assert ldm(["evaluate", "compare", "a.json", "b.json"]) == 0
    assert "| bits/dim |" in capsys.readouterr().out
    assert ldm(["evaluate", "likelihood", "--data", "c.yaml"]) == 2
