"""Tests of `ldm.training.captions`."""

from __future__ import annotations

import pytest
import torch
from pytorch_lightning import Trainer
from tiny_models import make_model, text_config

from ldm.training.captions import CaptionWarning
from ldm.training.loader import ResumableLoader
from ldm.training.modules import lightning_module

LONG = "Red heart " * 8


@pytest.fixture
def model():
    """Return a model that reads 16 tokens."""
    return make_model(text_config())


def test_long_captions_of_a_run_are_one_line(model, caplog):
    """Two epochs of four batches, in which every caption but the first is cut."""
    captions = ["red heart"] + [f"{LONG} {number}" for number in range(7)]
    data = [{"image": torch.zeros(16, 16, 3), "caption": caption} for caption in captions]
    model.requires_grad_(True).learning_rate = 1e-4
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(max_epochs=2, num_sanity_val_steps=0, enable_checkpointing=False, **options)
    trainer.fit(lightning_module(model), ResumableLoader(data, 2))
    assert trainer.global_step == 8
    (line,) = [record.getMessage() for record in caplog.records if "tokens" in record.getMessage()]
    assert line.startswith('the training caption "Red heart Red heart')
    assert 'has 19 tokens (start and end token included), and the model reads 16; cut: "… Red heart' in line
    assert line.endswith("other captions are cut without a message")


def test_batches_without_texts_are_no_error(model, caplog):
    warning = CaptionWarning()
    for batch in ({}, {"caption": None}, {"caption": [None, 3]}, {"caption": torch.zeros(2)}, torch.zeros(2)):
        warning.check(model, batch)
    assert not caplog.records
    warning.check(torch.nn.Linear(1, 1), {"caption": [LONG]})
    assert not caplog.records
    warning.check(model, {"caption": ("fox", LONG)})
    assert len(caplog.records) == 1
