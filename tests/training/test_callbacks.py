"""Sample images, reports and the progress bar."""

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.loggers import TensorBoardLogger
from torch import nn

from ldm.training.callbacks import CUDACallback, ImageLogger, ProgressBar, SetupCallback
from ldm.training.loader import ResumableLoader


class RandomImages(LightningModule):
    """Module that generates random images and records the random numbers of training."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(1, 1)
        self.dropout = nn.Dropout().eval()
        self.random_numbers, self.calls = [], []

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch, batch_idx):
        self.random_numbers.append(torch.rand(()).item())
        return self.net(batch["image"][:, 0, 0, :1]).square().mean()

    def validation_step(self, batch, batch_idx):
        pass

    def log_images(self, batch, split, **options):
        self.calls.append((split, len(batch["image"]), len(batch["caption"]), self.training, torch.is_grad_enabled()))
        return {"noise": torch.randn(4, 3, 8, 8), "row": torch.zeros(3, 8, 24), **options}


def batches(count):
    return ResumableLoader([{"image": torch.zeros(8, 8, 3), "caption": "x"}] * (4 * count), 4)


def fit(folder, *callbacks, count=6, epochs=1, validate=True, logger=False, **options):
    torch.manual_seed(0)
    module = RandomImages()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        default_root_dir=folder,
        callbacks=list(callbacks),
        logger=logger,
        num_sanity_val_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **options,
    )
    trainer.fit(module, batches(count), batches(2) if validate else None)
    return module


def steps(folder, split="train", key="noise"):
    return sorted(int(path.name.split("_gs-")[1][:6]) for path in (folder / "images" / split).glob(f"{key}_*.png"))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"batch_frequency": 5}, [1, 2, 4, 5, 10]),
        ({"batch_frequency": 5, "increase_log_steps": False}, [5, 10]),
        ({"batch_frequency": 5, "increase_log_steps": False, "log_first_step": True}, [1, 5, 10]),
        ({"batch_frequency": 100}, [1, 2, 4, 8]),
        ({"batch_frequency": 5, "disabled": True}, []),
    ],
)
def test_images_are_logged_at_multiples_and_powers_of_two(options, expected, tmp_path):
    fit(tmp_path, ImageLogger(max_images=2, **options), count=12, validate=False)
    assert steps(tmp_path) == expected


def test_log_on_batch_idx_counts_batches_of_the_epoch(tmp_path):
    options = {"increase_log_steps": False, "log_on_batch_idx": True}
    fit(tmp_path, ImageLogger(3, 2, **options), count=5, epochs=2, validate=False)
    names = sorted(path.name for path in (tmp_path / "images" / "train").glob("noise_*"))
    assert names == ["noise_gs-000004_e-000000_b-000003.png", "noise_gs-000009_e-000001_b-000003.png"]


def test_accumulated_batches_log_images_once_per_step(tmp_path):
    fit(tmp_path, ImageLogger(1, 2), count=6, validate=False, accumulate_grad_batches=3)
    assert steps(tmp_path) == [1, 2]


def test_validation_logs_its_first_batch_at_the_same_frequency(tmp_path):
    fit(tmp_path, ImageLogger(4, 2, increase_log_steps=False), count=8, val_check_interval=2)
    assert steps(tmp_path, "val") == [4, 8]
    assert len(list((tmp_path / "images" / "val").glob("*_b-000000.png"))) == 4


def test_image_logging_leaves_random_numbers_unchanged(tmp_path):
    assert fit(tmp_path, ImageLogger(1, 2)).random_numbers == fit(tmp_path).random_numbers


def test_log_images_runs_on_few_items_in_eval_mode(tmp_path):
    module = fit(tmp_path, ImageLogger(100, 2), count=1)
    assert module.calls == [("train", 2, 2, False, False), ("val", 2, 2, False, False)]
    assert module.training and module.net.training and not module.dropout.training


@pytest.mark.parametrize(("rescale", "level"), [(True, 191), (False, 127)])
def test_rescale_and_clamp(rescale, level, tmp_path):
    options = {"log_images_kwargs": {"grey": torch.full((1, 3, 8, 8), 0.5), "bright": torch.full((1, 3, 8, 8), 3.0)}}
    fit(tmp_path, ImageLogger(1, 2, rescale=rescale, **options), count=1, validate=False)
    folder = tmp_path / "images" / "train"
    name = "gs-000001_e-000000_b-000000.png"
    assert Image.open(folder / f"grey_{name}").getpixel((4, 4)) == (level,) * 3
    assert Image.open(folder / f"bright_{name}").getpixel((4, 4)) == (255,) * 3
    assert Image.open(folder / f"noise_{name}").size == (2 * 8 + 6, 8 + 4)
    assert Image.open(folder / f"row_{name}").size == (24, 8), "grids are saved unchanged"


def test_images_are_logged_to_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, name="tensorboard", version="")
    fit(tmp_path, ImageLogger(1, 2), count=1, validate=False, logger=logger)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["images"]) == {"train/noise", "train/row"}


def test_last_logged_step_is_restored_from_state():
    before = ImageLogger(5, 2)
    before._last_step = {"train": 7, "val": 5}
    after = ImageLogger(5, 2)
    after.load_state_dict(before.state_dict())
    assert not after.check_frequency(9, after._last_step["train"])
    assert after.check_frequency(10, after._last_step["train"])


def test_time_and_memory_are_logged_every_epoch(tmp_path, caplog):
    with caplog.at_level("INFO", logger="ldm.training.callbacks"):
        fit(tmp_path, CUDACallback(), count=1, epochs=2)
    reports = [record.args for record in caplog.records if "peak memory" in record.msg]
    assert [epoch for epoch, _, _ in reports] == [0, 1]
    assert all(seconds > 0 and mebibytes > 10 for _, seconds, mebibytes in reports)


def test_folders_and_configurations_are_written_when_training_starts(tmp_path):
    run = tmp_path / "logs" / "x"
    config = OmegaConf.create({"model": {"a": 1}})
    callback = SetupCallback(None, "now", run, run / "checkpoints", run / "configs", config, OmegaConf.create({"b": 2}))
    assert not run.exists()
    fit(tmp_path, callback, count=1)
    assert OmegaConf.load(run / "configs" / "now-project.yaml") == config
    assert OmegaConf.load(run / "configs" / "now-lightning.yaml") == {"lightning": {"b": 2}}
    assert (run / "checkpoints").is_dir()


def test_progress_bar_shows_time_left(capsys):
    bar = ProgressBar()
    module = RandomImages()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    Trainer(accelerator="cpu", max_steps=4, callbacks=[bar], **quiet).fit(module, batches(6))
    assert "left=0:00:00" in capsys.readouterr().out
