"""Fine-tuning from weights of Stable Diffusion, and previews of all kinds of training."""

from __future__ import annotations

import pytest
import torch
from stable_diffusion_runs import (
    FIRST_LAYER,
    Runs,
    captioned,
    changed,
    lora_config,
    loss,
    masked,
    named,
    personalized,
    single,
    words_config,
    write_images,
)
from tiny_stable_diffusion import text_inpainting_config

from ldm.config.instantiate import instantiate_from_config
from ldm.config.model_config import read_config
from ldm.io.checkpoint.reading import read_state_dict
from ldm.io.diffusers import files


@pytest.fixture
def images(tmp_path):
    return write_images(tmp_path / "images")


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Runs(tmp_path)


@pytest.mark.parametrize("version", [1, 2])
def test_fine_tuning_changes_the_network_alone_and_reduces_the_loss(version, runs, images, tmp_path):
    config, data = single(version, tmp_path), captioned(images)
    path, before = runs.weights(config)
    config["params"]["ckpt_path"] = str(path)
    run, after = runs.train(config, data)
    assert changed(before, after) == named("model.diffusion_model.", before)
    assert set(after) == set(before)
    assert loss(config, after, data) < 0.98 * loss(config, before, data)
    assert not list(run.glob("*.safetensors")), "only a run that trains a part writes one"


@pytest.mark.parametrize("name", ["weights.ckpt", "weights.safetensors"])
def test_fine_tuning_starts_from_half_precision(name, runs, images, tmp_path):
    config = single(1, tmp_path)
    path, before = runs.weights(config, name, lambda value: value.half() if value.is_floating_point() else value)
    config["params"]["ckpt_path"] = str(path)
    _, after = runs.train(config, captioned(images), max_steps=1)
    assert {value.dtype for name, value in after.items() if name.startswith("model.")} == {torch.float32}
    frozen = named("cond_stage_model.", before)
    assert frozen and all(torch.equal(before[name].to(after[name].dtype), after[name]) for name in frozen)
    largest = max((before[name].float() - after[name]).abs().max() for name in named("model.", before))
    assert 0 < largest <= 2e-3, "one step of AdamW at 1e-3"


def test_fine_tuning_starts_from_a_folder_of_diffusers(runs, images, tmp_path):
    folders = pytest.importorskip("diffusers_folders")
    folders.write_stable_diffusion(tmp_path / "pipeline")
    config = dict(read_config(files.config_file(tmp_path / "pipeline")))
    keys = {"first_stage_key": "image", "cond_stage_key": "caption", "use_ema": False}
    config["params"] = {**config["params"], **keys, "ckpt_path": str(tmp_path / "pipeline")}
    before = read_state_dict(tmp_path / "pipeline")
    _, after = runs.train(config, captioned(images), max_steps=2)
    assert changed(before, after) == named("model.diffusion_model.", before)


def test_averages_of_the_file_are_not_named_as_unused(runs, images, tmp_path, caplog):
    config = single(1, tmp_path)
    config["params"]["use_ema"] = True
    path, before = runs.weights(config)
    config["params"] |= {"use_ema": False, "ckpt_path": str(path)}
    _, after = runs.train(config, captioned(images), max_steps=1)
    assert not named("model_ema.", after) and named("model_ema.", before)
    assert "not used" not in caplog.text


@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
def test_inpainting_starts_from_weights_with_fewer_input_channels(half, runs, images, tmp_path):
    path, before = runs.weights(
        single(1, tmp_path), change=lambda value: value.half() if half and value.is_floating_point() else value
    )
    config = text_inpainting_config(1, tmp_path / "clip")
    keys = {"first_stage_key": "image", "cond_stage_key": "caption", "use_ema": False, "ckpt_path": str(path)}
    schedule = {"timesteps": 1000, "linear_start": 0.00085, "linear_end": 0.012}
    config["params"] |= {**keys, **schedule, "finetune_keys": [FIRST_LAYER]}
    initial = instantiate_from_config(config).state_dict()
    assert torch.equal(initial[FIRST_LAYER][:, :4], before[FIRST_LAYER].float())
    assert not initial[FIRST_LAYER][:, 4:].any()
    _, after = runs.train(config, masked(images))
    assert changed(initial, after) == named("model.diffusion_model.", after)
    assert after[FIRST_LAYER][:, 4:].abs().amax(dim=(0, 2, 3)).gt(0).all(), "all new channels are trained"
    assert loss(config, after, masked(images)) < loss(config, initial, masked(images))


@pytest.mark.parametrize("kind", ["inpainting", "lora", "words"])
def test_previews_of_each_kind(kind, runs, images, tmp_path, caplog):
    if kind == "inpainting":
        path, _ = runs.weights(single(1, tmp_path))
        config = text_inpainting_config(1, tmp_path / "clip", use_ema=False, finetune_keys=[FIRST_LAYER])
        config["params"] |= {"first_stage_key": "image", "cond_stage_key": "caption", "ckpt_path": str(path)}
        config["params"] |= {"timesteps": 1000, "linear_start": 0.00085, "linear_end": 0.012}
    else:
        config, _ = (lora_config if kind == "lora" else words_config)(runs, tmp_path, use_ema=kind == "lora")
    data = {"inpainting": masked, "lora": captioned, "words": personalized}[kind](images)
    logger = "lightning.callbacks.image_logger.params"
    options = {"ddim_steps": 2, "unconditional_guidance_scale": 3.0, "plot_progressive_rows": False, "inpaint": False}
    words = [f"{logger}.log_images_kwargs.{name}={value}" for name, value in options.items()]
    run, _ = runs.train(config, data, f"{logger}.disabled=false", f"{logger}.batch_frequency=1", *words, max_steps=1)
    shown = {path.name.partition("_gs-")[0] for path in run.rglob("*.png")}
    assert shown == {"inputs", "reconstruction", "conditioning", "diffusion_row", "samples", "samples_guided"}
    assert "missing from" not in caplog.text and "not used" not in caplog.text
