"""Tests of `ldm.pipelines.lora` and `ldm.io.checkpoint.lora`: LoRA files in the common forms."""

from __future__ import annotations

import json
import logging
import re

import pytest
import torch
from tiny_models import make_model, text_config, write_model
from tiny_stable_diffusion import lora_factors, v1_config, v2_config, write_lora

import ldm
from ldm.errors import UserError
from ldm.io.checkpoint.lora import read_lora
from ldm.pipelines.loading import load_model
from ldm.pipelines.lora import lora_targets, merge_lora

# Layers of the tiny U-Net: name in diffusers, name here, and shape of the weight. Level 0 has no attention.
LAYERS = {
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k": (
        "input_blocks.3.1.transformer_blocks.0.attn2.to_k",
        (32, 16),
    ),
    "up_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0": (
        "output_blocks.1.1.transformer_blocks.0.attn1.to_out.0",
        (32, 32),
    ),
    "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj": (
        "middle_block.1.transformer_blocks.0.ff.net.0.proj",
        (256, 32),
    ),
    "mid_block.attentions.0.proj_in": ("middle_block.1.proj_in", (32, 32, 1, 1)),
    "down_blocks.0.resnets.0.conv1": ("input_blocks.1.0.in_layers.2", (32, 32, 3, 3)),
    "down_blocks.0.downsamplers.0.conv": ("input_blocks.2.0.op", (32, 32, 3, 3)),
}
TEXT = "text_model.encoder.layers.1.self_attn.k_proj"


@pytest.fixture
def model(tmp_path):
    return make_model(v1_config(tmp_path))


def kohya(part, name):
    return (
        f"lora_{part}_{name.replace('.', '_')}.lora_down.weight",
        f"lora_{part}_{name.replace('.', '_')}.lora_up.weight",
    )


def named(part, name, form):
    """Return the names of the two factors of a layer in one of the forms."""
    long = {"unet": "unet", "te": "text_encoder"}[part]
    processor = re.sub(r"(attn\d)\.(to_\w+?)(\.0)?$", r"\1.processor.\2", name)
    return {
        "kohya": kohya(part, name),
        "peft": (f"{long}.{name}.lora_A.weight", f"{long}.{name}.lora_B.weight"),
        "peft adapter": (f"{long}.{name}.lora_A.default.weight", f"{long}.{name}.lora_B.default.weight"),
        "diffusers": (f"{long}.{name}.lora.down.weight", f"{long}.{name}.lora.up.weight"),
        "text encoder": (f"{long}.{name}.lora_linear_layer.down.weight", f"{long}.{name}.lora_linear_layer.up.weight"),
        "processor": (f"{long}.{processor}_lora.down.weight", f"{long}.{processor}_lora.up.weight"),
        "without part": (f"{name}.lora_A.weight", f"{name}.lora_B.weight"),
        "saved by PEFT": (f"base_model.model.{name}.lora_A.weight", f"base_model.model.{name}.lora_B.weight"),
    }[form]


FORMS = ("kohya", "peft", "peft adapter", "diffusers", "text encoder", "without part", "saved by PEFT")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layer", LAYERS)
def test_updates_of_the_unet_are_added(tmp_path, model, form, layer):
    ours, shape = LAYERS[layer]
    down, up, product = lora_factors(shape[0], shape[1], shape[2:])
    file = write_lora(tmp_path / "x.safetensors", dict(zip(named("unet", layer, form), (down, up), strict=True)))
    before = model.model.diffusion_model.state_dict()[f"{ours}.weight"].clone()
    merge_lora(model, file, 0.5)
    after = model.model.diffusion_model.state_dict()[f"{ours}.weight"]
    torch.testing.assert_close(after, before + 0.5 * product, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layer", [layer for layer in LAYERS if "attn" in layer])
def test_updates_in_the_first_form_of_diffusers_are_added(tmp_path, model, layer):
    ours, shape = LAYERS[layer]
    down, up, product = lora_factors(*shape)
    file = write_lora(tmp_path / "x.safetensors", dict(zip(named("unet", layer, "processor"), (down, up), strict=True)))
    before = model.model.diffusion_model.state_dict()[f"{ours}.weight"].clone()
    merge_lora(model, file)
    after = model.model.diffusion_model.state_dict()[f"{ours}.weight"]
    torch.testing.assert_close(after, before + product, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layer", LAYERS)
def test_our_own_names_of_layers_are_accepted(tmp_path, model, layer):
    ours, shape = LAYERS[layer]
    down, up, product = lora_factors(shape[0], shape[1], shape[2:])
    file = write_lora(tmp_path / "x.safetensors", dict(zip(kohya("unet", ours), (down, up), strict=True)))
    before = model.model.diffusion_model.state_dict()[f"{ours}.weight"].clone()
    merge_lora(model, file)
    after = model.model.diffusion_model.state_dict()[f"{ours}.weight"]
    torch.testing.assert_close(after, before + product, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", ["kohya", "peft", "diffusers", "text encoder", "saved by PEFT", "first", "short"])
def test_updates_of_clip_are_added(tmp_path, model, form):
    down, up, product = lora_factors(16, 16)
    if form == "first":
        name = f"text_encoder.{TEXT.replace('k_proj', 'to_k_lora')}"
        names = (f"{name}.down.weight", f"{name}.up.weight")
    else:
        short = TEXT.removeprefix("text_model.")
        names = named("te", short if form == "short" else TEXT, "peft" if form == "short" else form)
    file = write_lora(tmp_path / "x.safetensors", dict(zip(names, (down, up), strict=True)))
    weight = model.cond_stage_model.transformer.get_submodule(TEXT).weight
    before = weight.detach().clone()
    merge_lora(model, file, 2.0)
    torch.testing.assert_close(weight, before + 2 * product, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("part", "row"), [("q_proj", 0), ("k_proj", 16), ("v_proj", 32)])
def test_updates_of_open_clip_change_their_rows_of_the_fused_projection(tmp_path, part, row):
    model = make_model(v2_config(tmp_path))
    down, up, product = lora_factors(16, 16)
    names = kohya("te", f"text_model.encoder.layers.1.self_attn.{part}")
    weight = model.cond_stage_model.model.transformer.resblocks[1].attn.in_proj_weight
    expected = weight.detach().clone()
    expected[row : row + 16] += product
    merge_lora(model, write_lora(tmp_path / "x.safetensors", dict(zip(names, (down, up), strict=True))))
    torch.testing.assert_close(weight, expected, rtol=1e-6, atol=1e-6)


def test_updates_of_self_attention_change_their_rows_of_the_interleaved_projection(tmp_path):
    """The rows alternate after each head: queries, keys and values of the first one, then of the second."""
    from tiny_models import unconditional_config

    model = make_model(unconditional_config())
    down, up, product = lora_factors(32, 32)
    names = kohya("unet", "mid_block.attentions.0.to_k")
    weight = model.model.diffusion_model.middle_block[1].qkv.weight
    expected = weight.detach().clone()
    expected.view(2, 3, 16, 32)[:, 1] += product.view(2, 16, 32)
    merge_lora(model, write_lora(tmp_path / "x.safetensors", dict(zip(names, (down, up), strict=True))))
    torch.testing.assert_close(weight, expected, rtol=1e-6, atol=1e-6)


def test_alpha_divided_by_the_rank_scales_an_update(tmp_path):
    down, up, product = lora_factors(16, 16, rank=4)
    names = kohya("te", TEXT)
    weights = dict(zip(names, (down, up), strict=True))
    file = write_lora(tmp_path / "x.safetensors", weights)
    (update,) = read_lora(file).values()
    torch.testing.assert_close(update.delta(), product)
    alpha = names[0].replace("lora_down.weight", "alpha")
    (update,) = read_lora(write_lora(tmp_path / "y.safetensors", {**weights, alpha: torch.tensor(1.0)})).values()
    torch.testing.assert_close(update.delta(), product / 4)


def test_alpha_in_the_metadata_of_diffusers_scales_an_update(tmp_path):
    layer = "mid_block.attentions.0.proj_in"
    down, up, product = lora_factors(32, 32)
    weights = dict(zip(named("unet", layer, "peft"), (down, up), strict=True))
    metadata = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 6, "unet.r": 2})}
    (update,) = read_lora(write_lora(tmp_path / "x.safetensors", weights, metadata)).values()
    torch.testing.assert_close(update.delta(), 3 * product)


def test_convolution_between_the_factors_is_multiplied(tmp_path):
    """The file holds a convolution of 1 x 1, one of 3 x 3 and another one of 1 x 1."""
    name = kohya("unet", "down_blocks.0.resnets.0.conv1")[0]
    down, mid, up = torch.randn(2, 5, 1, 1), torch.randn(2, 2, 3, 3), torch.randn(4, 2, 1, 1)
    weights = {name: down, name.replace("lora_down", "lora_mid"): mid, name.replace("lora_down", "lora_up"): up}
    (update,) = read_lora(write_lora(tmp_path / "x.safetensors", weights)).values()
    x, conv = torch.randn(1, 5, 6, 6), torch.nn.functional.conv2d
    expected = conv(conv(conv(x, down), mid), up)
    torch.testing.assert_close(conv(x, update.delta().reshape(4, 5, 3, 3)), expected, rtol=1e-5, atol=1e-5)


# -- loading ---------------------------------------------------------------------------------------------------


def every_layer(model):
    """Return the weights of a LoRA for all layers in the form of kohya, and the product for each weight."""
    weights, products = {}, {}
    for (part, name), target in lora_targets(model).items():
        if not re.match("down_blocks|mid_block|up_blocks|text_model", name) or target.weight.dim() not in (2, 4):
            continue
        if "embedding" in name:
            continue
        shape = target.weight.shape
        down, up, product = lora_factors(shape[0], shape[1], tuple(shape[2:]), seed=len(products))
        prefix = {"unet": "lora_unet", "text_encoder": "lora_te"}[part]
        weights |= {f"{prefix}_{name}.lora_down.weight": down, f"{prefix}_{name}.lora_up.weight": up}
        products[part, target.name] = product
    return weights, products


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_several_loras_are_merged_at_load(tmp_path, precision, caplog):
    original = write_model(tmp_path / "m", v1_config(tmp_path))
    weights, products = every_layer(original)
    assert len(products) > 60
    file = write_lora(tmp_path / "x.safetensors", weights)
    caplog.set_level(logging.INFO)
    files = (tmp_path / "m/config.yaml", tmp_path / "m/model.ckpt")
    model = load_model(*files, precision=precision, loras=[(file, 0.75), (file, -0.25)])
    for (part, name), product in products.items():
        own, old = ((m.model.diffusion_model if part == "unet" else m.cond_stage_model) for m in (model, original))
        expected = old.get_parameter(name) + 0.5 * product
        tolerance = {"rtol": 1e-5, "atol": 1e-5} if precision == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
        torch.testing.assert_close(own.get_parameter(name).float(), expected, **tolerance)
        assert own.get_parameter(name).dtype == precision
    assert "not used" not in caplog.text and caplog.text.count("merged the LoRA") == 2


def test_public_function_accepts_files_and_pairs(tmp_path):
    original = write_model(tmp_path / "m", v1_config(tmp_path))
    weights, _products = every_layer(original)
    file = write_lora(tmp_path / "x.safetensors", weights)
    once = ldm.load(tmp_path / "m", loras=[file], device="cpu")
    twice = ldm.load(tmp_path / "m", loras=[(str(file), 0.5), (file, 0.5)], device="cpu")
    for name, value in once.state_dict().items():
        torch.testing.assert_close(twice.state_dict()[name], value, rtol=1e-5, atol=1e-5)


def test_layers_that_the_model_lacks_are_logged(tmp_path, model, caplog):
    down, up, _ = lora_factors(16, 16)
    weights = dict(zip((*kohya("te", TEXT), *kohya("unet", "mid_block.attentions.9.x")), (down, up) * 2, strict=True))
    merge_lora(model, write_lora(tmp_path / "x.safetensors", weights))
    assert '1 names not used of the LoRA "' in caplog.text and "mid_block_attentions_9_x" in caplog.text


# -- errors ----------------------------------------------------------------------------------------------------


def wider(model, tmp_path):
    """Write a LoRA for a context of 24 channels; the layers before the mismatch fit."""
    names = [*list(LAYERS)[::-1], TEXT]
    weights = {}
    for name in names:
        outputs, inputs, *kernel = LAYERS[name][1] if name in LAYERS else (16, 16)
        down, up, _ = lora_factors(outputs, 24 if "attn2" in name else inputs, tuple(kernel))
        weights |= dict(zip(kohya("unet" if name in LAYERS else "te", name), (down, up), strict=True))
    return write_lora(tmp_path / "wide.safetensors", weights)


def test_lora_of_another_width_raises_user_error_and_changes_nothing(tmp_path, model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(
        UserError, match=r'LoRA ".*" belongs to another model: ".*attn2_to_k" maps 24 channels to 32, here 16'
    ):
        merge_lora(model, wider(model, tmp_path))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


DOWN, UP = (name.replace("mid_block", "middle") for name in kohya("te", TEXT))
BAD = {
    "another model": (
        {"lora_unet_other.lora_down.weight": (2, 4), "lora_unet_other.lora_up.weight": (4, 2)},
        "no layer",
    ),
    "half of an update": ({DOWN: (2, 16)}, "incomplete.*lacks one of its two factors"),
    "different ranks": ({DOWN: (2, 16), UP: (16, 3)}, "damaged.*different ranks"),
    "other weights": ({DOWN: (2, 16), UP: (16, 2), "extra.weight": (1,)}, 'has a weight "extra.weight", which is not'),
    "a DoRA": ({DOWN: (2, 16), UP: (16, 2), DOWN.replace("lora_down.weight", "dora_scale"): (16,)}, "is a DoRA"),
    "a LoHa": ({"lora_unet_x.hada_w1_a": (2, 2)}, "is a LoHa.*, not a LoRA"),
    "a model": ({"model.diffusion_model.out.2.bias": (4,)}, "is not a LoRA: it has no weights lora_down"),
    "a first stage": (
        {"encoder.conv_in.bias": (4,), "decoder.conv_in.bias": (4,)},
        "is a first stage alone, not a LoRA",
    ),
    "the wrong base": (
        {"lora_te2_x.lora_down.weight": (2, 2), "lora_te2_x.lora_up.weight": (2, 2)},
        "is a LoRA for Stable Diffusion XL, which this package does not implement",
    ),
    "a wide context": (
        {"unet.a.attn2.to_k.lora_A.weight": (2, 2048), "unet.a.attn2.to_k.lora_B.weight": (640, 2)},
        "is a LoRA for Stable Diffusion XL",
    ),
    "another kernel": (
        dict(zip(kohya("unet", "down_blocks.0.resnets.0.conv1"), ((2, 32, 1, 1), (32, 2, 1, 1)), strict=True)),
        "has 32 values a row, here 288",
    ),
}


@pytest.mark.parametrize(("weights", "match"), BAD.values(), ids=BAD)
def test_bad_file_raises_user_error_of_one_line(tmp_path, model, weights, match):
    file = write_lora(tmp_path / "x.safetensors", {name: torch.zeros(shape) for name, shape in weights.items()})
    with pytest.raises(UserError, match=match) as caught:
        merge_lora(model, file)
    assert "\n" not in str(caught.value) and str(file) in str(caught.value)


def test_truncated_or_missing_file_raises_user_error(tmp_path, model):
    file = wider(model, tmp_path)
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size - 100)
    with pytest.raises(UserError, match=r"wide\.safetensors\" is truncated or damaged"):
        merge_lora(model, file)
    write_model(tmp_path / "m", text_config())
    with pytest.raises(UserError, match=r'there is no LoRA "none.safetensors"'):
        ldm.load(tmp_path / "m", loras=["none.safetensors"])


def test_model_without_configuration_raises_user_error(tmp_path, model):
    file = wider(model, tmp_path)
    model.config = None
    with pytest.raises(UserError, match="does not know its configuration"):
        merge_lora(model, file)
