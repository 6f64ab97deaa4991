"""Forecast of a run against the real one: parameters, memory and time."""

from __future__ import annotations

import statistics
import time

import pytest
import torch
from omegaconf import OmegaConf
from pytorch_lightning import Callback
from tiny_models import text_config

import main
from ldm.cli import train
from ldm.config.instantiate import instantiate_from_config
from ldm.modules.live_bytes import LiveBytes
from ldm.training import assembly
from ldm.training.configuration import make_plan
from ldm.training.forecast import Forecast, Measurement, Memory, Parameters, forecast
from ldm.training.forecast_text import forecast_text

QUIET = ["--enable_progress_bar", "false", "--enable_model_summary", "false", "lightning.callbacks.image_logger=null"]
FIRST_STAGE = {
    "target": "ldm.models.autoencoder.AutoencoderKL",
    "params": {
        "embed_dim": 3,
        "ddconfig": text_config()["params"]["first_stage_config"]["params"]["ddconfig"],
        "lossconfig": {
            "target": "ldm.modules.losses.LPIPSWithDiscriminator",
            "params": {"disc_start": 0, "perceptual_weight": 0.0, "disc_num_layers": 1},
        },
    },
}
MODELS = {"first stage": FIRST_STAGE, "diffusion": text_config(use_ema=True, scale_by_std=True)}


@pytest.fixture
def configured(tmp_path, monkeypatch):
    """Return `configured(model, **data)`, which writes a configuration to the empty current folder."""
    monkeypatch.chdir(tmp_path)

    def write(model, **data):
        emoji = {"target": "ldm.data.emoji.EmojiTrain", "params": {"size": 16, "names": ["fox", "rocket", "snowman"]}}
        params = {"batch_size": 8, "num_workers": 0, "train": emoji, **data}
        config = {
            "model": {"base_learning_rate": 1e-4, **model},
            "data": {"target": "main.DataModuleFromConfig", "params": params},
            "lightning": {"trainer": {"max_steps": 40}},
        }
        OmegaConf.save(OmegaConf.create(config), "tiny.yaml")

    return write


def plan(*words):
    return make_plan(train.parse(["-b", "tiny.yaml", "-t", *words]))


class Peak(Callback):
    """Callback that measures the batches of a real run."""

    def __init__(self):
        self.seconds, self.bytes, self.watch = [], LiveBytes(), None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.start = time.perf_counter()
        if batch_idx == 4:
            state = [value for each in trainer.optimizers for entry in each.state.values() for value in entry.values()]
            gradients = [parameter.grad for parameter in pl_module.parameters() if parameter.grad is not None]
            for tensor in (*pl_module.parameters(), *pl_module.buffers(), *state, *gradients, *batch.values()):
                if isinstance(tensor, torch.Tensor):
                    self.bytes.add(tensor)
            self.watch = self.bytes.watching()
            self.watch.__enter__()

    def on_train_batch_end(self, *args):
        if self.watch is None:
            self.seconds.append(time.perf_counter() - self.start)
        else:
            self.watch.__exit__(None, None, None)


@pytest.mark.parametrize("name", MODELS)
def test_memory_is_that_of_the_real_run(name, configured, monkeypatch):
    configured(MODELS[name], batch_size=3)
    found = forecast(plan())
    peak, build = Peak(), assembly.build_trainer
    monkeypatch.setattr(assembly, "build_trainer", lambda s, callbacks, *rest: build(s, [*callbacks, peak], *rest))
    assert main.main(["-b", "tiny.yaml", "-t", *QUIET, "--max_steps", "5", "--limit_train_batches", "5"]) == 0
    memory = found.at(3).memory
    assert (memory.fixed + memory.activations) == pytest.approx(peak.bytes.peak, rel=0.2)
    assert found.step_seconds == pytest.approx(statistics.median(peak.seconds), rel=2.0)  # other programs run as well


@pytest.mark.parametrize("name", MODELS)
def test_parts_and_bytes_are_counted(name, configured):
    configured(MODELS[name])
    found = forecast(plan())
    model = instantiate_from_config(MODELS[name])
    counted = {each.part: (each.trained, each.frozen) for each in found.parameters}
    expected = {part: sum(p.numel() for p in module.parameters()) for part, module in model.named_children()}
    assert {part: sum(both) for part, both in counted.items()} == {part: n for part, n in expected.items() if n}
    trained = sum(each.trained for each in found.parameters)
    assert found.at(8).memory.gradients == 4 * trained
    # Adam keeps two averages of each parameter that gets gradients; the text encoder has an output that is not used.
    least = sum(each.trained for each in found.parameters if each.part != "cond_stage_model")
    assert 8 * least <= found.at(8).memory.optimizer <= 8 * trained + 8 * len(list(model.parameters()))
    if name == "diffusion":
        assert counted["first_stage_model"][0] == 0 and counted["model"][1] == counted["cond_stage_model"][1] == 0
        assert found.at(8).memory.average == sum(b.numel() * b.element_size() for b in model.model_ema.buffers())
    assert found.steps == 40 and found.batch_size == 8 and found.large.items == 8 and found.small.items == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_larger_batches_are_extrapolated(name, configured):
    configured(MODELS[name])
    small = forecast(plan())
    configured(MODELS[name], batch_size=24)
    assert small.at(24).memory.peak == pytest.approx(forecast(plan()).at(24).memory.peak, rel=0.1)


def test_nothing_is_written(configured, tmp_path, capsys):
    latents = {"path": "latents.pt"}
    configured(text_config(), latent_cache=latents)
    assert main.main(["-b", "tiny.yaml", "--plan", "--accumulate_grad_batches", "2"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]
    out = capsys.readouterr().out
    for words in (
        "first_stage_model",
        "moving averages",
        "peak",
        "largest batch that fits: ",
        "time of a step of 2 batches",
    ):
        assert words in out
    assert "40 steps: 0:" in out


def test_invalid_configurations_are_refused(configured, tmp_path, capsys):
    configured(text_config())
    assert main.main(["-b", "tiny.yaml", "--plan", "model.params.imgae_size=8"]) == 2
    assert '"image_size"' in capsys.readouterr().err.splitlines()[-1]


def made(capacity, batch_size=8, steps=None):
    """Return a forecast of 100 bytes and 10 bytes for each item, of 1 s and 0.1 s for each item."""
    measured = [Measurement(n, 1 + 0.1 * n, Memory(50, 20, 20, 10, 10 * n)) for n in (2, 4)]
    parts = (Parameters("model", 5, 2),)
    return Forecast(parts, "cpu", batch_size, 1, steps, *measured, loading=0.0, workers=0, capacity=capacity)


def test_largest_batch_fills_the_memory():
    assert [made(capacity).largest_batch for capacity in (90, 109, 110, 195, 200)] == [0, 0, 1, 9, 10]
    found = made(1000).at(20)
    assert found.memory.peak == 300 and found.seconds == pytest.approx(3.0)


def test_text_says_what_to_do_if_the_batch_does_not_fit():
    assert "does not fit: set data.params.batch_size=4 and --accumulate_grad_batches 2" in forecast_text(made(140))
    assert "largest batch that fits: none" in forecast_text(made(90))
    assert "10 steps: 0:00:18 without validation" in forecast_text(made(1000, steps=10))
    assert "extrapolated from 2 and 4 items" in forecast_text(made(1000))
