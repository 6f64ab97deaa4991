"""Tests of `ldm.preparation.recipes`: the configurations build, also for first stages of other kinds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from odd_photographs import write_odd_photographs
from omegaconf import OmegaConf

from ldm.config.instantiate import instantiate_from_config
from ldm.models.autoencoder import AutoencoderKL, VQModel, VQModelInterface
from ldm.preparation.machine import GIGABYTE, Machine
from ldm.preparation.networks import KL, VQ
from ldm.preparation.preparation import Options, prepare
from ldm.preparation.yaml_text import plain

CPU = Machine(16 * GIGABYTE, 4)
DDCONFIG = {
    "double_z": False, "z_channels": 3, "resolution": 32, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 1, 1],
    "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    return write_odd_photographs(tmp_path_factory.mktemp("photographs"))


def write_first_stage(folder: Path, target: str) -> torch.nn.Module:
    """Write a tiny first stage as a model folder, without the weights of a loss."""
    params = {"embed_dim": 3, "ddconfig": {**DDCONFIG, "double_z": target == KL}}
    params |= {"n_embed": 16} if target == VQ else {}
    model = {"target": target, "params": {**params, "lossconfig": {"target": "torch.nn.Identity"}}}
    folder.mkdir()
    OmegaConf.save(OmegaConf.create({"model": model}), folder / "config.yaml")
    built = instantiate_from_config(model)
    torch.save({"state_dict": built.state_dict()}, folder / "model.ckpt")
    return built


@pytest.mark.parametrize(("target", "inner"), [(KL, AutoencoderKL), (VQ, VQModelInterface)])
@pytest.mark.parametrize("with_losses", [True, False])
def test_a_first_stage_of_another_kind_is_fine_tuned(photographs, tmp_path, target, inner, with_losses):
    weights = write_first_stage(tmp_path / "stage", target).state_dict()
    options = Options(
        photographs, tmp_path / "out", "inpainting", 32, first_stage=str(tmp_path / "stage"), quick=True,
        with_losses=with_losses,
    )  # fmt: skip
    recipe = prepare(options, CPU, lambda line: None).recipe
    first_stage, model = plain(recipe.first_stage()), plain(recipe.diffusion_model())
    assert OmegaConf.to_container(OmegaConf.load(tmp_path / "out/first_stage.yaml")) == first_stage
    assert OmegaConf.to_container(OmegaConf.load(tmp_path / "out/ldm.yaml")) == model
    stage = instantiate_from_config(first_stage["model"])
    assert isinstance(stage, AutoencoderKL if target == KL else VQModel)
    assert torch.equal(stage.decoder.conv_out.weight, weights["decoder.conv_out.weight"])
    assert (stage.loss.discriminator is not None) == (stage.loss.perceptual_loss is not None) == with_losses
    model["model"]["params"]["first_stage_config"]["params"]["ckpt_path"] = str(tmp_path / "stage/model.ckpt")
    built = instantiate_from_config(model["model"])
    assert isinstance(built.first_stage_model, inner) and built.cond_stage_model is built.first_stage_model
    assert ("latent_cache" in model["data"]["params"]) == (target == KL)


def test_latents_are_not_cached_where_the_memory_is_small(photographs, tmp_path):
    for memory, is_cached in ((GIGABYTE // 1000, False), (GIGABYTE, True)):
        options = Options(photographs, tmp_path / str(memory), "unconditional", 32, quick=True)
        recipe = prepare(options, Machine(memory, 4), lambda line: None).recipe
        assert ("latent_cache" in recipe.diffusion_model()["data"]["params"]) == is_cached == (recipe.cache is not None)


def test_the_plans_are_those_of_the_configurations(photographs, tmp_path):
    options = Options(photographs, tmp_path / "out", "class", 32, steps=77, quick=True)
    recipe = prepare(options, CPU, lambda line: None).recipe
    for config, plan in ((recipe.first_stage(), recipe.stage_plan), (recipe.diffusion_model(), recipe.plan)):
        config = plain(config)
        assert config["lightning"]["trainer"]["max_steps"] == 77
        assert config["data"]["params"]["batch_size"] == plan.batch_size
        assert config["model"]["base_learning_rate"] * plan.items == pytest.approx(plan.learning_rate, rel=1e-3)
    trained = instantiate_from_config(plain(recipe.first_stage())["model"])
    own = [weight.numel() for name, weight in trained.named_parameters() if not name.startswith("loss.")]
    assert recipe.stage_plan.parameters == sum(own)
