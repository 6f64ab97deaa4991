"""Tests of `ldm.training.configuration_check` with the layers of Stable Diffusion."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from ldm.training.configuration_check import configuration_faults

LAYERS = {
    "fine-tuning": ("v1-inference", "finetuning"),
    "LoRA": ("v1-inference", "finetuning", "lora"),
    "LoRA of in-painting": ("v1-inpainting-inference", "inpainting-finetuning", "lora"),
    "textual inversion": ("v2-inference-v", "textual-inversion"),
}


def merged(repo_root, tmp_path, names, *overrides):
    """Return the configuration of layers of Stable Diffusion, whose weights and images exist."""
    files = [OmegaConf.load(repo_root / f"configs/stable-diffusion/{name}.yaml") for name in names]
    dataset = "data.params.train.params." + ("dataset.params." if "inpainting-finetuning" in names else "")
    values = [f"model.params.ckpt_path={tmp_path}", f"{dataset}data_root={tmp_path}", *overrides]
    config = OmegaConf.merge(*files, OmegaConf.from_dotlist(values))
    if "textual-inversion" in names:
        config.model.params.personalization_config.params.initializer_words = ["cat"]
    return OmegaConf.to_container(config, resolve=True)


@pytest.mark.parametrize("names", LAYERS.values(), ids=LAYERS)
def test_layers_of_stable_diffusion_have_no_faults(repo_root, tmp_path, names):
    assert list(configuration_faults(merged(repo_root, tmp_path, names))) == []


def test_parameters_that_users_set_are_still_checked(repo_root, tmp_path):
    config = merged(repo_root, tmp_path, LAYERS["LoRA"], "model.params.lora_config.params.rnak=4")
    (fault,) = configuration_faults(config)
    assert fault == 'model.params.lora_config: ldm.modules.lora.LoRA has no parameter "rnak" (did you mean "rank"?)'


FAULTS = {
    "unknown class": ("model.params.unet_config.target=ldm.modules.nothing.UNet", "model.params.unet_config: "),
    "foreign class": ("data.params.train.target=mine.Images", 'data.params.train: target "mine.Images" is refused'),
    "missing file": (
        "model.params.ckpt_path=none.ckpt",
        'model.params.ckpt_path: there is no file or folder "none.ckpt"; check the path',
    ),
    "text for a number": ("model.params.linear_start=small", 'LatentDiffusion needs a number as "linear_start"'),
    "channels of the latents": (
        "model.params.unet_config.params.out_channels=3",
        "model.params.unet_config.params.out_channels is 3 and does not fit the first stage, whose latents have 4",
    ),
    "unknown role": ("model.params.cond_stage_config=__is_unconditionel__", '"__is_unconditionel__" is not known'),
}


@pytest.mark.parametrize(("override", "message"), FAULTS.values(), ids=FAULTS)
def test_fault_is_one_line_with_its_key(repo_root, tmp_path, override, message):
    (fault,) = configuration_faults(merged(repo_root, tmp_path, LAYERS["fine-tuning"], override))
    assert message in fault and "\n" not in fault


def test_all_faults_are_reported_together(repo_root, tmp_path):
    overrides = [override for override, _ in FAULTS.values()]
    faults = list(configuration_faults(merged(repo_root, tmp_path, LAYERS["fine-tuning"], *overrides)))
    assert len(faults) == len(FAULTS)
