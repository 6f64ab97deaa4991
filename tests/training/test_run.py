"""Runs of the diffusion model, with several processes, failures and interruptions."""

import csv
import errno
import re
import sys
import threading
import types

import pytest
import torch
from omegaconf import OmegaConf
from tiny_models import text_config

import main

QUIET = ["--enable_progress_bar", "false", "--enable_model_summary", "false"]

FIRST_STAGE = {
    "model": {
        "base_learning_rate": 1e-3,
        "target": "ldm.models.autoencoder.AutoencoderKL",
        "params": {
            "embed_dim": 3,
            "ddconfig": text_config()["params"]["first_stage_config"]["params"]["ddconfig"],
            "lossconfig": {
                "target": "ldm.modules.losses.LPIPSWithDiscriminator",
                "params": {"disc_start": 2, "perceptual_weight": 0.0, "disc_num_layers": 1},
            },
        },
    },
    "data": {
        "target": "main.DataModuleFromConfig",
        "params": {
            "batch_size": 2,
            "num_workers": 0,
            "train": {"target": "ldm.data.emoji.EmojiTrain", "params": {"size": 16}},
        },
    },
}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Return `run(model, *words)`, which trains on tiny emoji in `tmp_path / "logs"` and returns the exit status."""
    monkeypatch.chdir(tmp_path)

    def start(model, *words, **data):
        emoji = {"target": "ldm.data.emoji.EmojiTrain", "params": {"size": 16}}
        validation = {"target": "ldm.data.emoji.EmojiValidation", "params": {"size": 16}}
        params = {"batch_size": 2, "num_workers": 0, "train": emoji, "validation": validation, **data}
        config = {
            "model": {"base_learning_rate": 1e-4, **model},
            "data": {"target": "main.DataModuleFromConfig", "params": params},
            "lightning": {"trainer": {"limit_train_batches": 3, "limit_val_batches": 1, "log_every_n_steps": 1}},
        }
        OmegaConf.save(OmegaConf.create(config), "tiny.yaml")
        return main.main(["-b", "tiny.yaml", "-t", *QUIET, *words])

    return start


def the_run(tmp_path):
    (folder,) = (tmp_path / "logs").iterdir()
    return folder


def test_diffusion_model_trains_validates_and_samples(run, tmp_path):
    log_images = "lightning.callbacks.image_logger.params.log_images_kwargs={ddim_steps: 2}"
    model = text_config(use_ema=True, monitor="val/loss_simple_ema")
    assert run(model, "--max_steps", "4", log_images, "lightning.callbacks.image_logger.params.batch_frequency=2") == 0
    folder = the_run(tmp_path)
    logged = {path.name.split("_gs-")[0] for path in (folder / "images" / "train").iterdir()}
    assert {"inputs", "reconstruction", "conditioning", "samples"} <= logged
    assert list((folder / "images" / "val").glob("samples_gs-000003_*"))
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["state_dict"]["model_ema.num_updates"] == 4
    assert "first_stage_model.encoder.conv_in.weight" in checkpoint["state_dict"]
    best = next(value for key, value in checkpoint["callbacks"].items() if key.startswith("ModelCheckpoint"))
    assert best["monitor"] == "val/loss_simple_ema"
    assert (folder / "checkpoints" / "epoch=000000.ckpt").is_file()


def test_trainstep_checkpoints_are_saved_on_request(run, tmp_path):
    every_two_steps = "lightning.callbacks.metrics_over_trainsteps_checkpoint.params.every_n_train_steps=2"
    assert run(text_config(), "--max_steps", "4", every_two_steps, "lightning.callbacks.image_logger=null") == 0
    folder = the_run(tmp_path) / "checkpoints" / "trainstep_checkpoints"
    assert [path.name for path in sorted(folder.iterdir())] == [
        "epoch=000000-step=000000002.ckpt",
        "epoch=000001-step=000000004.ckpt",
    ]
    assert "optimizer_states" not in torch.load(next(folder.iterdir()), weights_only=True)


def test_latest_checkpoint_is_kept_without_validation_data(run, tmp_path):
    words = ["--max_epochs", "2", "lightning.callbacks.image_logger=null"]
    assert run(text_config(monitor="val/loss"), *words, validation=None) == 0
    names = sorted(path.name for path in (the_run(tmp_path) / "checkpoints").iterdir())
    assert names == ["epoch=000001.ckpt", "last.ckpt"]


def test_latents_are_cached_before_training(run, monkeypatch):
    calls = []
    latents = types.ModuleType("ldm.training.latents")
    latents.cache_latents = lambda data, model, *rest: calls.append((data.latent_cache, type(model).__name__, *rest))
    monkeypatch.setitem(sys.modules, "ldm.training.latents", latents)
    words = ["--max_steps", "1", "lightning.callbacks.image_logger=null"]
    assert run(text_config(), *words, latent_cache={"variants": 2}) == 0
    assert calls == [({"variants": 2}, "LatentDiffusion", torch.device("cpu"), None)]


def test_failure_saves_checkpoint_and_raises(run, tmp_path, monkeypatch):
    from ldm.models.diffusion.ddpm import LatentDiffusion

    original, count = LatentDiffusion.shared_step, []

    def failing(self, batch):
        count.append(1)
        if len(count) == 5:
            raise ZeroDivisionError("on purpose")
        return original(self, batch)

    monkeypatch.setattr(LatentDiffusion, "shared_step", failing)
    with pytest.raises(ZeroDivisionError, match="on purpose"):
        run(text_config(), "lightning.callbacks.image_logger=null", "--limit_val_batches", "0")
    saved = torch.load(the_run(tmp_path) / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 4


def test_failure_before_first_step_saves_no_checkpoint(run, tmp_path, monkeypatch):
    from ldm.models.diffusion.ddpm import LatentDiffusion

    def failing(self, batch):
        raise ZeroDivisionError("on purpose")

    monkeypatch.setattr(LatentDiffusion, "shared_step", failing)
    with pytest.raises(ZeroDivisionError):
        run(text_config(), "lightning.callbacks.image_logger=null", "--num_sanity_val_steps", "0")
    assert not list(tmp_path.glob("logs/*/checkpoints/*"))


@pytest.mark.parametrize(
    ("good", "again"), [(0, "free some space, then start again"), (1, 'free some space, then continue with --resume "')]
)
def test_full_disk_ends_the_run_with_one_line(good, again, run, tmp_path, monkeypatch, capsys):
    original, count = torch.save, []

    def save(content, path):
        count.append(path)
        if len(count) > 2 * good:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(content, path)

    monkeypatch.setattr(torch, "save", save)
    assert run(text_config(), "--max_epochs", "3", "lightning.callbacks.image_logger=null") == 2
    (error,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error:"))
    assert re.match(r'error: the run has ended: cannot write ".*last\.ckpt": No space left on device; ' + again, error)
    saved = list((the_run(tmp_path) / "checkpoints").iterdir())
    assert [torch.load(path, weights_only=True)["global_step"] for path in saved] == [3] * 2 * good
    monkeypatch.setattr(torch, "save", original)
    words = ["lightning.callbacks.image_logger=null", *QUIET]
    assert not good or main.main(["-r", error.split('"')[-2], "-t", "--max_epochs", "2", *words]) == 0


def test_failed_writing_of_a_thread_is_logged_in_one_line(run, monkeypatch, caplog, capsys):
    from ldm.models.diffusion.ddpm import LatentDiffusion

    original = LatentDiffusion.shared_step

    def write():
        raise OSError(errno.ENOSPC, "No space left on device")

    def step(self, batch):
        thread = threading.Thread(target=write)
        thread.start()
        thread.join()
        return original(self, batch)

    monkeypatch.setattr(LatentDiffusion, "shared_step", step)
    hook = threading.excepthook
    words = ["--num_sanity_val_steps", "0", "--limit_val_batches", "0", "lightning.callbacks.image_logger=null"]
    assert run(text_config(), "--max_steps", "1", *words) == 0
    assert caplog.text.count("writing the logs has failed: [Errno 28] No space left on device") == 1
    assert "Traceback" not in capsys.readouterr().err and threading.excepthook is hook


def test_ctrl_c_finishes_the_batch_saves_and_exits_with_130(run, tmp_path, monkeypatch):
    import signal

    from ldm.models.diffusion.ddpm import LatentDiffusion

    original, count = LatentDiffusion.shared_step, []

    def interrupted(self, batch):
        count.append(1)
        if len(count) == 2:
            signal.raise_signal(signal.SIGINT)
        return original(self, batch)

    monkeypatch.setattr(LatentDiffusion, "shared_step", interrupted)
    before = signal.getsignal(signal.SIGINT)
    words = ["lightning.callbacks.image_logger=null", "--num_sanity_val_steps", "0"]
    assert run(text_config(), *words) == 130
    assert len(count) == 2
    assert torch.load(the_run(tmp_path) / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2
    assert signal.getsignal(signal.SIGINT) is before
    monkeypatch.setattr(LatentDiffusion, "shared_step", original)
    assert main.main(["-r", str(the_run(tmp_path)), "-t", "--max_steps", "3", *QUIET, *words]) == 0


def test_lightning_module_with_test_step_is_tested(run, tmp_path, monkeypatch):
    from pytorch_lightning import LightningModule

    tested = []

    class OwnModule(LightningModule):
        learning_rate = 0.0

        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)

        def training_step(self, batch, batch_idx):
            return self.layer(batch["image"].mean().reshape(1, 1)).sum()

        def test_step(self, batch, batch_idx):
            tested.append(self.learning_rate)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.learning_rate)

    OwnModule.__module__ = "toys"
    toys = types.ModuleType("toys")
    toys.OwnModule = OwnModule
    monkeypatch.setitem(sys.modules, "toys", toys)
    test = {"target": "ldm.data.emoji.EmojiValidation", "params": {"size": 16}}
    words = ["--max_steps", "1", "--limit_test_batches", "2", "lightning.callbacks.image_logger=null"]
    words += ["--allow-target", "toys"]
    assert run({"target": "toys.OwnModule"}, *words, test=test, validation=None) == 0
    assert tested == pytest.approx([2e-4] * 2)
    assert run({"target": "toys.OwnModule"}, *words, "--no-test", "-l", "other", test=test, validation=None) == 0
    assert len(tested) == 2
    (folder,) = (tmp_path / "logs").iterdir()
    assert main.main(["-r", str(folder), "--allow-target", "toys", *QUIET]) == 0
    assert len(tested) == 4


SPY = """
import pathlib
from pytorch_lightning import Callback

class Spy(Callback):
    def on_train_end(self, trainer, module):
        total = sum(value.double().abs().sum().item() for value in module.parameters())
        pathlib.Path(f"rank{trainer.global_rank}.txt").write_text(repr(total))
"""


@pytest.mark.slow
def test_two_processes_share_folder_and_weights(tmp_path, repo_root):
    import os
    import subprocess

    (tmp_path / "spy.py").write_text(SPY)
    OmegaConf.save(OmegaConf.create(FIRST_STAGE), tmp_path / "tiny.yaml")
    words = ["-b", "tiny.yaml", "-t", "--max_steps", "5", "--accelerator", "cpu", "--devices", "2", *QUIET]
    spy = ["--allow-target", "spy", "lightning.callbacks.spy.target=spy.Spy", "lightning.callbacks.image_logger=null"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(repo_root / "main.py"), *words, *spy, "--accumulate_grad_batches", "2"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "rank0.txt").read_text() == (tmp_path / "rank1.txt").read_text()
    assert torch.load(the_run(tmp_path) / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 5


def test_run_logs_rates_norms_speed_latents_and_its_configuration(run, tmp_path, caplog):
    words = ["--logger", "csv", "--enable_progress_bar", "true", "lightning.callbacks.image_logger=null"]
    assert run(text_config(scale_by_std=True), "--max_steps", "2", "--seed", "5", *words) == 0
    folder = the_run(tmp_path) / "csv"
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    values = {key: float(value) for row in rows for key, value in row.items() if value}
    assert values["lr-AdamW"] == pytest.approx(2e-4)
    assert values["latents/std"] == pytest.approx(1, abs=0.1)
    assert all(values[f"train/{name}"] > 0 for name in ("loss_step", "grad_norm", "images_per_second"))
    logged = OmegaConf.load(folder / "hparams.yaml")
    assert (logged.seed, logged.scale_lr, logged.learning_rate) == (5, True, pytest.approx(2e-4))
    assert logged.model.params.scale_by_std is True and logged.lightning.logger == "csv"
    assert logged.data.params.batch_size == 2
    line = next(message for message in caplog.messages if message.startswith("epoch 0  step 2/2  loss "))
    assert [name for name in ("lr", "grad", "img/s", "left") if f" {name}" in line] == ["lr", "grad", "img/s", "left"]


def test_own_progress_bar_replaces_the_default(run, caplog):
    bar = "lightning.callbacks.bar={target: ldm.training.progress.ProgressBar, params: {seconds: 0}}"
    words = [bar, "--enable_progress_bar", "true", "lightning.callbacks.image_logger=null"]
    assert run(text_config(), "--max_steps", "2", *words, validation=None) == 0
    assert len([message for message in caplog.messages if message.startswith("epoch 0  step ")]) == 2
