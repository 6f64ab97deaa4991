"""Training of low-rank updates (LoRA): the model stays as it is, and the file has the form of diffusers."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from stable_diffusion_runs import (
    LORA,
    Runs,
    assert_refused,
    captioned,
    changed,
    errors,
    lora_config,
    loss,
    named,
    personalized,
    prediction,
    words_config,
    write_base,
    write_images,
)
from tiny_models import text_config

import ldm
from ldm.cli.convert_checkpoint import main as convert
from ldm.cli.export_model import main as run_export
from ldm.config.instantiate import instantiate_from_config
from ldm.io.checkpoint.reading import read_state_dict


@pytest.fixture
def images(tmp_path):
    return write_images(tmp_path / "images")


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Runs(tmp_path)


@pytest.mark.parametrize("version", [1, 2])
def test_lora_training_leaves_the_model_as_it_is_and_reduces_the_loss(version, runs, images, tmp_path):
    config, before = lora_config(runs, tmp_path, version)
    _, after = runs.train(config, captioned(images), "model.base_learning_rate=0.02")
    assert changed(before, after) == set(), "bit-equal"
    added = set(after) - set(before)
    assert added == named("model.lora.", after) and len(added) == 65, "32 layers, and alpha"
    assert all(after[name].any() for name in added), "all factors are trained"
    assert float(after["model.lora.alpha"]) == 4.0
    data = captioned(images)
    assert loss(config, after, data) < 0.98 * loss(
        {**config, "params": {**config["params"], "lora_config": None}}, before, data
    )


def test_lora_file_and_checkpoint_are_the_same_model(runs, images, tmp_path):
    config, _ = lora_config(runs, tmp_path)
    run, after = runs.train(config, captioned(images), "model.base_learning_rate=0.02")
    file = run / "pytorch_lora_weights.safetensors"
    assert len(load_file(file)) == 64 and all(name.startswith("unet.") for name in load_file(file))
    trained = instantiate_from_config({**config, "params": {**config["params"], "ckpt_path": None}})
    trained.load_state_dict(after)
    with_file = ldm.load(config=write_base(config, tmp_path), checkpoint=tmp_path / "weights.ckpt", loras=[file])
    from_run = ldm.load(run)
    plain = ldm.load(config=tmp_path / "base.yaml", checkpoint=tmp_path / "weights.ckpt")
    expected = prediction(trained)
    assert (prediction(plain) - expected).abs().max() > 1e-2
    torch.testing.assert_close(prediction(with_file), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(prediction(from_run), expected, rtol=0, atol=1e-5)
    assert not named("model.lora.", from_run.state_dict()), "merged"


def test_lora_averages_are_those_of_its_factors_alone(runs, images, tmp_path):
    config, _ = lora_config(runs, tmp_path, use_ema=True)
    run, after = runs.train(config, captioned(images), "model.base_learning_rate=0.02")
    assert len(named("model_ema.", after)) == 64 + 2, "decay and number of updates"
    live = {name.removeprefix("model.lora."): value for name, value in after.items() if name.startswith("model.lora.")}
    layer = next(name for name in live if name.endswith(".up.weight"))
    average = after["model_ema.lora" + layer.replace(".", "")]
    assert not torch.equal(average, live[layer])
    written = load_file(run / "pytorch_lora_weights.safetensors").values()
    assert any(value.shape == average.shape and torch.equal(value, 2.0 * average) for value in written), "alpha / rank"


def test_resumed_lora_training_equals_an_uninterrupted_run(runs, images, tmp_path):
    config, _ = lora_config(runs, tmp_path, use_ema=True)
    whole, expected = runs.train(config, captioned(images), logs="whole", max_steps=6)
    run, first = runs.train(config, captioned(images), logs="halves", max_steps=3)
    assert changed(first, expected)
    (tmp_path / "weights.ckpt").unlink()  # a resumed run needs its checkpoint alone
    assert runs.start("-r", run, "--max_steps", "6") == 0
    assert changed(expected, read_state_dict(run / "checkpoints" / "last.ckpt")) == set()
    first, second = (load_file(folder / "pytorch_lora_weights.safetensors") for folder in (whole, run))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_training_of_a_lora_continues_from_its_checkpoint(runs, images, tmp_path):
    config, _ = lora_config(runs, tmp_path)
    run, first = runs.train(config, captioned(images), max_steps=2)
    config["params"]["ckpt_path"] = str(run / "checkpoints" / "last.ckpt")
    model = instantiate_from_config(config)
    assert changed(first, model.state_dict()) == set()


def test_lora_of_other_layers(runs, images, tmp_path):
    lora = {"target": LORA["target"], "params": {"rank": 3, "targets": ["proj_in", "ff.net.2", "in_layers.2"]}}
    config, _ = lora_config(runs, tmp_path, lora_config=lora)
    run, after = runs.train(config, captioned(images), "model.base_learning_rate=0.02", max_steps=4)
    trained = instantiate_from_config({**config, "params": {**config["params"], "ckpt_path": None}})
    trained.load_state_dict(after)
    file = run / "pytorch_lora_weights.safetensors"
    with_file = ldm.load(config=write_base(config, tmp_path), checkpoint=tmp_path / "weights.ckpt", loras=[file])
    torch.testing.assert_close(prediction(with_file), prediction(trained), rtol=0, atol=1e-5)
    names = set(load_file(file))
    assert "unet.mid_block.attentions.0.proj_in.lora_A.weight" in names
    assert load_file(file)["unet.down_blocks.0.resnets.0.conv1.lora_A.weight"].shape == (3, 32, 3, 3)


def test_lora_of_another_text_to_image_model(runs, images, tmp_path):
    config = text_config(cond_stage_trainable=False)
    path, before = runs.weights(config)
    config["params"] |= {"lora_config": LORA, "ckpt_path": str(path)}
    run, after = runs.train(config, captioned(images), "model.base_learning_rate=0.02", max_steps=4)
    assert changed(before, after) == set()
    file, base = run / "pytorch_lora_weights.safetensors", write_base(config, tmp_path)
    merged, trained = ldm.load(config=base, checkpoint=path, loras=[file]), ldm.load(run)
    weights = trained.state_dict()
    assert changed(before, weights)
    assert all(torch.allclose(weights[name], value, atol=1e-6) for name, value in merged.state_dict().items())


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"rank": 0}, "LoRA: rank must be an integer of at least 1, not 0"),
        ({"rank": 2.5}, "LoRA: rank must be an integer of at least 1, not 2.5"),
        ({"alpha": 0}, "LoRA: alpha must be above 0, not 0; leave it out for that of the rank, 8"),
        ({"targets": []}, "LoRA: targets is empty; name ends of layers, such as to_q, to_k, to_v, to_out.0"),
        (
            {"targets": ["to_qq"]},
            'LoRA: the target "to_qq" matches no linear layer or 2-d convolution of UNetModel (has none); name ends',
        ),
        (
            {"targets": ["norm1"]},
            'LoRA: the target "norm1" matches no linear layer or 2-d convolution of UNetModel (input_blocks.3.1.',
        ),
        ({"width": 3}, 'model.params.lora_config: ldm.modules.lora.LoRA has no parameter "width"'),
    ],
    ids=str,
)
def test_invalid_lora_raises_user_error(params, message, runs, images, tmp_path, capsys):
    config, _ = lora_config(runs, tmp_path, lora_config={**LORA, "params": params})
    assert_refused(runs, config, captioned(images), message, capsys)


def test_lora_with_a_trainable_text_encoder_raises_user_error(runs, images, tmp_path, capsys):
    config, _ = lora_config(runs, tmp_path, cond_stage_trainable=True)
    message = "lora_config trains low-rank updates alone; set cond_stage_trainable: false"
    assert_refused(runs, config, captioned(images), message, capsys)


def test_resuming_with_another_lora_raises_user_error(runs, images, tmp_path, capsys):
    config, _ = lora_config(runs, tmp_path)
    run, _ = runs.train(config, captioned(images), max_steps=1)
    for override, message in (("rank=3", "the model differs from it"), ("alpha=5", "alpha of the LoRA is 4, here 5")):
        capsys.readouterr()
        assert runs.start("-r", run, "--max_steps", "2", f"model.params.lora_config.params.{override}") == 2
        (error,) = errors(capsys)
        assert message in error


def test_export_writes_the_trained_part_or_the_merged_model(runs, images, tmp_path, capsys):
    config, _ = lora_config(runs, tmp_path, use_ema=True)
    run, _ = runs.train(config, captioned(images), "model.base_learning_rate=0.02")
    checkpoint = run / "checkpoints" / "last.ckpt"
    assert export("--ckpt", checkpoint, "--outdir", tmp_path / "lora", "--dtype", "float32") == 0
    assert [path.name for path in (tmp_path / "lora").iterdir()] == ["pytorch_lora_weights.safetensors"]
    written, in_run = (load_file(f / "pytorch_lora_weights.safetensors") for f in (tmp_path / "lora", run))
    assert written.keys() == in_run.keys() and all(torch.equal(written[name], in_run[name]) for name in written)
    capsys.readouterr()
    assert export("--ckpt", checkpoint, "--outdir", tmp_path / "lora") == 2
    (error,) = errors(capsys)
    assert "exists" in error and "--overwrite" in error
    assert export("--ckpt", checkpoint, "--outdir", tmp_path / "whole", "--merged", "--dtype", "float32") == 0
    merged = ldm.load(tmp_path / "whole")
    assert not named("model.lora.", merged.state_dict()) and "lora_config" not in merged.config["params"]
    torch.testing.assert_close(prediction(merged), prediction(ldm.load(run)), rtol=0, atol=1e-6)


def test_runs_are_converted_to_diffusers(runs, images, tmp_path, capsys):
    config, _ = lora_config(runs, tmp_path)
    run, _ = runs.train(config, captioned(images), "model.base_learning_rate=0.02", max_steps=4, logs="lora")
    assert convert([str(run / "checkpoints" / "last.ckpt"), str(tmp_path / "folder")]) == 0
    expected = prediction(ldm.load(run))
    torch.testing.assert_close(prediction(ldm.load(tmp_path / "folder")), expected, rtol=0, atol=1e-5)
    config, _ = words_config(runs, tmp_path)
    run, _ = runs.train(config, personalized(images), max_steps=1, logs="words")
    assert convert([str(run / "checkpoints" / "last.ckpt"), str(tmp_path / "other")]) == 2
    assert "write them with ldm export_model" in capsys.readouterr().err and not (tmp_path / "other").exists()


def export(*arguments):
    return run_export([str(argument) for argument in arguments])
