"""Components of a run: the strategy for several processes, and the callback that keeps the best checkpoints."""

import types

import pytest
import torch
from omegaconf import OmegaConf

from ldm.errors import UserError
from ldm.training.assembly import build_model_checkpoint, find_strategy, process_count

FIRST_STAGE = types.SimpleNamespace(adversarial_loss=None)
DIFFUSION = types.SimpleNamespace()


@pytest.mark.parametrize(
    ("settings", "strategy"),
    [
        ({}, "auto"),
        ({"devices": 2}, "ddp_find_unused_parameters_true"),
        ({"devices": 2, "strategy": "auto"}, "ddp_find_unused_parameters_true"),
        ({"devices": 1, "num_nodes": 2}, "ddp_find_unused_parameters_true"),
        ({"devices": 1, "strategy": "ddp"}, "ddp_find_unused_parameters_true"),
        ({"devices": 2, "strategy": "ddp_spawn"}, "ddp_spawn_find_unused_parameters_true"),
        ({"devices": 2, "strategy": "ddp_fork"}, "ddp_fork_find_unused_parameters_true"),
        ({"devices": 2, "strategy": "ddp_notebook"}, "ddp_notebook_find_unused_parameters_true"),
        ({"devices": 2, "strategy": "ddp_find_unused_parameters_true"}, "ddp_find_unused_parameters_true"),
        ({"devices": 2, "strategy": "fsdp"}, "fsdp"),
    ],
)
@pytest.mark.parametrize("model", [FIRST_STAGE, DIFFUSION], ids=["first stage", "diffusion model"])
def test_ddp_searches_for_unused_parameters(settings, strategy, model):
    assert find_strategy(settings, model) == strategy


def test_first_stage_without_the_search_raises_user_error():
    strategy = "ddp_spawn_find_unused_parameters_false"
    assert find_strategy({"devices": 2, "strategy": strategy}, DIFFUSION) == strategy
    with pytest.raises(UserError, match=rf"--strategy {strategy} cannot train a first stage .*; give ddp_spawn$"):
        find_strategy({"devices": 2, "strategy": strategy}, FIRST_STAGE)


def test_devices_that_lightning_chooses_are_counted(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert process_count({"accelerator": "auto"}) == 4
    assert process_count({"accelerator": "auto", "devices": 1}) == 1
    assert process_count({"accelerator": "cpu"}) == 1


@pytest.mark.parametrize(
    ("configured", "has_validation", "expected"),
    [
        ({}, True, ("val/loss", 3)),
        ({}, False, (None, 1)),
        ({"save_top_k": -1}, False, (None, -1)),
        ({"monitor": "val/loss_ema"}, True, ("val/loss_ema", 3)),
        ({"monitor": "val/loss_ema"}, False, (None, 1)),
        ({"monitor": "train/loss"}, False, ("train/loss", 3)),
    ],
)
def test_latest_checkpoint_is_kept_without_validation(configured, has_validation, expected, tmp_path):
    plan = types.SimpleNamespace(
        checkpoints=tmp_path, lightning=OmegaConf.create({"modelcheckpoint": {"params": configured}})
    )
    callback = build_model_checkpoint(plan, types.SimpleNamespace(monitor="val/loss"), has_validation)
    assert (callback.monitor, callback.save_top_k) == expected
