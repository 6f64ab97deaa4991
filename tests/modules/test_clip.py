"""CLIP encoders, with a small random CLIP in a folder: against transformers' own features, and as part of a model."""

from __future__ import annotations

import io
import json
import math
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from hostile_files import Calls
from parity_cases import assert_close
from tiny_models import text_config, write_clip, write_model

from ldm.config.instantiate import get_obj_from_str, instantiate_from_config
from ldm.errors import UserError
from ldm.modules.encoders import clip
from ldm.modules.encoders.modules import FrozenClipImageEmbedder, FrozenCLIPTextEmbedder
from ldm.pipelines.loading import load_model

CAPTIONS = ["a cat", "dog", "cats and cats and dogs"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A CLIP of 10 channels, pictures of 8 × 8 and captions of up to 12 tokens, each a letter or "cat"."""
    pytest.importorskip("transformers")
    return write_clip(tmp_path_factory.mktemp("clip"), tokens=12)


def reference(folder):
    """Transformers' whole CLIP and its tokenizer."""
    import transformers

    return transformers.CLIPModel.from_pretrained(folder).eval(), transformers.CLIPTokenizer.from_pretrained(folder)


def features(output):
    """The tensor of transformers' features, which version 5 wraps."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output


# -- text ------------------------------------------------------------------------------------------------------


def test_text_features_are_those_of_transformers(folder):
    model, tokenizer = reference(folder)
    tokens = tokenizer(CAPTIONS, padding="max_length", truncation=True, max_length=12, return_tensors="pt")
    with torch.no_grad():
        expected = features(model.get_text_features(**tokens))
    assert_close(FrozenCLIPTextEmbedder(str(folder), max_length=12, normalize=False)(CAPTIONS), expected, 1e-6)
    normalised = FrozenCLIPTextEmbedder(str(folder), max_length=12)(CAPTIONS)
    assert_close(normalised, expected / expected.norm(dim=1, keepdim=True), 1e-6)


def test_a_context_repeats_the_vector(folder):
    model = FrozenCLIPTextEmbedder(str(folder), max_length=12, n_repeat=3)
    context = model.encode(CAPTIONS)
    assert context.shape == (3, 3, 10)
    assert torch.equal(context, model(CAPTIONS)[:, None].expand(3, 3, 10))
    assert model.encode("dog").shape == (1, 3, 10)


def test_captions_are_cut_and_still_end(folder):
    model = FrozenCLIPTextEmbedder(str(folder), max_length=4)
    assert not torch.equal(model(["cat dog"]), model(["cat"]))
    assert torch.equal(model(["cat cat cat cat"]), model(["cat cat"]))
    with pytest.raises(UserError, match="between 2 and 12, not 77"):
        FrozenCLIPTextEmbedder(str(folder))


# -- images ----------------------------------------------------------------------------------------------------


def test_image_features_are_those_of_transformers(folder):
    model, _ = reference(folder)
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1  # no resizing at this size
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (clip.MEAN, clip.STD))
    with torch.no_grad():
        expected = features(model.get_image_features(((x + 1) / 2 - mean) / std))
        assert_close(FrozenClipImageEmbedder(str(folder))(x), expected, 1e-5)


def test_images_are_resized_from_corner_to_corner(folder):
    """A ramp stays a ramp whose corners keep their values, save for what bicubic weights do near the border."""
    x = torch.linspace(-1, 1, 29).expand(1, 3, 22, 29)
    model = FrozenClipImageEmbedder(str(folder))
    pixels = (model.preprocess(x) * model.std + model.mean) * 2 - 1
    assert_close(pixels[0, 0, 0], torch.linspace(-1, 1, 8), 1e-2)
    assert pixels[0, :, :, [0, -1]].flatten().tolist() == pytest.approx(24 * [-1, 1], abs=1e-5)


def test_the_blur_is_a_gaussian_as_wide_as_the_reduction_asks():
    x = torch.zeros(1, 2, 40, 41)
    x[0, 1, 20, 20] = 1.0
    blurred = clip.blurred_for(x, 10)
    assert blurred[0, 0].abs().max() == 0, "channels do not mix"
    assert blurred.sum().item() == pytest.approx(1, abs=1e-5)
    for axis, size in ((1, 40), (0, 41)):
        sigma = (size / 10 - 1) / 2  # 1.5 and 1.55: seven pixels, to 2 σ
        weights = [math.exp(-0.5 * (i / sigma) ** 2) for i in range(-3, 4)]
        profile = blurred[0, 1].sum(dim=axis)
        assert profile[17:24].tolist() == pytest.approx([w / sum(weights) for w in weights], abs=1e-6)
    assert torch.equal(clip.blurred_for(x, 41), x)


def test_gradients_reach_the_image_but_no_weights(folder):
    model = FrozenClipImageEmbedder(str(folder), antialias=True)
    x = torch.zeros(1, 3, 12, 20, requires_grad=True)
    model(x).square().sum().backward()
    assert x.grad.norm() > 0
    assert all(parameter.grad is None for parameter in model.model.parameters())


# -- as part of a model ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [FrozenCLIPTextEmbedder, FrozenClipImageEmbedder])
def test_the_weights_move_along_but_are_in_no_state_dict(kind, folder):
    model = kind(str(folder), **({"max_length": 12} if kind is FrozenCLIPTextEmbedder else {}))
    assert model.state_dict() == {} and not list(model.parameters())
    assert not any(parameter.requires_grad for parameter in model.model.parameters())
    outer = torch.nn.Sequential(model).to(torch.bfloat16)
    assert outer(["dog"] if kind is FrozenCLIPTextEmbedder else torch.zeros(1, 3, 8, 8)).dtype == torch.bfloat16
    copied = pickle.loads(pickle.dumps(model))
    assert_close(copied.model.logit_scale, model.model.logit_scale, 1e-6)
    assert outer.to("meta")[0].model.device.type == "meta"


def test_a_checkpoint_of_a_model_that_is_conditioned_by_clip_holds_no_clip(folder, tmp_path):
    target = "ldm.modules.encoders.modules.FrozenCLIPTextEmbedder"
    cond = {"target": target, "params": {"version": str(folder), "max_length": 12, "n_repeat": 2, "device": "cpu"}}
    config = text_config(cond_stage_config=cond, cond_stage_trainable=False)
    config["params"]["unet_config"]["params"]["context_dim"] = 10
    source = write_model(tmp_path / "model", config)
    assert not any(name.startswith("cond_stage_model.") for name in source.state_dict())
    model = load_model(tmp_path / "model" / "config.yaml", tmp_path / "model" / "model.ckpt")
    c = model.get_learned_conditioning(CAPTIONS[:2])
    assert torch.equal(c, source.get_learned_conditioning(CAPTIONS[:2]))
    batch = {"image": torch.zeros(2, 16, 16, 3), "caption": CAPTIONS[:2]}
    loss, _ = source.train().shared_step(batch)
    loss.backward()
    assert source.model.diffusion_model.out[2].weight.grad.norm() > 0


# -- names and mistakes ----------------------------------------------------------------------------------------


def test_published_names_mean_models_on_the_hub(monkeypatch):
    asked = []

    def stop(name):
        asked.append(name)
        raise UserError("stop")

    monkeypatch.setattr(clip, "_load", stop)
    for name in ("ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-L/14@336px", "someone/clip"):
        with pytest.raises(UserError, match="stop"):
            FrozenClipImageEmbedder(name)
    with pytest.raises(UserError, match="stop"):
        FrozenCLIPTextEmbedder()
    large = "openai/clip-vit-large-patch14"
    base = "openai/clip-vit-base-patch"
    assert asked == [f"{base}32", f"{base}16", large, f"{large}-336", "someone/clip", large]


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("RN50x4", "is a ResNet, which transformers has not; choose one of ViT-B/32"),
        ("ViT-L14", 'did you mean "ViT-L/14"'),
        ("./no/such/folder", "or a local folder"),
        ("nobody/no-such-clip", "cannot load the CLIP .nobody/no-such-clip.*go online once"),
    ],
)
def test_models_that_there_are_not(version, message):
    pytest.importorskip("transformers")
    with pytest.raises(UserError, match=message) as raised:
        FrozenCLIPTextEmbedder(version)
    assert "\n" not in str(raised.value)


def test_other_models_and_incomplete_folders_are_refused(folder, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match='is a model of type "bert"'):
        FrozenClipImageEmbedder(str(tmp_path))
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    assert FrozenClipImageEmbedder(str(tmp_path)).model.config.projection_dim == 10
    with pytest.raises(UserError, match=r"holds no tokenizer; put the CLIP's vocab\.json"):
        FrozenCLIPTextEmbedder(str(tmp_path), max_length=12)


@pytest.mark.parametrize("kind", ["clip", "foreign"])
def test_code_in_a_folder_never_runs_whatever_the_terminal_says(kind, folder, tmp_path, monkeypatch):
    copy, trap = tmp_path / "copy", tmp_path / "trap"
    shutil.copytree(folder, copy)
    (copy / "code.py").write_text(f"import os\nos.mkdir({str(trap)!r})\nclass Own: pass\n")
    own = {"auto_map": {"AutoConfig": "code.Own", "AutoModel": "code.Own", "AutoTokenizer": ["code.Own", None]}}
    config = json.loads((copy / "config.json").read_text())
    config["text_config"]["_attn_implementation"] = "someone/kernel"
    kernel = {"attn_implementation": "someone/kernel", "quantization_config": {"quant_method": "own"}}
    (copy / "config.json").write_text(json.dumps({**config, **own, **kernel, "model_type": kind}))
    (copy / "tokenizer_config.json").write_text(json.dumps({**own, "tokenizer_class": "Own"}))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    if kind == "clip":
        assert FrozenCLIPTextEmbedder(str(copy), max_length=12)(["cat"]).shape == (1, 10)
    else:
        with pytest.raises(UserError, match='is a model of type "foreign"'):
            FrozenCLIPTextEmbedder(str(copy), max_length=12)
    assert not trap.exists()


def test_code_in_pickled_weights_never_runs(folder, tmp_path):
    shutil.copy(folder / "config.json", tmp_path)
    torch.save({"logit_scale": Calls(Path.mkdir, tmp_path / "trap")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot load the CLIP"):
        FrozenClipImageEmbedder(str(tmp_path))
    assert not (tmp_path / "trap").exists()


def test_without_transformers_the_extra_is_named(hide_package):
    hide_package("transformers")
    with pytest.raises(UserError, match=r'install it with pip install "ldm\[clip\]"'):
        FrozenCLIPTextEmbedder()


def test_parameters_are_checked_at_the_published_path():
    assert get_obj_from_str("ldm.modules.encoders.modules.FrozenClipImageEmbedder") is FrozenClipImageEmbedder
    config = {"target": "ldm.modules.encoders.modules.FrozenClipImageEmbedder", "params": {"modle": "ViT-B/32"}}
    with pytest.raises(UserError, match='"modle" \\(did you mean "model"'):
        instantiate_from_config(config)
