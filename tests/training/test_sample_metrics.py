"""FID and KID of samples during training."""

from __future__ import annotations

import json
import logging
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from feature_networks import NotANumber, write_network
from omegaconf import OmegaConf
from tiny_models import class_config, pixel_config, unconditional_config

import main
from ldm.errors import UserError
from ldm.evaluation.features import Collector
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.training.sample_metrics import SampleMetrics

QUIET = ["--enable_progress_bar", "false", "--enable_model_summary", "false", "lightning.callbacks.image_logger=null"]


class Items:
    """Data set of 12 images with classes."""

    size = 16

    def __len__(self):
        return 12

    def __getitem__(self, index):
        pixels = np.random.default_rng(index).uniform(-1, 1, (self.size, self.size, 3)).astype(np.float32)
        return {"image": pixels, "class_label": index % 11}


class SmallItems(Items):
    size = 8


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Return `train(model, **params)`, which trains for two epochs with the callback and returns the log folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LDM_HOME", str(tmp_path / "home"))
    write_network(tmp_path / "net.pt")

    def start(model, *words, items="Items", checkpoint=None, status=0, **params):
        params = {"n": 10, "every_n_steps": 1, "features": "net.pt", "batch_size": 4, "ddim_steps": 2, **params}
        sets = {name: {"target": f"{__name__}.{items}"} for name in ("train", "validation")}
        callback = {"target": "ldm.training.sample_metrics.SampleMetrics", "params": params}
        config = {
            "model": {"base_learning_rate": 1e-4, **model},
            "data": {"target": "main.DataModuleFromConfig", "params": {"batch_size": 6, "num_workers": 0, **sets}},
            "lightning": {"callbacks": {"sample_metrics": callback}, "modelcheckpoint": {"params": checkpoint or {}}},
        }
        OmegaConf.save(OmegaConf.create(config), "tiny.yaml")
        words = ["-b", "tiny.yaml", "-t", "--allow-target", __name__, "--accelerator", "cpu", *QUIET, *words]
        assert main.main([*words, "--max_epochs", "2"]) == status
        return max((tmp_path / "logs").iterdir()) if status == 0 else None

    return start


def values(caplog, name="val/fid"):
    messages = [record.getMessage() for record in caplog.records if record.name == "ldm.training.sample_metrics"]
    return [float(text.split(f"{name} ")[1].split(",")[0]) for text in messages if f"{name} " in text]


@pytest.mark.parametrize(
    ("model", "items"),
    [(unconditional_config(), "Items"), (class_config(use_ema=True), "Items"), (pixel_config(), "SmallItems")],
    ids=["latent", "class", "pixel"],
)
def test_fid_is_logged_at_every_validation(train, caplog, model, items):
    with caplog.at_level(logging.INFO, "ldm"):
        train(model, items=items)
    found = values(caplog)
    assert len(found) == 2 and all(np.isfinite(found)) and min(found) > 0


def test_value_is_computed_every_n_steps_only(train, caplog):
    with caplog.at_level(logging.INFO, "ldm"):
        train(unconditional_config(), every_n_steps=3)
    assert len(values(caplog)) == 1  # at step 2; the next validation is at step 4


def test_best_checkpoint_is_kept_by_fid(train, caplog):
    checkpoint = {"monitor": "val/fid", "mode": "min", "save_top_k": 1}
    with caplog.at_level(logging.INFO, "ldm"):
        folder = train(unconditional_config(), checkpoint=checkpoint)
    found = values(caplog)
    best = int(np.argmin(found))
    names = [path.name for path in (folder / "checkpoints").glob("epoch*.ckpt")]
    assert names == [f"epoch={best:06}.ckpt"]


def test_kid_is_logged(train, caplog):
    with caplog.at_level(logging.INFO, "ldm"):
        train(unconditional_config(), metric="kid", kid_subset_size=5)
    assert len(values(caplog, "val/kid")) == 2


def test_training_is_the_same_with_the_callback(train):
    weights = []
    for every in (1, 10**6):
        folder = train(unconditional_config(), "--seed", "3", "--postfix", f"_{every}", every_n_steps=every)
        state = torch.load(folder / "checkpoints/last.ckpt", weights_only=False)["state_dict"]
        weights.append({name: value for name, value in state.items() if name.startswith("model.")})
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_values_that_are_not_finite_stop_nothing(train, monkeypatch, caplog):
    monkeypatch.setattr(SampleMetrics, "_sample", lambda self, module, batch, n: torch.full((n, 3, 16, 16), np.nan))
    train(unconditional_config())
    assert "val/fid is NaN: a sample at step 2 is not finite" in caplog.text


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"features": "nothing.pt"}, 'there is no file "nothing.pt"; check --features'),
        ({"n": 6}, "FID needs more images than the 6 features, but SampleMetrics has 6"),
        ({"split": "test"}, 'split "test" is neither train nor validation'),
        ({"metric": "is"}, 'metric "is" is not one of fid, kid'),
        ({"n": 0}, "n, every_n_steps, batch_size and ddim_steps must be at least 1"),
    ],
)
def test_mistake_is_one_line_before_training(train, capsys, params, message):
    train(unconditional_config(), status=2, **params)
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in error


def test_state_is_restored():
    first, second = SampleMetrics(n=10), SampleMetrics(n=10)
    first._last_step, first._value = 7, 3.5
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert (second._last_step, second._value) == (7, 3.5)


def test_equal_weights_give_equal_samples_at_each_validation(train, monkeypatch):
    seen = []
    original = Collector.add
    monkeypatch.setattr(Collector, "add", lambda self, images: (seen.append(images), original(self, images))[1])
    train(unconditional_config(use_ema=True), "model.base_learning_rate=0.0", "--scale_lr", "false")
    assert [len(images) for images in seen] == [4, 4, 4, 4, 4, 2, 4, 4, 2]  # the reference, and samples of two epochs
    for before, after in zip(seen[3:6], seen[6:], strict=True):
        np.testing.assert_array_equal(before, after)
    assert not np.array_equal(seen[3], seen[4])


def test_samples_are_those_of_the_averaged_weights(train, monkeypatch):
    scopes = []
    ema_scope, sample_log = LatentDiffusion.ema_scope, LatentDiffusion.sample_log

    @contextmanager
    def recorded(self, *args):
        with ema_scope(self, *args):
            scopes.append("open")
            yield
            scopes.append("closed")

    def sample(self, *args, **options):
        assert scopes[-1] == "open"
        scopes.append("sampled")
        scopes.append("open")
        return sample_log(self, *args, **options)

    monkeypatch.setattr(LatentDiffusion, "ema_scope", recorded)
    monkeypatch.setattr(LatentDiffusion, "sample_log", sample)
    train(unconditional_config(use_ema=True))
    assert scopes.count("sampled") == 6


def test_network_that_returns_nan_is_an_error(train, tmp_path, capsys):
    write_network(tmp_path / "nan.pt", NotANumber())
    train(unconditional_config(), status=2, features="nan.pt")
    assert "the feature network returns values that are not finite" in capsys.readouterr().err


def test_unknown_data_set_raises_user_error():
    callback = SampleMetrics(n=10, split="validation")
    trainer = type("Trainer", (), {"datamodule": type("Data", (), {"datasets": {}, "dataset_configs": {}})()})()
    with pytest.raises(UserError, match=r"has no data.params.validation; choose another split"):
        callback._dataset(trainer)
