"""Tests of the CLIP encoders with a small random CLIP, against transformers and as part of a model."""

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
    """Return a folder with a CLIP of 10 channels, for images of 8 × 8 pixels and captions of up to 12 tokens."""
    pytest.importorskip("transformers")
    return write_clip(tmp_path_factory.mktemp("clip"), tokens=12)


def reference(folder):
    """Return the complete CLIP of transformers and its tokenizer."""
    import transformers

    return transformers.CLIPModel.from_pretrained(folder).eval(), transformers.CLIPTokenizer.from_pretrained(folder)


def features(output):
    """Return the tensor of transformers' features, which version 5 wraps in an object."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output


# -- text ------------------------------------------------------------------------------------------------------


def test_text_features_match_transformers(folder):
    model, tokenizer = reference(folder)
    tokens = tokenizer(CAPTIONS, padding="max_length", truncation=True, max_length=12, return_tensors="pt")
    with torch.no_grad():
        expected = features(model.get_text_features(**tokens))
    assert_close(FrozenCLIPTextEmbedder(str(folder), max_length=12, normalize=False)(CAPTIONS), expected, 1e-6)
    normalised = FrozenCLIPTextEmbedder(str(folder), max_length=12)(CAPTIONS)
    assert_close(normalised, expected / expected.norm(dim=1, keepdim=True), 1e-6)


def test_encode_repeats_the_vector(folder):
    model = FrozenCLIPTextEmbedder(str(folder), max_length=12, n_repeat=3)
    context = model.encode(CAPTIONS)
    assert context.shape == (3, 3, 10)
    assert torch.equal(context, model(CAPTIONS)[:, None].expand(3, 3, 10))
    assert model.encode("dog").shape == (1, 3, 10)


def test_truncated_captions_have_an_end_token(folder):
    model = FrozenCLIPTextEmbedder(str(folder), max_length=4)
    assert not torch.equal(model(["cat dog"]), model(["cat"]))
    assert torch.equal(model(["cat cat cat cat"]), model(["cat cat"]))
    with pytest.raises(UserError, match="between 2 and 12, not 77"):
        FrozenCLIPTextEmbedder(str(folder))


# -- images ----------------------------------------------------------------------------------------------------


def test_image_features_match_transformers(folder):
    model, _ = reference(folder)
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1  # no resizing at this size
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (clip.MEAN, clip.STD))
    with torch.no_grad():
        expected = features(model.get_image_features(((x + 1) / 2 - mean) / std))
        assert_close(FrozenClipImageEmbedder(str(folder))(x), expected, 1e-5)


def test_images_are_resized_with_aligned_corners(folder):
    """Resize a ramp: the corners keep their values, and bicubic weights change little near the border."""
    x = torch.linspace(-1, 1, 29).expand(1, 3, 22, 29)
    model = FrozenClipImageEmbedder(str(folder))
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (clip.MEAN, clip.STD))
    pixels = (model.preprocess(x) * std + mean) * 2 - 1
    assert_close(pixels[0, 0, 0], torch.linspace(-1, 1, 8), 1e-2)
    assert pixels[0, :, :, [0, -1]].flatten().tolist() == pytest.approx(24 * [-1, 1], abs=1e-5)


def test_antialiasing_is_a_gaussian_blur(folder):
    """Blur an impulse and compare with a Gaussian of deviation (f - 1) / 2 for a reduction by f."""
    x = torch.zeros(1, 3, 40, 41)
    x[0, 1, 20, 20] = 1.0
    blurred = torch.zeros_like(x)
    profiles = []
    for size in (40, 41):
        sigma = (size / 8 - 1) / 2  # 2 and 2.0625: nine pixels, up to 2 σ
        profiles.append(torch.tensor([math.exp(-0.5 * (i / sigma) ** 2) for i in range(-4, 5)]))
    rows, columns = (profile / profile.sum() for profile in profiles)
    blurred[0, 1, 16:25, 16:25] = rows[:, None] * columns
    sharp, antialiased = (FrozenClipImageEmbedder(str(folder), antialias=value) for value in (False, True))
    assert_close(antialiased.preprocess(x), sharp.preprocess(blurred), 1e-6)
    assert not torch.allclose(antialiased.preprocess(x), sharp.preprocess(x), atol=1e-3)
    small = torch.rand(1, 3, 8, 5)
    assert torch.equal(antialiased.preprocess(small), sharp.preprocess(small)), "no blur before upsampling"


def test_missing_kornia_names_the_extra(folder, hide_package):
    model = FrozenClipImageEmbedder(str(folder))
    hide_package("kornia")
    with pytest.raises(UserError, match=r"CLIP needs the package kornia; install it with pip install .*\[clip\]"):
        model(torch.zeros(1, 3, 8, 8))


def test_gradients_reach_the_images_but_not_the_weights(folder):
    model = FrozenClipImageEmbedder(str(folder), antialias=True)
    x = torch.zeros(1, 3, 12, 20, requires_grad=True)
    model(x).square().sum().backward()
    assert x.grad.norm() > 0
    assert all(parameter.grad is None for parameter in model.model.parameters())


# -- as part of a model ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [FrozenCLIPTextEmbedder, FrozenClipImageEmbedder])
def test_weights_follow_the_module_but_are_not_in_the_state_dict(kind, folder):
    model = kind(str(folder), **({"max_length": 12} if kind is FrozenCLIPTextEmbedder else {}))
    assert model.state_dict() == {} and not list(model.parameters())
    assert not any(parameter.requires_grad for parameter in model.model.parameters())
    outer = torch.nn.Sequential(model).to(torch.bfloat16)
    assert outer(["dog"] if kind is FrozenCLIPTextEmbedder else torch.zeros(1, 3, 8, 8)).dtype == torch.bfloat16
    copied = pickle.loads(pickle.dumps(model))
    assert_close(copied.model.logit_scale, model.model.logit_scale, 1e-6)
    assert outer.to("meta")[0].model.device.type == "meta"


def test_checkpoint_of_a_model_conditioned_by_clip_excludes_clip(folder, tmp_path):
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


def test_published_names_are_mapped_to_hub_names(monkeypatch):
    names = []

    def stop(name):
        names.append(name)
        raise UserError("stop")

    monkeypatch.setattr(clip, "load_clip", stop)
    for name in ("ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-L/14@336px", "someone/clip"):
        with pytest.raises(UserError, match="stop"):
            FrozenClipImageEmbedder(name)
    with pytest.raises(UserError, match="stop"):
        FrozenCLIPTextEmbedder()
    large = "openai/clip-vit-large-patch14"
    base = "openai/clip-vit-base-patch"
    assert names == [f"{base}32", f"{base}16", large, f"{large}-336", "someone/clip", large]


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("RN50x4", "is a ResNet, which transformers does not support; choose one of ViT-B/32"),
        ("ViT-L14", 'did you mean "ViT-L/14"'),
        ("./no/such/folder", "or a local folder"),
        ("nobody/no-such-clip", "cannot load the CLIP .nobody/no-such-clip.*go online once"),
    ],
)
def test_unknown_models_raise_user_error(version, message):
    pytest.importorskip("transformers")
    with pytest.raises(UserError, match=message) as raised:
        FrozenCLIPTextEmbedder(version)
    assert "\n" not in str(raised.value)


def test_other_models_and_incomplete_folders_raise_user_error(folder, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match='is a model of type "bert"'):
        FrozenClipImageEmbedder(str(tmp_path))
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    assert FrozenClipImageEmbedder(str(tmp_path)).model.config.projection_dim == 10
    with pytest.raises(UserError, match=r"has no tokenizer; add the vocab\.json"):
        FrozenCLIPTextEmbedder(str(tmp_path), max_length=12)


@pytest.mark.parametrize("kind", ["clip", "foreign"])
def test_code_in_a_folder_never_runs(kind, folder, tmp_path, monkeypatch):
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


def test_missing_transformers_names_the_extra(hide_package):
    hide_package("transformers")
    with pytest.raises(UserError, match=r'install it with pip install -e "\.\[clip\]"'):
        FrozenCLIPTextEmbedder()


def test_parameters_are_checked_at_the_published_path():
    assert get_obj_from_str("ldm.modules.encoders.modules.FrozenClipImageEmbedder") is FrozenClipImageEmbedder
    config = {"target": "ldm.modules.encoders.modules.FrozenClipImageEmbedder", "params": {"modle": "ViT-B/32"}}
    with pytest.raises(UserError, match='"modle" \\(did you mean "model"'):
        instantiate_from_config(config)
