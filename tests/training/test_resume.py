"""A resumed run equals an uninterrupted run, bit for bit."""

import copy

import pytest
import torch
from omegaconf import OmegaConf
from tiny_models import text_config

import main

QUIET = ["--enable_progress_bar", "false", "--enable_model_summary", "false", "--no-test"]

FIRST_STAGE = {
    "target": "ldm.models.autoencoder.AutoencoderKL",
    "params": {
        "monitor": "val/rec_loss",
        "embed_dim": 3,
        "ddconfig": text_config()["params"]["first_stage_config"]["params"]["ddconfig"],
        "lossconfig": {
            "target": "ldm.modules.losses.LPIPSWithDiscriminator",
            "params": {"disc_start": 2, "perceptual_weight": 0.0, "disc_num_layers": 1},
        },
    },
}
DIFFUSION = text_config(
    use_ema=True,
    scale_by_std=True,
    monitor="val/loss_simple_ema",
    scheduler_config={
        "target": "ldm.lr_scheduler.LambdaLinearScheduler",
        "params": {
            "warm_up_steps": [3],
            "cycle_lengths": [100],
            "f_start": [0.1],
            "f_max": [1.0],
            "f_min": [1.0],
        },
    },
)


def write_config(path, model, **trainer):
    emoji = {"size": 16}
    config = {
        "model": {"base_learning_rate": 1e-3, **copy.deepcopy(model)},
        "data": {
            "target": "main.DataModuleFromConfig",
            "params": {
                "batch_size": 2,
                "num_workers": 0,
                "train": {"target": "ldm.data.emoji.EmojiTrain", "params": emoji},
                "validation": {"target": "ldm.data.emoji.EmojiValidation", "params": emoji},
            },
        },
        "lightning": {
            "trainer": {"limit_val_batches": 1, "num_sanity_val_steps": 1, **trainer},
            "callbacks": {"image_logger": {"params": {"disabled": True}}},
        },
    }
    OmegaConf.save(OmegaConf.create(config), path)
    return path


def train(*arguments):
    assert main.main(["-t", *QUIET, *map(str, arguments)]) == 0


def only_run(folder):
    (run,) = folder.iterdir()
    return run


def state(run):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def assert_same(a, b, path=""):
    """Assert that two nested structures are equal, bit for bit."""
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for index, (left, right) in enumerate(zip(a, b, strict=True)):
            assert_same(left, right, f"{path}/{index}")
    else:
        assert a == b, path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trainer", "stop"),
    [({"limit_train_batches": 2}, 2), ({"limit_train_batches": 10}, 2), ({"limit_train_batches": 3}, 4)],
    ids=["at the end of an epoch", "within the first epoch", "within the second epoch"],
)
@pytest.mark.parametrize("model", [FIRST_STAGE, DIFFUSION], ids=["first stage", "diffusion"])
def test_resumed_run_equals_uninterrupted_run(model, trainer, stop, tmp_path):
    config = write_config(tmp_path / "tiny.yaml", model, **trainer)
    train("-b", config, "-l", tmp_path / "whole", "--max_steps", stop + 3)
    train("-b", config, "-l", tmp_path / "halves", "--max_steps", stop)
    half = only_run(tmp_path / "halves")
    assert state(half)["global_step"] == stop
    train("-r", half, "--max_steps", stop + 3)

    whole, halves = state(only_run(tmp_path / "whole")), state(half)
    assert whole["global_step"] == halves["global_step"] == stop + 3
    assert whole["epoch"] == halves["epoch"]
    for entry in ("state_dict", "optimizer_states", "lr_schedulers", "rng"):
        assert_same(whole[entry], halves[entry], entry)
