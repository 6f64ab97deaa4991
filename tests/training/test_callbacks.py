"""Sample images and reports."""

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from torch import nn

from ldm.errors import UserError
from ldm.training.callbacks import CUDACallback, ImageLogger, SetupCallback
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


def fit(folder, *callbacks, count=6, epochs=1, validate=True, logger=False, kind=RandomImages, **options):
    torch.manual_seed(0)
    module = kind()
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


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"batch_frequency": 5}, [1, 2, 4, 5, 10]),
        ({"batch_frequency": 5, "increase_log_steps": False}, [5, 10]),
        ({"batch_frequency": 5, "increase_log_steps": False, "log_first_step": True}, [1, 5, 10]),
        ({"batch_frequency": 100}, [1, 2, 4, 8, 12]),
        ({"batch_frequency": 5, "disabled": True}, []),
    ],
)
def test_images_are_logged_at_multiples_and_powers_of_two(options, expected, tmp_path):
    fit(tmp_path, ImageLogger(max_images=2, **options), count=12, validate=False)
    assert steps(tmp_path) == expected


@pytest.mark.parametrize(
    ("count", "options", "expected"),
    [
        (12, {}, [1, 12]),
        (12, {"log_on_batch_idx": True}, [1, 12]),
        (1, {}, [1]),
        (20, {}, [20]),
        (12, {"disabled": True}, []),
    ],
)
def test_short_run_logs_its_first_and_last_batch(count, options, expected, tmp_path):
    fit(tmp_path, ImageLogger(20, 2, increase_log_steps=False, **options), count=count)
    assert steps(tmp_path) == expected
    assert steps(tmp_path, "val") == [step for step in expected if step == count]


def test_short_run_with_accumulated_batches_logs_its_last_step(tmp_path):
    options = {"accumulate_grad_batches": 3, "epochs": 2, "validate": False}
    fit(tmp_path, ImageLogger(20, 2, increase_log_steps=False), count=4, **options)
    names = sorted(path.name for path in (tmp_path / "images" / "train").glob("noise_*"))
    assert names == ["noise_gs-000000_e-000000_b-000000.png", "noise_gs-000004_e-000001_b-000003.png"]


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


class LoggerWithImages(CSVLogger):
    """Logger with Lightning's interface for images, that of `WandbLogger`."""

    def __init__(self, folder):
        super().__init__(folder)
        self.images = []

    def log_image(self, key, images, step=None, **options):
        assert isinstance(images, list)
        self.images.append((key, [image.shape for image in images], step))


class Recorder:
    """Experiment of a logger that records the calls of one method."""

    def __init__(self, method):
        self.calls = []
        setattr(self, method, lambda *args, **options: self.calls.append((args, options)))


class LoggerWithExperiment(CSVLogger):
    def __init__(self, folder, method, **attributes):
        super().__init__(folder)
        self.recorder = Recorder(method)
        vars(self).update(attributes)

    @property
    def experiment(self):
        return self.recorder

    def save(self):
        pass

    def log_metrics(self, metrics, step=None):
        pass


def test_images_reach_every_logger_that_shows_images(tmp_path):
    wandb, comet = LoggerWithImages(tmp_path / "a"), LoggerWithExperiment(tmp_path / "b", "log_image")
    mlflow = LoggerWithExperiment(tmp_path / "c", "log_image", run_id="run")
    tensorboard = LoggerWithExperiment(tmp_path / "d", "add_image")
    batch = LoggerWithExperiment(tmp_path / "e", "add_images")
    plain = CSVLogger(tmp_path / "f")
    fit(tmp_path, ImageLogger(1, 2), count=1, validate=False, logger=[wandb, comet, mlflow, tensorboard, batch, plain])
    noise, row = (12, 22, 3), (8, 24, 3)
    assert wandb.images == [("train/noise", [noise], 1), ("train/row", [row], 1)]
    calls = comet.recorder.calls
    assert [(args[0].shape, options) for args, options in calls] == [
        (noise, {"name": "train/noise", "step": 1}),
        (row, {"name": "train/row", "step": 1}),
    ]
    (run, image), options = mlflow.recorder.calls[0]
    assert (run, image.shape, options) == ("run", noise, {"key": "train/noise", "step": 1})
    (key, image), options = tensorboard.recorder.calls[0]
    assert (key, image.shape, options) == ("train/noise", noise, {"global_step": 1, "dataformats": "HWC"})
    (key, image), options = batch.recorder.calls[1]
    assert (key, image.shape, options) == ("train/row", (1, *row), {"global_step": 1, "dataformats": "NHWC"})


def test_failure_of_one_logger_is_reported_once_and_others_go_on(tmp_path, caplog):
    failing, working = LoggerWithImages(tmp_path / "a"), LoggerWithImages(tmp_path / "b")

    def fail(**options):
        raise ConnectionError("no\nnetwork")

    failing.log_image = lambda *args, **options: fail()
    fit(tmp_path, ImageLogger(1, 2), count=3, validate=False, logger=[failing, working])
    assert len(working.images) == 6
    assert warnings(caplog) == ["no images in LoggerWithImages: no network; training goes on"]
    assert steps(tmp_path) == [1, 2, 3]


class FailingImages(RandomImages):
    """Module whose images cannot be generated; each call uses random numbers first."""

    error: BaseException = ValueError("the sampler\n  needs more")

    def log_images(self, batch, split, **options):
        torch.rand(5)
        self.net.weight.grad = None
        raise self.error


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("the sampler\n  needs more"), "the sampler needs more"),
        (UserError("choose 100 steps"), "choose 100 steps"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"), "out of memory"),
        (MemoryError(), "out of memory"),
        (ZeroDivisionError(), "ZeroDivisionError"),
    ],
)
def test_failure_of_images_is_reported_once_and_training_goes_on(error, reason, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(FailingImages, "error", error)
    module = fit(tmp_path, ImageLogger(1, 2), kind=FailingImages, count=4, validate=False)
    assert len(module.random_numbers) == 4
    assert warnings(caplog) == [f"no train images: {reason}; training goes on"]
    assert module.training and not module.dropout.training


def test_failing_images_leave_random_numbers_unchanged(tmp_path):
    failing = fit(tmp_path, ImageLogger(1, 2), kind=FailingImages)
    assert failing.random_numbers == fit(tmp_path).random_numbers


def test_interruption_while_images_are_generated_stops_training(tmp_path, monkeypatch):
    monkeypatch.setattr(FailingImages, "error", KeyboardInterrupt())
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(tmp_path, ImageLogger(1, 2), kind=FailingImages, validate=False)


def test_images_that_are_not_finite_are_reported_and_not_written(tmp_path, caplog):
    bad = torch.zeros(1, 3, 8, 8)
    bad[0, 0, 2, 2] = float("nan")
    fit(tmp_path, ImageLogger(1, 2, log_images_kwargs={"bad": bad}), count=2, validate=False)
    assert steps(tmp_path, key="bad") == []
    assert steps(tmp_path, key="noise") == [1, 2]
    assert warnings(caplog) == ['the images "train/bad" are not finite and are not written; training goes on']


def test_failure_to_write_one_image_keeps_the_others(tmp_path, caplog):
    for name in ("noise", "maps"):
        (tmp_path / "images" / "train" / f"{name}_gs-000001_e-000000_b-000000.png").mkdir(parents=True)
    maps = {"maps": torch.zeros(1, 3, 8, 8)}
    fit(tmp_path, ImageLogger(1, 2, log_images_kwargs=maps), count=2, validate=False)
    assert steps(tmp_path, key="row") == [1, 2]
    (line,) = warnings(caplog)
    assert line.startswith('no train images "noise": ')


@pytest.mark.parametrize("channels", [1, 2, 4, 5, 7])
def test_images_of_any_number_of_channels_are_written(channels, tmp_path, caplog):
    values = torch.rand(2, channels, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    fit(tmp_path, ImageLogger(1, 2, log_images_kwargs={"maps": values}), count=1, validate=False)
    image = Image.open(tmp_path / "images" / "train" / "maps_gs-000001_e-000000_b-000000.png")
    assert (image.mode, image.size) == ("RGB", (2 * 8 + 6, 8 + 4))
    assert image.getextrema()[0][1] > 100
    assert warnings(caplog) == []


def test_last_logged_step_is_restored_from_state():
    before = ImageLogger(5, 2)
    before._last_step = {"train": 7, "val": 5}
    after = ImageLogger(5, 2)
    after.load_state_dict(before.state_dict())
    assert not after._is_due("train", 9)
    assert after._is_due("train", 10)


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
