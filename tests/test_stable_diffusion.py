"""Stable Diffusion 1 and 2: names and shapes of the published models, and recorded outputs of small ones."""

from __future__ import annotations

import gzip
import json
from functools import cache
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from parity_cases import PARITY, load_case, weights_module
from parity_replay import assert_replayed

from ldm.config.instantiate import instantiate_from_config
from ldm.errors import UserError
from ldm.models.diffusion.ddpm import LatentInpaintDiffusion

MODELS = ("v1-inference", "v1-inpainting-inference", "v2-inference-v", "v2-inpainting-inference", "x4-upscaling")
RECORDED = (
    "frozen_clip_embedder",
    "frozen_open_clip_embedder",
    "sd1_ddim_text_to_image",
    "sd1_img2img",
    "sd1_train_loss",
    "sd2_ddim_inversion",
    "sd2_ddim_v",
    "sd2_train_loss_v",
    "sd_inpainting_conditioning",
    "sd_inpainting_sample",
    "sd_upscaler",
    "unet_sequential_adm",
)


@cache
def recorded() -> dict[str, Any]:
    return json.loads(gzip.decompress((PARITY / "stable_diffusion" / "state_dicts.json.gz").read_bytes()))


@pytest.mark.parametrize("name", [*MODELS, "v2-inference"])
def test_names_and_shapes_are_as_recorded(name, repo_root):
    config = OmegaConf.load(repo_root / "configs" / "stable-diffusion" / f"{name}.yaml").model
    with torch.device("meta"):
        model = instantiate_from_config(OmegaConf.to_container(config))
    entries = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert entries == recorded()["v2-inference-v" if name == "v2-inference" else name]
    assert model.parameterization == ("v" if name in ("v2-inference-v", "x4-upscaling") else "eps")


@pytest.mark.parametrize("name", RECORDED)
def test_results_match_the_record(name):
    assert_replayed(name)


def test_inpainting_model_starts_as_the_text_model_that_it_extends(tmp_path):
    config = load_case("sd1_train_loss").config
    text_model = weights_module().fill(instantiate_from_config(config), 1).eval()
    torch.save({"state_dict": text_model.state_dict()}, tmp_path / "text.ckpt")
    params = load_case("sd_inpainting_sample").config["params"]
    params = {**params, "ckpt_path": str(tmp_path / "text.ckpt")}
    del params["finetune_keys"]
    model = LatentInpaintDiffusion(**params).eval()

    x, context = torch.randn(2, 4, 16, 16), torch.randn(2, 77, 64)
    concat, t = torch.randn(2, 5, 16, 16), torch.tensor([3, 700])
    expected = text_model.apply_model(x, t, context)
    actual = model.apply_model(x, t, {"c_concat": [concat], "c_crossattn": [context]})
    torch.testing.assert_close(actual, expected)


def test_weights_of_another_width_cannot_be_extended(tmp_path):
    params = load_case("sd_inpainting_sample").config["params"]
    weights = LatentInpaintDiffusion(**params).state_dict()
    first = "model.diffusion_model.input_blocks.0.0.weight"
    torch.save({"state_dict": {**weights, first: weights[first][:, :3]}}, tmp_path / "narrow.ckpt")
    del params["finetune_keys"]
    with pytest.raises(UserError, match=r"input_blocks.0.0.weight of the file has the shape \(32, 3, 3, 3\)"):
        LatentInpaintDiffusion(**{**params, "ckpt_path": str(tmp_path / "narrow.ckpt")})


def test_text_is_not_trained_with_an_image_conditioning():
    params = load_case("sd_inpainting_sample").config["params"]
    with pytest.raises(UserError, match="leave out cond_stage_trainable"):
        LatentInpaintDiffusion(**{**params, "cond_stage_trainable": True})
