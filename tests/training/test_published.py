"""Published functions of `main.py`, and published methods of its callbacks."""

from __future__ import annotations

import argparse
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from pytorch_lightning import LightningModule, Trainer
from torch.utils.data import DataLoader

import main
from ldm.data.base import Txt2ImgIterableBaseDataset


def test_parser_takes_published_options_and_arguments():
    parser = main.get_parser(description="client", add_help=False)
    opt, unknown = parser.parse_known_args(["-b", "a.yaml", "-t", "--max_steps", "3", "model.x=1"])
    assert (opt.base, opt.train, opt.max_steps, unknown) == (["a.yaml"], True, 3, ["model.x=1"])
    assert parser.description == "client"


def test_changed_arguments_of_the_trainer_are_listed():
    opt = argparse.Namespace(max_steps=3, accelerator="auto", devices="auto", precision="16-true", base=["a.yaml"])
    assert main.nondefault_trainer_args(opt) == ["max_steps", "precision"]


class Numbers(torch.utils.data.Dataset):
    """Data set of the next random number of NumPy."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return int(np.random.randint(2**31))


class Stream(Txt2ImgIterableBaseDataset):
    """Stream of its ids."""

    def __iter__(self):
        return iter(self.sample_ids)


def test_workers_have_seeds_and_shares_of_their_own():
    np.random.seed(3)
    numbers = [int(n) for n in DataLoader(Numbers(), num_workers=2, worker_init_fn=main.worker_init_fn)]
    assert len(set(numbers)) == 4, "without a seed for each worker, the workers return equal numbers"
    stream = Stream(num_records=6, valid_ids=list(range(6)))
    ids = [int(n) for n in DataLoader(stream, num_workers=2, worker_init_fn=main.worker_init_fn)]
    assert sorted(ids) == list(range(6))
    with pytest.raises(RuntimeError, match="runs in a worker of a data loader"):
        main.worker_init_fn(0)


class Previews(LightningModule):
    """Module that returns images and trains one number."""

    def __init__(self):
        super().__init__()
        self.number = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, batch_idx):
        return self.number

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)

    def log_images(self, batch, split="train", **kwargs):
        return {"inputs": batch, "twice": batch / 2}


class ClientLogger(main.ImageLogger):
    """Client that logs at every third batch, to a folder of its own."""

    written: ClassVar[list] = []

    def check_frequency(self, check_idx):
        return check_idx % 3 == 0

    def log_local(self, save_dir, split, images, global_step, current_epoch, batch_idx):
        self.written.append((split, *images, global_step))


def fit(tmp_path, logger, count=6):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(**quiet, max_epochs=1, enable_checkpointing=False, callbacks=[logger], default_root_dir=tmp_path)
    module = Previews()
    trainer.fit(module, DataLoader(torch.zeros(count, 3, 8, 8), batch_size=1))
    return module


def test_overrides_of_the_image_logger_are_called(tmp_path):
    ClientLogger.written.clear()
    fit(tmp_path, ClientLogger(batch_frequency=1000, max_images=2))
    steps = [(split, key, step) for split, key, step in ClientLogger.written]
    assert steps == [("train", key, step) for step in (3, 6) for key in ("inputs", "twice")]
    assert not (tmp_path / "images").exists()


def test_image_logger_has_published_methods(tmp_path):
    logger = main.ImageLogger(8, 2)
    assert logger.log_steps == [1, 2, 4, 8]
    assert [step for step in range(1, 18) if logger.check_frequency(step)] == [1, 2, 4, 8, 16]
    module = fit(tmp_path, main.ImageLogger(8, 2, disabled=True))
    module._trainer = SimpleNamespace(
        default_root_dir=tmp_path,
        is_global_zero=True,
        global_step=3,
        current_epoch=1,
        loggers=[],
        precision_plugin=module.trainer.precision_plugin,
    )
    logger.log_img(module, torch.zeros(2, 3, 8, 8), 5)
    names = [path.name for path in sorted((tmp_path / "images" / "train").iterdir())]
    assert names == ["inputs_gs-000003_e-000001_b-000005.png", "twice_gs-000003_e-000001_b-000005.png"]
    logger.log_local(tmp_path / "own", "val", {"x": torch.zeros(1, 3, 8, 8)}, 1, 2, 3)
    assert (tmp_path / "own/images/val/x_gs-000001_e-000002_b-000003.png").is_file()
