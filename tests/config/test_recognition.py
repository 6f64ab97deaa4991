"""Tests of `ldm.config.recognition`: Stable Diffusion models by the names and shapes of their weights."""

from __future__ import annotations

import gzip
import json
import logging
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from parity_cases import PARITY
from safetensors.torch import save_file
from tiny_models import text_config, write_model
from tiny_stable_diffusion import v1_config, v2_config

import ldm
from ldm.config import recognition
from ldm.config.model_config import read_config
from ldm.config.model_files import find_model
from ldm.config.recognition import Architecture, recognise
from ldm.errors import UserError


@cache
def manifests():
    """Return names and shapes of the published models."""
    return json.loads(gzip.decompress((PARITY / "stable_diffusion/state_dicts.json.gz").read_bytes()))


@pytest.mark.parametrize(
    ("manifest", "file", "config", "reason"),
    [
        (
            "v1-inference",
            "sd-v1-4.ckpt",
            "v1-inference",
            "text encoder CLIP, 4 input channels, context of 768 channels",
        ),
        ("v1-inpainting-inference", "sd-v1-5-inpainting.ckpt", "v1-inpainting-inference", "CLIP, 9 input channels"),
        ("v2-inference-v", "v2-1_768-ema-pruned.ckpt", "v2-inference-v", 'prediction from "768" in its file name'),
        ("v2-inference-v", "768-v-ema.ckpt", "v2-inference-v", "text encoder OpenCLIP"),
        ("v2-inference-v", "my-v.safetensors", "v2-inference-v", 'prediction from "v" in its file name'),
        ("v2-inference-v", "512-base-ema.ckpt", "v2-inference", "in its file name"),
        ("v2-inference-v", "v2-1_512-ema-pruned.safetensors", "v2-inference", 'prediction from "512"'),
        ("v2-inpainting-inference", "512-inpainting-ema.ckpt", "v2-inpainting-inference", "9 input channels"),
        ("x4-upscaling", "x4-upscaler-ema.ckpt", "x4-upscaling", "7 input channels.*, 1000 noise levels"),
    ],
)
def test_published_models_are_recognised_with_the_reason(manifest, file, config, reason, repo_root):
    found = recognise(manifests()[manifest], Path(file))
    assert found.config == Path(f"configs/stable-diffusion/{config}.yaml")
    assert (repo_root / found.config).is_file()

    assert re.search(reason, found.reason)


@pytest.mark.parametrize("file", ["mine.ckpt", "v2.safetensors", "768-base.ckpt", "sd-v2-1.ckpt"])
def test_unstated_prediction_raises_user_error_that_names_both_configurations(file):
    message = (
        rf'"{file}" is Stable Diffusion 2, and neither .* name .*v2-inference-v\.yaml .*v2-inference\.yaml.*--config'
    )
    with pytest.raises(UserError, match=message):
        recognise(manifests()["v2-inference-v"], Path(file))


@pytest.mark.parametrize(("stated", "config"), [("v", "v2-inference-v.yaml"), ("epsilon", "v2-inference.yaml")])
def test_prediction_in_the_metadata_decides_before_the_file_name(stated, config):
    metadata = {"modelspec.prediction_type": stated}
    assert recognise(manifests()["v2-inference-v"], Path("768-base.ckpt"), metadata).config.name == config


@pytest.mark.parametrize(
    ("width", "context", "inputs", "match"),
    [
        (320, 768, 8, "an InstructPix2Pix model of Stable Diffusion 1, which"),
        (320, 1024, 5, "the depth-to-image model"),
    ],
)
def test_relatives_raise_user_error_with_their_name(width, context, inputs, match):
    shapes = {
        recognition.FIRST_LAYER: (width, inputs, 3, 3),
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (width, context),
    }
    with pytest.raises(UserError, match=match):
        recognise(shapes, Path("x.ckpt"))


def test_first_stage_alone_is_recognised_under_the_names_of_both_packages(repo_root):
    prefix = "first_stage_model."
    ours = {name.removeprefix(prefix): shape for name, shape in manifests()["v1-inference"].items() if prefix in name}
    theirs = {name.replace("encoder.down.3.", "encoder.down_blocks.3."): shape for name, shape in ours.items()}
    for shapes in (ours, theirs):
        found = recognise(shapes, Path("vae-ft-mse-840000-ema-pruned.ckpt"))
        assert found.config == Path("models/first_stage_models/kl-f8/config.yaml")
        assert (repo_root / found.config).is_file()


def test_other_weights_are_not_recognised():
    assert recognise({"model.diffusion_model.input_blocks.0.0.weight": (224, 3, 3, 3)}, Path("x.ckpt")) is None
    assert Architecture.of({"weight": (3, 3)}) is None


# -- find_model and load ---------------------------------------------------------------------------------------


@pytest.fixture
def known(tmp_path, monkeypatch):
    """Make tiny models known, one of which needs its prediction stated; return the folder of their files."""
    configs = tmp_path / "configs"
    configs.mkdir()
    for name, config in (("v1", v1_config(tmp_path)), ("v2", v2_config(tmp_path))):
        write_model(tmp_path / name, config)
        OmegaConf.save(OmegaConf.create({"model": config}), configs / f"{name}.yaml")
        (tmp_path / name / "config.yaml").unlink()
    tiny = {Architecture(32, 16, 4): ("v1.yaml", "a tiny model")}
    monkeypatch.setattr(recognition, "KNOWN", tiny)
    monkeypatch.setattr(recognition, "CONFIGS", configs)
    return tmp_path


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_checkpoint_without_configuration_is_loaded_and_logged(known, suffix, caplog):
    file = known / f"sd-v1-4{suffix}"
    weights = torch.load(known / "v1/model.ckpt", weights_only=True)["state_dict"]
    if suffix == ".ckpt":
        torch.save(weights, file)
    else:
        save_file(weights, file)
    caplog.set_level(logging.INFO)
    model = ldm.load(checkpoint=file)
    assert torch.equal(model.model.diffusion_model.out[2].bias, weights["model.diffusion_model.out.2.bias"])
    assert model.name == "sd-v1-4"
    (line,) = [record.getMessage() for record in caplog.records if " is a tiny model" in record.getMessage()]
    assert "(text encoder CLIP, 4 input channels, context of 16 channels)" in line and "v1.yaml" in line


def test_log_lines_about_the_file_appear_once(known, caplog):
    weights = torch.load(known / "v1/model.ckpt", weights_only=True)["state_dict"]
    torch.save({"model": {f"module.{name}": value for name, value in weights.items()}}, known / "x.ckpt")
    caplog.set_level(logging.INFO)
    ldm.load(checkpoint=known / "x.ckpt", device="cpu")
    assert caplog.text.count("from its entry") == 1 == caplog.text.count("a wrapped model")


def test_given_configuration_decides_without_recognition(known, monkeypatch):
    monkeypatch.setattr(recognition, "recognise", None)
    model = ldm.load(checkpoint=known / "v2/model.ckpt", config=known / "configs/v2.yaml")
    assert model.parameterization == "v"


def test_configuration_beside_the_file_or_of_its_name_comes_first(known):
    file = known / "v2/model.ckpt"
    assert find_model(ckpt=str(file)).config.name == "v1.yaml"
    OmegaConf.save(OmegaConf.create({"model": v2_config(known)}), known / "v2/model.yaml")
    assert find_model(ckpt=str(file)).config.name == "model.yaml"
    (known / "v2/config.yaml").write_text("model: {target: x}")
    assert find_model(ckpt=str(file)).config.name == "config.yaml"
    assert read_config(known / "v2/model.yaml")["params"]["parameterization"] == "v"


def test_weights_of_an_unknown_model_need_a_configuration(tmp_path):
    write_model(tmp_path, text_config())
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"no config\.yaml beside .* not those of a known model; name .* --config"):
        find_model(ckpt=str(tmp_path / "model.ckpt"))


def test_header_is_read_without_the_values(tmp_path, monkeypatch):
    """The values of a safetensors file are not read, and those of a checkpoint are only mapped."""
    from ldm.io.checkpoint.reading import read_header

    weights = {f"model.layer{i}.weight": torch.ones(1000, 1000) for i in range(3)}
    save_file(weights, tmp_path / "x.safetensors", {"key": "value"})
    torch.save(weights, tmp_path / "x.ckpt")
    header = read_header(tmp_path / "x.safetensors")
    assert header.shapes == dict.fromkeys(weights, (1000, 1000)) and header.metadata["key"] == "value"
    assert read_header(tmp_path / "x.ckpt").shapes == header.shapes
    with (tmp_path / "x.safetensors").open("r+b") as file:
        file.truncate(2000)
    with pytest.raises(UserError, match=r"x\.safetensors\" is truncated or damaged"):
        read_header(tmp_path / "x.safetensors")
