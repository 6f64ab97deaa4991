"""Tests of `ldm.preparation.sizing` and `ldm.preparation.networks`: networks and batches for images and memory."""

from __future__ import annotations

import pytest
import torch
from omegaconf import OmegaConf

from ldm.errors import UserError
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.preparation.machine import GIGABYTE, Machine
from ldm.preparation.networks import KL, VQ, VQ_INTERFACE, known_first_stage, make_denoiser, new_first_stage
from ldm.preparation.sizing import _cost, denoiser_schedule, first_stage_schedule

CPU = Machine(16 * GIGABYTE, 4)
SMALL, LARGE = (Machine(64 * GIGABYTE, 8, gigabytes * GIGABYTE) for gigabytes in (8, 80))
TASKS = ("text", "class", "unconditional", "inpainting", "superres")


def test_this_machine_is_described():
    machine = Machine.this()
    assert machine.memory > GIGABYTE // 2 and machine.cores >= 1
    assert machine.has_gpu == torch.cuda.is_available()
    assert str(SMALL) == "8 cores, 64 GB of memory, a GPU with 8 GB" and str(CPU).endswith("no GPU")


@pytest.mark.parametrize(("size", "factor", "levels"), [(32, 4, 2), (64, 4, 3), (128, 8, 3), (256, 8, 4), (512, 8, 4)])
def test_larger_images_have_smaller_latents_and_deeper_networks(size, factor, levels):
    stage = new_first_stage(size, CPU)
    denoiser = make_denoiser("text", size, stage, 100, CPU)
    assert stage.factor == factor and len(denoiser.params["channel_mult"]) == levels
    assert size % (factor * denoiser.multiple) == 0
    assert denoiser.params["image_size"] == size // factor


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("size", [32, 128])
def test_the_network_reads_what_the_task_needs(task, size):
    stage = new_first_stage(size, CPU)
    denoiser = make_denoiser(task, size, stage, 100, CPU, quick=True)
    channels = {"inpainting": 9, "superres": 7 if size == 32 else 16}.get(task, 4)
    assert denoiser.params["in_channels"] == channels and denoiser.params["out_channels"] == 4
    assert bool(denoiser.context) == (task in ("text", "class"))


def test_more_images_and_memory_allow_larger_networks():
    def width(count, machine):
        return make_denoiser("text", 64, new_first_stage(64, machine), count, machine).params["model_channels"]

    assert width(100, LARGE) < width(10_000, LARGE) < width(100_000, LARGE) < width(10**6, LARGE) == 256
    assert width(10**6, CPU) < width(10**6, SMALL) < width(10**6, LARGE)


def test_the_cost_of_a_network_is_that_of_its_backward_pass():
    """The device "meta" reports a little more than the network with values, whose attention keeps less."""
    params = {"image_size": 8, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": 1}
    params |= {"attention_resolutions": [2], "channel_mult": [1, 2], "num_heads": 2, "use_checkpoint": False}
    weights, activations = _cost(
        lambda: UNetModel(**params), lambda model: model(torch.zeros(1, 4, 8, 8), torch.zeros(1))
    )
    model = UNetModel(**params)
    own = {parameter.data_ptr() for parameter in model.parameters()}
    kept = {}

    def record(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor  # the tensor must live, so that its address stays its own
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        model(torch.zeros(1, 4, 8, 8), torch.zeros(1))
    assert weights == sum(parameter.numel() for parameter in model.parameters())
    expected = sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in own)
    assert 100_000 < expected <= activations <= 1.15 * expected


def test_little_memory_means_small_batches_that_are_accumulated():
    stage = new_first_stage(512, LARGE)
    large, small = (first_stage_schedule(stage, 512, 10_000, machine, None, True) for machine in (LARGE, SMALL))
    assert small.batch_size < large.batch_size and small.items == large.items == 16
    assert small.accumulate == 16 // small.batch_size
    assert small.base_learning_rate * small.items == pytest.approx(small.learning_rate)


def test_batches_are_not_larger_than_the_data():
    denoiser = make_denoiser("text", 64, new_first_stage(64, LARGE), 10, LARGE)
    plan = denoiser_schedule(denoiser, 10, LARGE, None)
    assert plan.batch_size == 8 and plan.accumulate == 1


def test_more_images_mean_more_steps_within_bounds():
    denoiser = make_denoiser("text", 64, new_first_stage(64, LARGE), 10, LARGE)
    steps = [denoiser_schedule(denoiser, count, LARGE, None).steps for count in (50, 5_000, 50_000, 10**6)]
    assert steps[0] == 10_000 < steps[1] < steps[2] < steps[3] == 400_000
    assert denoiser_schedule(denoiser, 50, LARGE, 7).steps == 7


def test_every_run_is_validated():
    denoiser = make_denoiser("text", 64, new_first_stage(64, LARGE), 10, LARGE)
    for count in (10, 1000, 100_000):
        plan = denoiser_schedule(denoiser, count, LARGE, None)
        assert plan.validate_every * -(-count // plan.items) <= plan.steps


# -- first stages of other models -----------------------------------------------------------------------------------


def test_the_first_stage_of_the_bundled_model_is_found(repo_root, monkeypatch):
    monkeypatch.chdir(repo_root)
    stage = known_first_stage("emoji64")
    assert (stage.target, stage.factor, stage.channels, stage.name) == (KL, 8, 16, "emoji64")
    assert stage.weights == repo_root / "models/ldm/emoji64/model.safetensors"
    assert set(stage.params) == {"embed_dim", "ddconfig"}


@pytest.mark.parametrize("target", [VQ, VQ_INTERFACE])
def test_a_first_stage_with_a_codebook_is_found(tmp_path, target):
    params = {"embed_dim": 3, "n_embed": 16, "monitor": "x", "ddconfig": {"ch_mult": [1, 2, 4]}, "lossconfig": {}}
    model = {"target": target, "params": params}
    if target == VQ_INTERFACE:
        model = {"target": "a.B", "params": {"first_stage_config": model}}
    OmegaConf.save(OmegaConf.create({"model": model}), tmp_path / "config.yaml")
    (tmp_path / "model.ckpt").touch()
    stage = known_first_stage(str(tmp_path))
    assert (stage.target, stage.inner_target, stage.factor, stage.is_kl) == (VQ, VQ_INTERFACE, 4, False)
    assert set(stage.params) == {"embed_dim", "n_embed", "ddconfig"}


def test_other_models_are_no_first_stages(tmp_path):
    OmegaConf.save(OmegaConf.create({"model": {"target": "a.B", "params": {}}}), tmp_path / "config.yaml")
    (tmp_path / "model.ckpt").touch()
    with pytest.raises(UserError, match="is neither an AutoencoderKL nor a VQModel"):
        known_first_stage(str(tmp_path))


def test_super_resolution_needs_latents_that_are_small_enough(tmp_path):
    stage = new_first_stage(64, CPU)
    shallow = {**stage.params, "ddconfig": {**stage.params["ddconfig"], "ch_mult": [1, 2]}}
    with pytest.raises(UserError, match="a factor of at least 4, not 2"):
        make_denoiser("superres", 64, type(stage)(KL, shallow), 10, CPU)
