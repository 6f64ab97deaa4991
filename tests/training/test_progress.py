"""The progress of a run in one line."""

import io
import logging
import sys
import types

import pytest
import torch
from pytorch_lightning import LightningModule, Trainer

from ldm.training.limits import total_steps
from ldm.training.loader import ResumableLoader
from ldm.training.modules import ManualOptimization
from ldm.training.progress import COLUMNS, ProgressBar, duration, progress_line
from ldm.training.resume import TimeLimit
from ldm.training.throughput import Throughput

QUIET = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "num_sanity_val_steps": 0}


class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(1, 1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.125)

    def training_step(self, batch, batch_idx):
        self.log("train/loss", torch.tensor(0.5), prog_bar=True, on_step=True, on_epoch=True)
        self.log("train/grad_norm", torch.tensor(0.25), on_step=True, on_epoch=False)
        return self.net(batch["image"]).square().mean()

    def validation_step(self, batch, batch_idx):
        logging.getLogger("ldm.test").warning("between")


def fit(bar, count=6, validate=False, **options):
    data = [{"image": torch.ones(1)}] * (4 * count)
    trainer = Trainer(accelerator="cpu", callbacks=[bar, Throughput()], **QUIET, **options)
    trainer.fit(Module(), ResumableLoader(data, 4), ResumableLoader(data[:4], 4) if validate else None)


def lines(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "ldm.training.progress"]


def test_log_file_has_a_line_for_each_interval_and_the_last(caplog):
    with caplog.at_level("INFO"):
        fit(ProgressBar(seconds=3600), max_steps=6)
    (line,) = lines(caplog)
    fields = line.split("  ")
    assert fields[:5] == ["epoch 0", "step 6/6", "loss 0.5", "lr 0.125", "grad 0.25"]
    assert fields[5].endswith(" img/s") and float(fields[5].split()[0]) > 0
    assert fields[6:] == ["left 0:00:00"]
    caplog.clear()
    with caplog.at_level("INFO"):
        fit(ProgressBar(seconds=0), count=2, max_steps=4)
    assert [line.split("  ")[:2] for line in lines(caplog)] == [
        ["epoch 0", "step 1/4"],
        ["epoch 0", "step 2/4"],
        ["epoch 1", "step 3/4"],
        ["epoch 1", "step 4/4"],
    ]
    assert "left" not in lines(caplog)[0], "one step is no basis for an estimate"
    assert all(line.count("left") == 1 for line in lines(caplog)[1:])


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_terminal_shows_one_line_below_the_log_lines(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    handler = logging.StreamHandler(terminal)
    logging.getLogger().addHandler(handler)
    try:
        fit(ProgressBar(refresh_seconds=0), count=2, validate=True, max_epochs=2)
    finally:
        logging.getLogger().removeHandler(handler)
    text = terminal.getvalue()
    shown = [line.split("\r")[-1].rstrip() for line in text.split("\n")]
    assert "between" in shown, "a log line begins at the start of a line of the terminal"
    # Whether a bar fits depends on the speed of the machine.
    assert shown[-2].startswith("epoch 1  step 4/4  ") and "loss 0.5  lr 0.125" in shown[-2] and shown[-1] == ""
    bars = [part for line in text.split("\n") for part in line.split("\r") if part.startswith("epoch")]
    assert len(bars) >= 4 and all(len(bar) < COLUMNS for bar in bars)
    assert "validation of step 2  batch 1/1" in text
    assert handler.filters == []


def test_progress_can_be_disabled(caplog):
    bar = ProgressBar(seconds=0)
    bar.disable()
    with caplog.at_level("INFO"):
        fit(bar, max_steps=2)
    assert lines(caplog) == []


FIELDS = {
    "epoch": "epoch 1234",
    "step": "step 1234567/5000000",
    "loss": "loss 1.23e-05",
    "disc": "disc 1.23e-05",
    "lr": "lr 1.23e-06",
    "grad": "grad 1.23e-02",
    "speed": "12345 img/s",
    "left": "left 20 d 23 h",
}


def test_long_line_leaves_out_the_least_important_fields():
    assert len(progress_line(FIELDS, COLUMNS, 0.5)) <= COLUMNS
    assert progress_line(FIELDS).split("  ") == [text for name, text in FIELDS.items() if name not in ("epoch", "disc")]
    assert progress_line(FIELDS, 60).split("  ") == [FIELDS[name] for name in ("step", "loss", "left")]


@pytest.mark.parametrize(("share", "bar"), [(0.0, "...."), (0.5, "##.."), (1.0, "####"), (2.0, "####")])
def test_bar_fills_the_rest_of_the_line(share, bar):
    assert progress_line({"step": "step 3/6", "loss": "loss 1"}, 24, share) == f"step 3/6  [{bar}]  loss 1"


@pytest.mark.parametrize(
    ("seconds", "text"), [(59.9, "0:00:59"), (3723, "1:02:03"), (172799, "47:59:59"), (20 * 86400 + 7200, "20 d 2 h")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("limits", "accumulated", "total"),
    [
        ({"max_steps": 7}, 1, 7),
        ({"max_steps": -1, "max_epochs": 3}, 1, 15),
        ({"max_steps": -1, "max_epochs": 3}, 2, 9),
        ({"max_steps": 4, "max_epochs": 3}, 2, 4),
        ({"max_steps": -1, "max_epochs": -1}, 1, None),
        ({"max_steps": -1, "max_epochs": 3, "num_training_batches": float("inf")}, 1, None),
    ],
)
@pytest.mark.parametrize("is_first_stage", [False, True])
def test_total_steps(limits, accumulated, total, is_first_stage):
    module = types.SimpleNamespace(manual=ManualOptimization(accumulated)) if is_first_stage else None
    values = {"max_epochs": -1, "num_training_batches": 5, "lightning_module": module}
    values["accumulate_grad_batches"] = 1 if is_first_stage else accumulated
    assert total_steps(types.SimpleNamespace(**{**values, **limits})) == total


def test_time_limit_bounds_the_time_left(caplog):
    bar = ProgressBar(seconds=0)
    data = [{"image": torch.ones(1)}] * 8
    limit = TimeLimit({"hours": 1})
    trainer = Trainer(accelerator="cpu", callbacks=[bar, limit], max_epochs=-1, limit_train_batches=2, **QUIET)
    trainer.should_stop = False
    module = Module()
    module.on_train_batch_end = lambda *args: setattr(trainer, "should_stop", trainer.global_step >= 2)
    with caplog.at_level("INFO"):
        trainer.fit(module, ResumableLoader(data, 4))
    assert lines(caplog)[1].split("  ")[:2] == ["epoch 0", "step 2"]
    assert lines(caplog)[1].endswith("left 0:59:59")
