"""Tests of the command `convert_checkpoint` with folders in the form of diffusers."""

from __future__ import annotations

import json
import logging
import sys

import diffusers
import pytest
import torch
from diffusers_folders import write_text_ldm, write_unconditional
from omegaconf import OmegaConf
from tiny_models import (
    class_config,
    inpainting_config,
    layout_config,
    make_model,
    superresolution_config,
    text_config,
    unconditional_config,
    write_model,
)
from tiny_stable_diffusion import v1_config, v2_config

import ldm
from ldm.cli.convert_checkpoint import main as convert
from ldm.cli.main import main as ldm_command
from ldm.io.checkpoint.reading import read_checkpoint, read_state_dict

pytestmark = pytest.mark.usefixtures("seed")


def inpainting(folder):
    config = v1_config(folder, conditioning_key="hybrid", finetune_keys=None)
    config["target"] = "ldm.models.diffusion.ddpm.LatentInpaintDiffusion"
    config["params"]["unet_config"]["params"]["in_channels"] = 9
    return config


def upscaler(folder):
    small = {"target": "ldm.modules.diffusionmodules.upscaling.ImageConcatWithNoiseAugmentation"}
    small["params"] = {"noise_schedule_config": {"linear_start": 1e-4, "linear_end": 2e-2}, "max_noise_level": 30}
    config = v2_config(
        folder, scale_factor=0.08333, conditioning_key="hybrid-adm", low_scale_config=small, low_scale_key="lr"
    )
    config["target"] = "ldm.models.diffusion.ddpm.LatentUpscaleDiffusion"
    config["params"]["unet_config"]["params"] |= {"in_channels": 7, "num_classes": 40}
    return config


def unconditional(folder):
    config = unconditional_config()
    config["params"]["unet_config"]["params"] |= {"num_heads": -1, "num_head_channels": 16}
    return config


def superresolution(folder):
    config = superresolution_config()
    config["params"]["cond_stage_key"] = "LR_image"
    config["params"]["unet_config"]["params"] |= {"num_heads": -1, "num_head_channels": 16}
    return config


MODELS = {
    "StableDiffusionPipeline of version 1": v1_config,
    "StableDiffusionPipeline of version 2": v2_config,
    "StableDiffusionInpaintPipeline": inpainting,
    "StableDiffusionUpscalePipeline": upscaler,
    "LDMPipeline": unconditional,
    "LDMTextToImagePipeline": lambda folder: text_config(),
    "LDMSuperResolutionPipeline": superresolution,
}


def without_unused(weights):
    """Return weights without those of OpenCLIP that condition nothing, and without tables."""
    unused = ("cond_stage_model.model.text_projection", "cond_stage_model.model.logit_scale")
    last = "cond_stage_model.model.transformer.resblocks.2."
    return {name: value for name, value in weights.items() if "." in name and not name.startswith((*unused, last))}


@pytest.mark.parametrize("kind", MODELS)
def test_model_survives_a_round_trip(tmp_path, kind, capsys):
    original = write_model(tmp_path / "m", MODELS[kind](tmp_path))
    folder, back = tmp_path / "theirs", tmp_path / "back.safetensors"
    assert convert([str(tmp_path / "m/model.ckpt"), str(folder)]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"largest difference of outputs to diffusers {diffusers.__version__}: ")
    assert float(first.rpartition(" ")[2]) < 1e-5
    assert f"MB, {kind.partition(' ')[0]}, live weights" in second
    facts = json.loads((folder / "model_index.json").read_text())["_ldm"]
    assert float(facts["largest_difference"]) < 1e-5 and facts["compared_with"] == f"diffusers {diffusers.__version__}"
    expected = without_unused(original.state_dict())
    loaded = without_unused(ldm.load(folder, device="cpu").state_dict())
    small = "low_scale_model."
    names = {name for name in expected if not name.startswith(small)}
    assert names == {name for name in loaded if not name.startswith(small)}
    for name in names:
        assert torch.equal(loaded[name], expected[name].float()), name
    assert convert([str(folder), str(back)]) == 0
    assert "largest difference of outputs" in capsys.readouterr().out
    again = read_state_dict(back)
    assert all(torch.equal(again[name], expected[name].float()) for name in names)
    metadata = read_checkpoint(back)["metadata"]
    assert float(metadata["largest_difference"]) < 1e-5 and metadata["source"] == "theirs"
    reloaded = ldm.load(checkpoint=back, device="cpu")
    assert type(reloaded).__name__ == type(original).__name__, "the configuration beside the file is used"


@pytest.mark.parametrize("kind", MODELS)
def test_diffusers_loads_the_folder_without_a_warning(tmp_path, kind, caplog):
    write_model(tmp_path / "m", MODELS[kind](tmp_path))
    assert convert([str(tmp_path / "m/model.ckpt"), str(tmp_path / "theirs")]) == 0
    caplog.clear()
    diffusers.utils.logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "theirs")
    finally:
        diffusers.utils.logging.disable_propagation()
    assert type(pipeline).__name__ == kind.partition(" ")[0]
    unexpected = [record.getMessage() for record in caplog.records if "not expected" in record.getMessage()]
    assert not unexpected
    if "Text" in kind or "Stable" in kind:
        texts = ["a cat", "red"]
        model = ldm.load(tmp_path / "theirs", device="cpu")
        length = 16 if "Text" in kind else 77
        options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        ids = pipeline.tokenizer(texts, max_length=length, **options).input_ids
        stage = model.cond_stage_model
        ours = stage.tknz_fn(texts) if "Text" in kind else stage.tokens(texts)
        assert torch.equal(ids, ours)


@pytest.mark.parametrize("name", ["KL", "VQ"])
def test_first_stage_alone_survives_a_round_trip(tmp_path, name, capsys):
    stage = unconditional_config()["params"]["first_stage_config"]
    if name == "VQ":
        stage["target"] = "ldm.models.autoencoder.VQModel"
        stage["params"] |= {"n_embed": 12}
        stage["params"]["ddconfig"]["double_z"] = False
    original = write_model(tmp_path / "m", stage)
    assert convert([str(tmp_path / "m/model.ckpt"), str(tmp_path / "vae")]) == 0
    assert "MB, first stage, live weights" in capsys.readouterr().out
    loaded = ldm.load(tmp_path / "vae", device="cpu").state_dict()
    assert all(torch.equal(value, original.state_dict()[name]) for name, value in loaded.items())
    assert convert([str(tmp_path / "vae"), str(tmp_path / "back.ckpt")]) == 0
    again = read_state_dict(tmp_path / "back.ckpt")
    assert all(torch.equal(value, original.state_dict()[name]) for name, value in again.items())


def test_half_precision_is_written_and_compared(tmp_path, capsys):
    write_model(tmp_path / "m", unconditional(tmp_path))
    assert convert([str(tmp_path / "m/model.ckpt"), str(tmp_path / "theirs"), "--half"]) == 0
    (first, _) = capsys.readouterr().out.splitlines()
    assert float(first.rpartition(" ")[2]) < 1e-5
    weights = read_state_dict(tmp_path / "theirs/unet/diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float16}


def test_averages_are_chosen(tmp_path, capsys):
    config = unconditional(tmp_path)
    config["params"]["use_ema"] = True
    model = write_model(tmp_path / "m", config)
    model.model_ema.diffusion_modelout2bias.fill_(3)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "m/model.ckpt")
    source, folder = str(tmp_path / "m/model.ckpt"), str(tmp_path / "theirs")
    assert convert([source, folder]) == 2
    assert "choose --weights" in capsys.readouterr().err
    assert convert([source, folder, "--weights", "ema"]) == 0
    assert "ema weights" in capsys.readouterr().out
    assert (ldm.load(folder, device="cpu").model.diffusion_model.out[2].bias == 3).all()


def test_names_and_folders_of_models_are_sources(tmp_path, monkeypatch, capsys):
    write_model(tmp_path / "models/ldm/mine", unconditional(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert ldm_command(["convert", "mine", "one"]) == 0
    assert convert(["models/ldm/mine", "two/"]) == 0
    assert convert(["models/ldm/mine/model.ckpt", "v1.5/", "--config", "models/ldm/mine/config.yaml"]) == 0
    for folder in ("one", "two", "v1.5"):
        assert (tmp_path / folder / "unet/diffusion_pytorch_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (lambda folder: class_config(), 'no pipeline for a LatentDiffusion that is conditioned on "class_label"'),
        (lambda folder: layout_config(), 'is conditioned on "coordinates_bbox"'),
        (lambda folder: inpainting_config(), 'is conditioned on "masked_image"'),
        (lambda folder: resblock_updown(folder), "resblock_updown"),
        (lambda folder: superresolution_config(scale_factor=0.5), "super-resolution pipeline has none"),
        (lambda folder: {**v1_config(folder), "hidden": True}, "another layer than those of diffusers"),
    ],
    ids=["classes", "layouts", "in-painting", "residual resampling", "a scale", "a hidden layer"],
)
def test_model_that_diffusers_lacks_is_refused_with_the_reason(tmp_path, config, match, capsys):
    config = config(tmp_path)
    if config.pop("hidden", False):
        config["params"]["cond_stage_config"]["params"] |= {"layer": "hidden", "layer_idx": 1}
    write_model(tmp_path / "m", config)
    assert convert([str(tmp_path / "m/model.ckpt"), str(tmp_path / "theirs")]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert match in line and not (tmp_path / "theirs").exists()


def resblock_updown(folder):
    config = unconditional(folder)
    config["params"]["unet_config"]["params"]["resblock_updown"] = True
    return config


def test_wrong_options_return_2_and_write_nothing(tmp_path, capsys):
    write_model(tmp_path / "m", unconditional(tmp_path))
    source = str(tmp_path / "m/model.ckpt")
    write_unconditional(tmp_path / "theirs")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/x").write_text("x")
    before = sorted(tmp_path.rglob("*"))
    cases = [
        ([source, str(tmp_path / "theirs")], "exists; choose another DST, or give --overwrite"),
        ([source, str(tmp_path / "precious"), "--overwrite"], "is not a model in the form of diffusers and is not"),
        ([str(tmp_path / "theirs"), str(tmp_path / "theirs"), "--overwrite"], "is the source itself"),
        ([source, str(tmp_path / "new.pth")], "or in / for a folder of diffusers"),
        ([source, str(tmp_path / "x.ckpt"), "--config", "x"], "--config is for a folder of diffusers"),
        ([str(tmp_path / "gone.ckpt"), str(tmp_path / "new")], "there is no model"),
        ([str(tmp_path / "precious"), str(tmp_path / "new.ckpt")], "cannot read the checkpoint"),
    ]
    for options, message in cases:
        assert convert(options) == 2
        printed = capsys.readouterr().err
        assert message in printed and printed.startswith("error: ") and len(printed.splitlines()) == 1, printed
    assert sorted(tmp_path.rglob("*")) == before
    assert convert([source, str(tmp_path / "theirs"), "--overwrite"]) == 0


def test_conversion_works_without_diffusers(tmp_path, monkeypatch, capsys):
    write_model(tmp_path / "m", unconditional(tmp_path))
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert convert([str(tmp_path / "m/model.ckpt"), str(tmp_path / "theirs")]) == 0
    assert "not compared, because diffusers is not installed" in capsys.readouterr().out
    assert ldm.load(tmp_path / "theirs", device="cpu")


def test_wrong_outputs_write_nothing(tmp_path, monkeypatch, capsys):
    from ldm.pipelines import diffusers_folder

    write_model(tmp_path / "m", unconditional(tmp_path))
    monkeypatch.setattr(diffusers_folder, "largest_difference", lambda *args: (0.5, "diffusers 1"))
    assert convert([str(tmp_path / "m/model.ckpt"), str(tmp_path / "theirs")]) == 2
    assert "the outputs differ from those of diffusers 1 by 5.0e-01; nothing is written" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_folder_that_diffusers_wrote_becomes_a_checkpoint_with_its_configuration(tmp_path):
    write_text_ldm(tmp_path / "theirs")
    assert convert([str(tmp_path / "theirs"), str(tmp_path / "new/model.safetensors")]) == 0
    config = OmegaConf.load(tmp_path / "new/model.yaml").model
    assert config.params.cond_stage_config.params.vocab == str(tmp_path / "theirs/tokenizer")
    model, original = ldm.load(checkpoint=tmp_path / "new/model.safetensors"), ldm.load(tmp_path / "theirs")
    texts = ["red heart"]
    assert torch.equal(model.get_learned_conditioning(texts), original.get_learned_conditioning(texts))


def test_random_models_of_the_tests_have_outputs_that_depend_on_all_parts(tmp_path):
    """The comparison would not notice a part that computes zero."""
    from ldm.pipelines.diffusers_folder import _unet_outputs, plan_of

    config = unconditional(tmp_path)
    model = make_model(config)
    network = plan_of(model, config).networks[1]
    ours, _ = _unet_outputs(
        model.model.diffusion_model, lambda *args, **kwargs: _zero(), network.config, torch.Generator()
    )
    assert ours.abs().max() > 0.1


def _zero():
    from types import SimpleNamespace

    return SimpleNamespace(sample=torch.zeros(1))
