"""Tests of `ldm.training.captions`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pytorch_lightning import Trainer
from tiny_models import make_model, text_config

from ldm.data.image_files import ImageFiles
from ldm.training.captions import CaptionWarning, report_captions, sampled_captions
from ldm.training.data import DataModuleFromConfig, WrappedDataset
from ldm.training.latents import CachedLatents
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


# -- the report at the start ----------------------------------------------------------------------------------------


class Captioned(ImageFiles):
    """Data set of captions whose images do not exist."""

    def __init__(self, captions):
        super().__init__([Path(f"{i}.png") for i in range(len(captions))], {"caption": captions})


def messages(caplog):
    return [record.getMessage() for record in caplog.records]


def test_the_share_of_cut_captions_is_reported(model, caplog):
    captions = ["red heart"] * 6 + [f"{LONG} {number}" for number in range(2)]
    assert report_captions(model, Captioned(captions))
    (line,) = messages(caplog)
    assert line.startswith(
        "25 % of the training captions have more than 16 tokens and are cut (2 of 8 training captions)"
    )
    assert "raise max_seq_len" in line and 'the training caption "Red heart Red heart' in line and "\n" not in line


def test_the_share_of_unknown_words_is_reported(model, caplog):
    captions = ["red heart", "zyzzyva, red", "red zyzzyva", "red heart and heart", "a Xyzzy fox"]
    assert report_captions(model, Captioned(captions))
    (line,) = messages(caplog)
    assert line.startswith("23 % of the words in the training captions are not in the vocabulary")
    assert 'such as "zyzzyva", "xyzzy"; ldm prepare' in line


def test_captions_that_fit_are_not_reported(model, caplog):
    assert report_captions(model, Captioned(["red heart", "fox on a blue background"]))
    assert not caplog.records


def test_captions_are_sampled_in_equal_distances():
    captions = [f"fox {number}" for number in range(5001)]
    found = sampled_captions(Captioned(captions), "caption")
    assert found == captions[::3] and len(found) <= 2000
    assert sampled_captions(WrappedDataset(Captioned(captions)), "caption") == found
    cached = CachedLatents(torch.zeros(4, 2, 1, 1), {"caption": captions[:4]})
    assert sampled_captions(cached, "caption") == captions[:4]


def test_data_sets_without_cheap_captions_are_not_read(model, caplog):
    class Slow(torch.utils.data.Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            raise AssertionError("an item is read")

    for dataset in (
        Slow(),
        WrappedDataset(Slow()),
        Captioned([None, "fox"]),
        CachedLatents(torch.zeros(1, 2, 1, 1), {}),
    ):
        assert not report_captions(model, dataset)
    assert not report_captions(torch.nn.Linear(1, 1), Captioned([LONG]))
    assert not caplog.records


def test_a_run_reports_cut_captions_once_before_its_first_step(model, caplog):
    captions = ["red heart"] * 6 + [f"{LONG} {number}" for number in range(2)]
    data = DataModuleFromConfig(2, num_workers=0, train={"target": "unused"})
    items = [{"image": torch.zeros(16, 16, 3), "caption": caption} for caption in captions]

    class Items(Captioned):
        def __getitem__(self, index):
            return items[index]

    data.datasets = {"train": Items(captions)}
    model.requires_grad_(True).learning_rate = 1e-4
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(max_epochs=1, num_sanity_val_steps=0, enable_checkpointing=False, **options)
    trainer.fit(lightning_module(model), datamodule=data)
    assert trainer.global_step == 4
    (line,) = [text for text in messages(caplog) if "tokens" in text]
    assert line.startswith("25 % of the training captions")
