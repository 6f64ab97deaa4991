"""Tests of `ldm.pipelines.loading`."""

from __future__ import annotations

import threading

import pytest
import torch
from tiny_models import text_config, write_model
from torch import nn

import ldm
from ldm.config.instantiate import instantiate_from_config
from ldm.errors import UserError
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.pipelines import loading
from ldm.pipelines.loading import (
    build_model,
    choose_device,
    for_inference,
    load_first_stage,
    load_model,
    move,
    skip_init,
)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    write_model(path)
    return path


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder / "config.yaml", folder / "model.ckpt")


def assert_same_weights(model, original):
    for name, value in original.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


# -- load_model ------------------------------------------------------------------------------------------------


def test_loaded_model_equals_the_saved_one(folder, model):
    original = write_model(folder)
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    assert_same_weights(model, original)


def test_skip_init_leaves_the_generator_and_torch_unchanged():
    """Initial weights are not sampled, but what constructors compute, such as the schedule, is present."""
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with skip_init():
        module = instantiate_from_config(text_config())
        nn.Linear(5, 5)
    assert torch.equal(torch.rand(4), expected)
    assert 0 < float(module.betas[0]) < float(module.betas[-1]) < 1
    assert nn.init.ones_(torch.zeros(2)).sum() == 2


def test_parameters_newer_than_the_file_get_initial_values(monkeypatch):
    weights = instantiate_from_config(text_config()).state_dict()
    missing = "first_stage_model.decoder.norm_out.weight"
    del weights[missing]
    original = loading.instantiate_from_config

    def uninitialised(config):
        """Build a model whose memory held other values before."""
        module = original(config)
        if nn.init.ones_(torch.zeros(1)) == 0:
            module.state_dict()[missing].fill_(float("nan"))
        return module

    monkeypatch.setattr(loading, "instantiate_from_config", uninitialised)
    built = build_model(text_config(), weights, "the test's weights")
    assert (built.state_dict()[missing] == 1).all()


@pytest.mark.parametrize("use_ema", [True, False])
def test_averages_replace_weights_if_the_configuration_keeps_them(tmp_path, use_ema):
    trained = instantiate_from_config(text_config(use_ema=True))
    trained.model_ema.num_updates.fill_(9)
    live = trained.model.diffusion_model.out[-1].bias
    trained.model_ema.diffusion_modelout2bias.fill_(7.0)
    write_model(tmp_path, text_config(use_ema=use_ema))
    torch.save({"state_dict": trained.state_dict()}, tmp_path / "model.ckpt")
    loaded = load_model(tmp_path / "config.yaml", tmp_path / "model.ckpt")
    bias = loaded.model.diffusion_model.out[-1].bias
    assert (bias == 7).all() if use_ema else torch.equal(bias, live)
    with loaded.ema_scope():
        assert loaded.model.diffusion_model.out[-1].bias is bias


def test_parts_that_only_training_needs_are_left_out():
    config = text_config(use_ema=True, ckpt_path="missing.ckpt")
    inner = config["params"]["first_stage_config"]["params"]
    inner |= {"ckpt_path": "missing.ckpt", "lossconfig": {"target": "ldm.modules.losses.LPIPSWithDiscriminator"}}
    params = for_inference(config, {"first_stage_model.x": torch.ones(1)})["params"]
    assert params["use_ema"] is False and "ckpt_path" not in params
    assert params["first_stage_config"]["params"]["lossconfig"] == {"target": "torch.nn.Identity"}
    assert "ckpt_path" not in params["first_stage_config"]["params"]
    kept = for_inference(config, {"model.x": torch.ones(1)})["params"]["first_stage_config"]["params"]
    assert kept["ckpt_path"] == "missing.ckpt", "weights in another file are still read from it"
    assert inner["ckpt_path"] == "missing.ckpt" and config["params"]["use_ema"], "the given configuration is unchanged"


def test_devices():
    assert choose_device("cpu") == CPU and choose_device().type in ("cpu", "cuda", "mps")
    assert choose_device(CPU) == CPU
    for name in ("toaster", "cuda:99", "meta:x", "vulkan"):
        with pytest.raises(UserError, match=f'the device "{name}" is not available here .*; leave it out or give cpu'):
            choose_device(name)


def test_place_moves_and_converts(folder):
    model = load_model(folder / "config.yaml", folder / "model.ckpt")
    assert move(model) is model and model.dtype == torch.float32
    assert move(model, "cpu", "bfloat16").dtype == torch.bfloat16
    assert model.alphas_cumprod.dtype == torch.float32, "the schedule keeps its precision"
    with pytest.raises(UserError, match='the device "toaster" is not available here'):
        move(model, "toaster")


# -- load ------------------------------------------------------------------------------------------------------


@pytest.fixture
def named(folder, tmp_path, monkeypatch):
    """Change to a folder in which the model is called "mine", and an autoencoder "coder"."""
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "models/ldm/mine")
    write_model(tmp_path / "models/first_stage_models/coder", text_config()["params"]["first_stage_config"])
    return tmp_path


def test_load_by_name_folder_and_files(folder, model, named):
    by_name, by_folder = ldm.load("mine", device="cpu"), ldm.load(folder, device="cpu")
    by_files = ldm.load(config=folder / "config.yaml", checkpoint=str(folder / "model.ckpt"), device=CPU)
    by_checkpoint = ldm.load(checkpoint=folder / "model.ckpt", device="cpu")
    for loaded, name in ((by_name, "mine"), (by_folder, "tiny"), (by_files, "tiny"), (by_checkpoint, "tiny")):
        assert isinstance(loaded, LatentDiffusion) and loaded.name == name
        assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())
        assert_same_weights(loaded, model)
        assert loaded.config["target"] == "ldm.models.diffusion.ddpm.LatentDiffusion"


def test_load_finds_first_stages_by_name(named):
    stage = ldm.load("coder", device="cpu")
    assert isinstance(stage, AutoencoderKL) and stage.name == "coder"
    assert stage.decode(torch.zeros(1, 3, 8, 8)).shape == (1, 3, 16, 16)


def test_load_converts_the_precision(named):
    model = ldm.load("mine", device="cpu", precision="bfloat16")
    assert model.dtype == torch.bfloat16 and model.alphas_cumprod.dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"no model is named; give a name \(available: .*coder.*mine.*\), a folder, or a checkpoint"),
        ({"model": "mime"}, 'there is no model "mime".*did you mean "mine"'),
        ({"model": "none/at/all"}, 'there is no model "none/at/all"'),
        ({"checkpoint": "none.ckpt"}, 'there is no checkpoint "none.ckpt"'),
        ({"checkpoint": "models/ldm/mine/model.ckpt", "config": "none.yaml"}, 'there is no configuration "none.yaml"'),
        ({"model": "mine", "device": "toaster"}, 'the device "toaster" is not available here'),
        ({"model": "mine", "precision": "int8"}, 'there is no precision "int8"; choose one of float32, bfloat16'),
    ],
)
def test_load_error_is_one_line(named, arguments, message):
    with pytest.raises(UserError, match=message) as raised:
        ldm.load(**arguments)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "mine", "checkpoint": "x"}, "leave out `config` and `checkpoint`"),
        ({"model": "mine", "config": "x"}, "leave out `config` and `checkpoint`"),
        ({"config": "x.yaml"}, 'the configuration "x.yaml" needs weights; give its `checkpoint`'),
    ],
)
def test_load_error_names_arguments_instead_of_options(named, arguments, message):
    with pytest.raises(UserError, match=message) as raised:
        ldm.load(**arguments)
    assert "--" not in str(raised.value)


def test_threads_that_load_models_leave_the_initialisation_alone():
    """Loading skips the initialisation of its own modules, and not that of modules that other threads build."""
    functions = {name: getattr(nn.init, name) for name in dir(nn.init)}
    inside, built = threading.Barrier(2), []

    def load():
        with skip_init():
            inside.wait()
            inside.wait()
            built.append(nn.Linear(4, 4).weight)

    def build():
        inside.wait()
        torch.manual_seed(0)
        built.append(nn.Linear(4, 4).weight)
        inside.wait()

    threads = [threading.Thread(target=each) for each in (load, build)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.manual_seed(0)
    assert torch.equal(built[0], nn.Linear(4, 4).weight)
    assert {name: getattr(nn.init, name) for name in dir(nn.init)} == functions


# -- values of weights -----------------------------------------------------------------------------------------


def test_weight_too_large_for_float16_raises_user_error(tmp_path):
    large = write_model(tmp_path)
    large.first_stage_model.decoder.conv_in.weight.data[0, 0, 0, 0] = 1e5
    torch.save({"state_dict": large.state_dict()}, tmp_path / "model.ckpt")
    files = tmp_path / "config.yaml", tmp_path / "model.ckpt"
    for load, name in (
        (load_model, "first_stage_model.decoder.conv_in.weight"),
        (load_first_stage, "decoder.conv_in.weight"),
    ):
        with pytest.raises(UserError, match=f'the weight "{name}" has a value of 100000, too large for float16; use'):
            load(*files, precision=torch.float16)
        assert load(*files, precision=torch.bfloat16) is not None
    model = load_model(*files)
    with pytest.raises(UserError, match="too large for float16; use the precision float32 or bfloat16"):
        move(model, precision="float16")
    assert {value.dtype for value in model.parameters()} == {torch.float32}, "the model is unchanged"
    assert model.first_stage_model.decoder.conv_in.weight[0, 0, 0, 0] == 1e5


def test_weights_that_are_not_finite_are_named(tmp_path, caplog):
    broken = write_model(tmp_path)
    state_dict = broken.state_dict()
    state_dict["model.diffusion_model.out.2.bias"][1] = torch.nan
    state_dict["first_stage_model.encoder.conv_in.bias"][0] = -torch.inf
    torch.save({"state_dict": state_dict}, tmp_path / "model.ckpt")
    load_model(tmp_path / "config.yaml", tmp_path / "model.ckpt")
    (message,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert message.startswith(f'weights of "{tmp_path / "model.ckpt"}" have values that are not finite: ')
    assert "model.diffusion_model.out.2.bias" in message and "first_stage_model.encoder.conv_in.bias" in message
    caplog.clear()
    write_model(tmp_path)
    load_model(tmp_path / "config.yaml", tmp_path / "model.ckpt")
    assert not caplog.records
