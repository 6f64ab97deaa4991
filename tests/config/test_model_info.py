"""Tests of `ldm.config.model_info`: facts that a configuration states."""

from __future__ import annotations

import pytest
import torch
from tiny_models import (
    class_config,
    inpainting_config,
    layout_config,
    map_config,
    pixel_config,
    superresolution_config,
    text_config,
    unconditional_config,
)
from tiny_stable_diffusion import stable_diffusion_config, text_inpainting_config, upscaler_config

from ldm.config.instantiate import instantiate_from_config
from ldm.config.model_config import read_config
from ldm.config.model_files import ModelFiles
from ldm.config.model_info import ModelInfo
from ldm.errors import UserError
from ldm.pipelines.loading import for_inference, skip_init

SHIPPED = [
    "configs/latent-diffusion/cin256-v2.yaml",
    "models/ldm/bsr_sr/config.yaml",
    "models/ldm/celeba256/config.yaml",
    "models/ldm/emoji64-inpaint/config.yaml",
    "models/ldm/emoji64/config.yaml",
    "models/ldm/inpainting_big/config.yaml",
    "models/ldm/lsun_churches256/config.yaml",
    "models/ldm/semantic_synthesis256/config.yaml",
]
TINY = {
    "text": text_config(),
    "classes": class_config(),
    "unconditional": unconditional_config(),
    "pixels": pixel_config(),
    "layouts": layout_config(),
    "label maps": map_config(),
    "inpainting": inpainting_config(),
    "super-resolution": superresolution_config(),
}


def assert_facts_of(info: ModelInfo, model: torch.nn.Module) -> None:
    """Assert that the facts equal those of the model."""
    downsampling = getattr(model, "downsampling", 1)
    assert info.size.factor == downsampling
    assert info.size.multiple == downsampling * model.model.diffusion_model.downsampling
    sides = (model.image_size, model.image_size) if isinstance(model.image_size, int) else tuple(model.image_size)
    assert (info.size.height, info.size.width) == tuple(side * downsampling for side in sides)
    assert info.timesteps == model.num_timesteps
    assert info.is_unconditional == (getattr(model, "cond_stage_model", None) is None)
    assert info.cond_stage_key == getattr(model, "cond_stage_key", "image")


@pytest.mark.parametrize("name", TINY)
def test_facts_equal_those_of_a_tiny_model(name):
    model = instantiate_from_config(TINY[name])
    assert_facts_of(ModelInfo("m", TINY[name]), model)
    assert_facts_of(ModelInfo.of(model), model)


@pytest.mark.parametrize("path", SHIPPED)
def test_facts_equal_those_of_a_shipped_model(repo_root, path):
    info = ModelInfo.read(ModelFiles("m", repo_root / path, repo_root))
    with torch.device("meta"), skip_init():
        model = instantiate_from_config(for_inference(read_config(repo_root / path)))
    assert_facts_of(info, model)


def test_name_of_a_model_is_that_of_its_files_or_of_its_class():
    model = instantiate_from_config(text_config())
    assert ModelInfo.of(model).name == "LatentDiffusion"
    model.name = "tiny"
    assert ModelInfo.of(model).name == "tiny"


def test_model_that_was_not_built_from_a_configuration_raises_user_error():
    with pytest.raises(UserError, match=r"this Linear does not know its configuration; load it with ldm\.load"):
        ModelInfo.of(torch.nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("name", "reads_text", "message"),
    [
        ("text", True, None),
        ("unconditional", False, 'the model "m" is conditioned on nothing, not on text'),
        ("pixels", False, 'the model "m" is conditioned on nothing, not on text'),
        ("classes", False, 'the model "m" is conditioned on "class_label", not on text'),
    ],
)
def test_text_models(name, reads_text, message):
    info = ModelInfo("m", TINY[name])
    assert info.reads_text is reads_text
    if message is None:
        info.check_reads_text()
        return
    with pytest.raises(UserError, match=message):
        info.check_reads_text()


def test_conditioning_is_checked():
    info = ModelInfo("m", TINY["inpainting"])
    info.check_condition("masked_image", "an in-painting")
    with pytest.raises(UserError, match='on "masked_image", not on "LR_image"; choose a super-resolution model'):
        info.check_condition("LR_image", "a super-resolution")
    with pytest.raises(UserError, match='conditioned on nothing, not on "LR_image"'):
        ModelInfo("m", TINY["unconditional"]).check_condition("LR_image", "a super-resolution")


def test_steps_are_at_most_the_timesteps():
    info = ModelInfo("m", TINY["text"])
    info.check_steps(100)
    with pytest.raises(UserError, match="101 steps are more than the model's 100; give 100 or fewer"):
        info.check_steps(101)
    with pytest.raises(UserError, match='needs a number as "timesteps"'):
        ModelInfo("m", text_config(timesteps="many")).check_steps(1)
    assert ModelInfo("m", {"target": "x", "params": {}}).timesteps == 1000


# -- Stable Diffusion ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "facts"),
    [
        (stable_diffusion_config(1), (1, False, False)),
        (stable_diffusion_config(2), (2, False, False)),
        (text_inpainting_config(1), (1, True, False)),
        (text_inpainting_config(2), (2, True, False)),
        (upscaler_config(), (2, False, True)),
        (text_config(), (None, False, False)),
        (inpainting_config(), (None, False, False)),
        (superresolution_config(), (None, False, False)),
        (pixel_config(), (None, False, False)),
    ],
    ids=["v1", "v2", "v1 in-painting", "v2 in-painting", "upscaler", "text", "in-painting", "enlarging", "pixels"],
)
def test_models_of_stable_diffusion_are_recognised(config, facts):
    info = ModelInfo("m", config)
    assert (info.stable_diffusion, info.fills_by_text, info.enlarges_by_text) == facts
    assert info.needs_image == any(facts[1:])


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("v1-inference", (1, False, False, 512)),
        ("v1-inpainting-inference", (1, True, False, 512)),
        ("v2-inference", (2, False, False, 512)),
        ("v2-inference-v", (2, False, False, 768)),
        ("v2-inpainting-inference", (2, True, False, 512)),
        ("x4-upscaling", (2, False, True, 512)),
    ],
)
def test_facts_of_the_shipped_configurations_of_stable_diffusion(repo_root, name, facts):
    info = ModelInfo(name, read_config(repo_root / f"configs/stable-diffusion/{name}.yaml"))
    assert (info.stable_diffusion, info.fills_by_text, info.enlarges_by_text, info.size.height) == facts
    assert info.size.width == info.size.height
