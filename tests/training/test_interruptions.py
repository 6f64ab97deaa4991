"""Interrupted runs: after five interruptions within one epoch they equal an uninterrupted run bit for bit."""

import collections
import csv
import itertools
import random
import signal
import sys
import types

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from small_runs import FIRST_STAGE, assert_same, only_run, state
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_models import text_config

import main

ITEMS, BATCH_SIZE, EPOCHS = 13, 2, 2
BATCHES = 7  # in an epoch
UNEQUAL = ("train/images_per_second",)
SCHEDULE = {
    "target": "ldm.lr_scheduler.LambdaLinearScheduler",
    "params": {"warm_up_steps": [3], "cycle_lengths": [100], "f_start": [0.1], "f_max": [1.0], "f_min": [1.0]},
}
VQ = {
    "target": "ldm.models.autoencoder.VQModel",
    "params": {**FIRST_STAGE["params"], "n_embed": 16, "scheduler_config": SCHEDULE, "use_ema": True},
}
VQ["params"]["ddconfig"] = {**VQ["params"]["ddconfig"], "double_z": False}
VQ["params"]["lossconfig"] = {
    "target": "ldm.modules.losses.vqperceptual.VQLPIPSWithDiscriminator",
    "params": {"disc_start": 2, "perceptual_weight": 0.0, "disc_num_layers": 1, "disc_conditional": False},
}
LDM = text_config(use_ema=True, scale_by_std=True, monitor="val/loss_simple_ema", scheduler_config=SCHEDULE)


class Augmented:
    """Data set whose items depend on the random numbers of Python, NumPy and PyTorch."""

    def __init__(self, size=ITEMS):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        shift = random.random() + np.random.rand() + torch.rand(1).item()
        image = np.linspace(-1, -0.9, 768, dtype=np.float32).reshape(16, 16, 3) + np.float32(shift / 2)
        return {"image": image, "caption": "a fox", "index": index}


@pytest.fixture
def data(monkeypatch):
    toys = types.ModuleType("toys")
    toys.Augmented = Augmented
    monkeypatch.setattr(Augmented, "__module__", "toys")
    monkeypatch.setitem(sys.modules, "toys", toys)


class Ledger(list):
    """Indices of the items of each trained batch.

    Attributes:
        signals: numbers of trained batches in which SIGTERM arrives.
        validations: numbers of evaluations in validations in which SIGTERM arrives.
        failures: numbers of trained batches that fail once.
    """

    def __init__(self):
        self.signals, self.validations, self.failures = set(), set(), set()
        self.evaluations = 0

    def record(self, model, batch):
        if not model.training:
            self.evaluations += 1
            if self.evaluations in self.validations:
                signal.raise_signal(signal.SIGTERM)
            return
        self.append(batch["index"].tolist())
        if len(self) in self.failures:
            self.failures.remove(len(self))
            self.pop()
            raise ZeroDivisionError
        if len(self) in self.signals:
            signal.raise_signal(signal.SIGTERM)


@pytest.fixture
def ledger(monkeypatch):
    """Return the ledger of the training runs of a test."""
    from ldm.models.autoencoder import AutoencoderKL, VQModel
    from ldm.models.diffusion.ddpm import LatentDiffusion

    ledger = Ledger()
    for kind, name in ((AutoencoderKL, "reconstruct"), (VQModel, "reconstruct"), (LatentDiffusion, "shared_step")):
        original = getattr(kind, name)

        def recorded(self, batch, *args, _original=original, **kwargs):
            ledger.record(self, batch)
            return _original(self, batch, *args, **kwargs)

        monkeypatch.setattr(kind, name, recorded)
    return ledger


def write(path, model, workers, **trainer):
    config = {
        "model": {"base_learning_rate": 1e-3, **model},
        "data": {
            "target": "main.DataModuleFromConfig",
            "params": {
                "batch_size": BATCH_SIZE,
                "num_workers": workers,
                "train": {"target": "toys.Augmented"},
                "validation": {"target": "toys.Augmented", "params": {"size": 2}},
            },
        },
        "lightning": {
            "trainer": {
                "max_epochs": EPOCHS,
                "num_sanity_val_steps": 0,
                "val_check_interval": 2,
                "log_every_n_steps": 1,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                **trainer,
            },
            "callbacks": {"image_logger": None},
            "logger": ["tensorboard", "csv"],
        },
    }
    OmegaConf.save(OmegaConf.create(config), path)


def train(*words):
    return main.main(["-t", "--no-test", "--allow-target", "toys", *map(str, words)])


def scalars(run):
    """Return all values in TensorBoard: (step, value) by name."""
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if tag not in UNEQUAL
    }


def rows(run):
    """Return the rows of the CSV file."""
    (path,) = run.rglob("metrics.csv")
    with path.open(newline="") as file:
        return [{key: value for key, value in row.items() if key not in UNEQUAL} for row in csv.DictReader(file)]


# Model, loader workers, accumulated batches, and the batch that fails once: in the last case the first batch of a step,
# because Lightning logs the learning rate of the others again.
CASES = {
    "kl-2-workers": (FIRST_STAGE, 2, 3, 5),
    "vq": (VQ, 0, 1, 5),
    "ldm-2-workers": (LDM, 2, 1, 5),
    "ldm-accumulated": (LDM, 0, 3, 4),
}


@pytest.mark.slow
@pytest.mark.parametrize(("model", "workers", "accumulated", "failing"), CASES.values(), ids=CASES.keys())
def test_interrupted_run_equals_uninterrupted_run(model, workers, accumulated, failing, data, ledger, tmp_path):
    write(tmp_path / "tiny.yaml", model, workers, accumulate_grad_batches=accumulated)
    assert train("-b", tmp_path / "tiny.yaml", "-l", tmp_path / "whole") == 0
    whole = only_run(tmp_path / "whole")
    expected = list(ledger)
    for epoch in range(EPOCHS):
        batches = expected[epoch * BATCHES : (epoch + 1) * BATCHES]
        seen = collections.Counter(itertools.chain.from_iterable(batches))
        assert seen == collections.Counter(range(ITEMS))

    ledger.clear()
    ledger.signals, ledger.validations = {1, 2, 4, 6, 7, 9}, {ledger.evaluations + 1}
    ledger.failures = {failing}
    statuses = [train("-b", tmp_path / "tiny.yaml", "-l", tmp_path / "parts")]
    parts = only_run(tmp_path / "parts")
    while statuses[-1] not in (0, 2):
        statuses.append(resume(parts))
    assert sorted(statuses, key=str) == [0, *[143] * 7, "failed"]
    assert ledger == expected
    a, b = state(whole), state(parts)
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "rng", "epoch", "global_step"):
        assert_same(a[key], b[key], key)
    assert scalars(parts) == scalars(whole)
    assert rows(parts) == rows(whole)


def resume(run):
    try:
        return train("-r", run)
    except ZeroDivisionError:
        return "failed"


@pytest.mark.slow
def test_run_with_a_damaged_checkpoint_continues_from_an_earlier_one(data, ledger, tmp_path, caplog):
    write(tmp_path / "tiny.yaml", LDM, 0)
    assert train("-b", tmp_path / "tiny.yaml", "-l", tmp_path / "whole") == 0
    whole, expected = only_run(tmp_path / "whole"), list(ledger)
    ledger.clear()
    ledger.signals = {5}
    assert train("-b", tmp_path / "tiny.yaml", "-l", tmp_path / "parts") == 143
    ledger.signals = set()
    parts = only_run(tmp_path / "parts")
    last = parts / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-1] + b"x")
    del ledger[4:]
    assert train("-r", parts) == 0
    assert f'"{last}" is damaged: its content differs from its checksum; resuming from' in caplog.text
    assert ledger == expected
    a, b = state(whole), state(parts)
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "rng", "epoch", "global_step"):
        assert_same(a[key], b[key], key)
    assert scalars(parts) == scalars(whole)
