"""Tests of the U-Nets: recorded values, published names, options, precision and memory formats."""

from __future__ import annotations

import gzip
import json

import pytest
import torch
from omegaconf import OmegaConf
from parity_cases import PARITY, assert_close, build, load_case, relative_error, weights_module
from parity_replay import assert_replayed

from ldm.config.instantiate import instantiate_from_config
from ldm.errors import UserError
from ldm.modules.diffusionmodules.openaimodel import (
    AttentionBlock,
    AttentionPool2d,
    Downsample,
    EncoderUNetModel,
    ResBlock,
    TransposedUpsample,
    UNetModel,
    Upsample,
)

UNET = "ldm.modules.diffusionmodules.openaimodel.UNetModel"
LSUN_BEDROOMS = {
    "image_size": 64,
    "in_channels": 3,
    "out_channels": 3,
    "model_channels": 224,
    "attention_resolutions": [8, 4, 2],
    "num_res_blocks": 2,
    "channel_mult": [1, 2, 3, 4],
    "num_head_channels": 32,
}
CLASS_CONDITIONAL = {
    **LSUN_BEDROOMS,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 256,
    "attention_resolutions": [4, 2, 1],
    "channel_mult": [1, 2, 4],
    "use_spatial_transformer": True,
    "context_dim": 512,
}
# U-Nets of the published configurations, without duplicates.
PUBLISHED = {
    "configs/latent-diffusion/lsun_bedrooms-ldm-vq-4.yaml": LSUN_BEDROOMS,
    "configs/latent-diffusion/cin-ldm-vq-f8.yaml": CLASS_CONDITIONAL,
    "configs/latent-diffusion/cin256-v2.yaml": {
        **LSUN_BEDROOMS,
        "model_channels": 192,
        "channel_mult": [1, 2, 3, 5],
        "num_heads": 1,
        "num_head_channels": -1,
        "use_spatial_transformer": True,
        "context_dim": 512,
    },
    "configs/latent-diffusion/lsun_churches-ldm-kl-8.yaml": {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 192,
        "attention_resolutions": [1, 2, 4, 8],
        "num_res_blocks": 2,
        "channel_mult": [1, 2, 2, 4, 4],
        "num_heads": 8,
        "use_scale_shift_norm": True,
        "resblock_updown": True,
    },
    "configs/latent-diffusion/txt2img-1p4B-eval.yaml": {
        **CLASS_CONDITIONAL,
        "model_channels": 320,
        "channel_mult": [1, 2, 4, 4],
        "num_heads": 8,
        "num_head_channels": -1,
        "context_dim": 1280,
        "use_checkpoint": True,
        "legacy": False,
    },
    "configs/retrieval-augmented-diffusion/768x768.yaml": {
        **CLASS_CONDITIONAL,
        "in_channels": 16,
        "out_channels": 16,
        "model_channels": 448,
        "channel_mult": [1, 2, 3, 4],
        "context_dim": 768,
        "use_checkpoint": True,
    },
    "models/ldm/bsr_sr/config.yaml": {
        **LSUN_BEDROOMS,
        "in_channels": 6,
        "model_channels": 160,
        "attention_resolutions": [16, 8],
        "channel_mult": [1, 2, 2, 4],
    },
    "models/ldm/inpainting_big/config.yaml": {
        **LSUN_BEDROOMS,
        "in_channels": 7,
        "model_channels": 256,
        "num_heads": 8,
        "num_head_channels": -1,
        "resblock_updown": True,
    },
    "models/ldm/layout2img-openimages256/config.yaml": {
        **LSUN_BEDROOMS,
        "model_channels": 128,
        "use_spatial_transformer": True,
        "transformer_depth": 3,
        "context_dim": 512,
    },
    "models/ldm/semantic_synthesis512/config.yaml": {
        **LSUN_BEDROOMS,
        "image_size": 128,
        "in_channels": 6,
        "model_channels": 128,
        "attention_resolutions": [32, 16, 8],
        "channel_mult": [1, 4, 8],
        "num_heads": 8,
        "num_head_channels": -1,
    },
    "models/ldm/text2img256/config.yaml": {
        **LSUN_BEDROOMS,
        "model_channels": 192,
        "channel_mult": [1, 2, 3, 5],
        "use_spatial_transformer": True,
        "context_dim": 640,
    },
}
SMALL = {
    "image_size": 8,
    "in_channels": 3,
    "model_channels": 32,
    "out_channels": 3,
    "num_res_blocks": 1,
    "attention_resolutions": [2],
    "channel_mult": [1, 2],
}
CASES = [
    "unet_self_attention",
    "unet_new_attention_order",
    "unet_cross_attention",
    "unet_cross_attention_not_legacy",
    "unet_head_channels_cross_attention",
    "unet_resblock_updown",
    "unet_class_embedding",
    "unet_no_conv_resample",
    "unet_codebook_prediction",
    "unet_rectangular",
]


def run(model, inputs):
    return model(inputs["x"], inputs["timesteps"], context=inputs.get("context"), y=inputs.get("y"))


@pytest.mark.parametrize("name", CASES)
def test_unet_matches_the_recorded_values(name):
    assert_replayed(name)


@pytest.mark.parametrize("pool", ["adaptive", "attention", "spatial", "spatial_v2"])
def test_encoder_unet_matches_the_recorded_values(pool):
    assert_replayed(f"encoder_unet_{pool}")


@pytest.mark.parametrize("name", PUBLISHED)
def test_state_dict_names_and_shapes_match_the_published_ones(name):
    with gzip.open(PARITY / "state_dicts.json.gz") as file:
        entries = json.load(file)["models"][name]
    prefix = "model.diffusion_model."
    expected = {key[len(prefix) :]: shape for key, shape in entries.items() if key.startswith(prefix)}
    with torch.device("meta"):
        model = instantiate_from_config({"target": UNET, "params": PUBLISHED[name]})
    assert {key: list(entry.shape) for key, entry in model.state_dict().items()} == expected


@pytest.fixture(scope="module")
def cross_attention_case():
    return load_case("unet_cross_attention")


def test_channels_last_returns_the_same_values(cross_attention_case):
    for case in (cross_attention_case, load_case("unet_resblock_updown")):
        model = build(case).to(memory_format=torch.channels_last)
        inputs = {**case.inputs, "x": case.inputs["x"].to(memory_format=torch.channels_last)}
        with torch.no_grad():
            eps = run(model, inputs)
        assert_close(eps, case.outputs["eps"], tol=1e-5)
        assert eps.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["unet_cross_attention", "unet_resblock_updown", "unet_class_embedding"])
@pytest.mark.parametrize("method", ["weights", "autocast", "convert_to_fp16"])
def test_half_precision_is_close_and_preserves_the_input_dtype(name, method):
    case = load_case(name)
    model = build(case)
    if method == "weights":
        model.to(torch.bfloat16)
    if method == "convert_to_fp16":
        model.convert_to_fp16()
        assert model.dtype == torch.float16
        assert model.time_embed[0].weight.dtype == model.out[2].weight.dtype == torch.float32
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=method == "autocast"):
        eps = run(model, case.inputs)
    assert eps.dtype == torch.float32
    assert relative_error(eps, case.outputs["eps"]) < (0.005 if method == "convert_to_fp16" else 0.04)
    if method == "convert_to_fp16":
        model.convert_to_fp32()
        assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_use_fp16_converts_the_blocks_to_half_precision():
    model = UNetModel(**SMALL, num_heads=2, use_fp16=True)
    assert model.dtype == torch.float16
    assert model(torch.randn(1, 3, 8, 8), torch.tensor([3])).dtype == torch.float32
    classifier = EncoderUNetModel(**SMALL, use_fp16=True)
    assert classifier(torch.randn(1, 3, 8, 8), torch.tensor([3])).dtype == torch.float32


@pytest.mark.parametrize("name", ["unet_cross_attention_not_legacy", "unet_resblock_updown"])
def test_recomputing_activations_preserves_gradients(name):
    case = load_case(name)
    gradients = []
    for recompute in (False, True):
        params = {**case.config["params"], "use_checkpoint": recompute, "checkpoint_transformer": recompute}
        model = weights_module().fill(UNetModel(**params), case.weights_seed)
        run(model, case.inputs).square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert_close(gradients[1], gradients[0], tol=1e-5)


def test_every_parameter_receives_a_gradient():
    case = load_case("unet_cross_attention")
    model = build(case)
    run(model, case.inputs).square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_untrained_model_predicts_zero(seed):
    model = UNetModel(**SMALL, num_heads=2)
    assert not model(torch.randn(2, 3, 8, 8), torch.tensor([1, 2])).any()


@pytest.mark.parametrize("dims", [1, 3])
@pytest.mark.parametrize("updown", [False, True])
def test_one_and_three_dimensions(dims, updown, seed):
    model = UNetModel(**SMALL, num_heads=2, dims=dims, resblock_updown=updown)
    x = torch.randn(2, 3, *[4] * dims)
    assert model(x, torch.tensor([1, 2])).shape == x.shape
    classifier = EncoderUNetModel(**{**SMALL, "out_channels": 5}, dims=dims)
    assert classifier(x, torch.tensor([1, 2])).shape == (2, 5)


def count_heads(blocks):
    return [layer.num_heads for layer in blocks.modules() if isinstance(layer, AttentionBlock)]


def test_number_of_heads_in_encoder_and_decoder():
    model = UNetModel(**SMALL, num_heads=2, num_heads_upsample=4)
    assert (count_heads(model.input_blocks), count_heads(model.output_blocks)) == ([2], [4, 4])
    model = UNetModel(**SMALL, num_heads=2, num_head_channels=8)
    assert (count_heads(model.input_blocks), count_heads(model.output_blocks)) == ([8], [8, 8])


def test_legacy_heads_are_widened_to_divide_the_channels():
    params = {**SMALL, "num_head_channels": 48, "use_spatial_transformer": True, "context_dim": 8}
    for legacy, inner in ((True, 64), (False, 48)):
        attention = UNetModel(**params, legacy=legacy).input_blocks[3][1].transformer_blocks[0].attn1
        assert (attention.heads, attention.to_q.out_features) == (1, inner)


def test_options_may_be_omegaconf_lists():
    config = OmegaConf.create({**SMALL, "num_heads": 2, "use_spatial_transformer": True, "context_dim": [20]})
    model = UNetModel(**config)
    x, context = torch.randn(1, 3, 8, 8), torch.randn(1, 4, 20)
    assert model(x, torch.tensor([1]), context=context).shape == x.shape


def test_contradicting_options_raise_user_error():
    with pytest.raises(UserError, match="set both or neither"):
        UNetModel(**SMALL, num_heads=2, context_dim=8)
    with pytest.raises(UserError, match="set both or neither"):
        UNetModel(**SMALL, num_heads=2, use_spatial_transformer=True)
    with pytest.raises(UserError, match="set num_heads or num_head_channels"):
        UNetModel(**SMALL)
    with pytest.raises(UserError, match='pool "mean" is unknown; choose one of adaptive'):
        EncoderUNetModel(**SMALL, pool="mean")
    with pytest.raises(UserError, match="needs num_head_channels"):
        EncoderUNetModel(**SMALL, pool="attention")


def test_missing_or_unexpected_class_labels_raise_value_error():
    x, t, y = torch.randn(1, 3, 8, 8), torch.tensor([1]), torch.tensor([2])
    with pytest.raises(ValueError, match="class labels y"):
        UNetModel(**SMALL, num_heads=2)(x, t, y=y)
    with pytest.raises(ValueError, match="class labels y"):
        UNetModel(**SMALL, num_heads=2, num_classes=4)(x, t)


def test_upsampling_repeats_pixels_and_downsampling_averages_pixels():
    x = torch.arange(4.0).reshape(1, 1, 2, 2)
    up = Upsample(1, use_conv=False)(x)
    assert torch.equal(up, x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    assert torch.equal(Downsample(1, use_conv=False)(up), x)


def test_three_dimensional_resampling_preserves_the_first_dimension():
    x = torch.randn(1, 4, 3, 4, 4)
    assert Upsample(4, use_conv=True, dims=3, out_channels=6)(x).shape == (1, 6, 3, 8, 8)
    assert Downsample(4, use_conv=True, dims=3, out_channels=6)(x).shape == (1, 6, 3, 2, 2)


def test_resampling_options():
    x = torch.randn(1, 4, 6, 6)
    assert Downsample(4, use_conv=True, padding=0)(x).shape == (1, 4, 2, 2)
    assert TransposedUpsample(4, out_channels=2)(x).shape == (1, 2, 15, 15)
    with pytest.raises(ValueError, match="average pooling cannot change 4 channels to 8"):
        Downsample(4, use_conv=False, out_channels=8)


def test_new_residual_block_is_its_skip_connection(seed):
    x, emb = torch.randn(2, 32, 6, 6), torch.randn(2, 16)
    assert torch.equal(ResBlock(32, 16, dropout=0.0)(x, emb), x)
    wider = ResBlock(32, 16, dropout=0.0, out_channels=64, use_conv=True)
    assert wider.skip_connection.kernel_size == (3, 3)
    assert torch.equal(wider(x, emb), wider.skip_connection(x))
    assert ResBlock(32, 16, 0.0, up=True)(x, emb).shape == (2, 32, 12, 12)
    assert ResBlock(32, 16, 0.0, down=True)(x, emb).shape == (2, 32, 3, 3)


def test_attention_pool_returns_one_vector_per_image(seed):
    pool = AttentionPool2d(4, 32, num_heads_channels=8, output_dim=5)
    assert pool(torch.randn(2, 32, 4, 4)).shape == (2, 5)
    assert AttentionPool2d(4, 32, 8)(torch.randn(2, 32, 4, 4)).shape == (2, 32)


def test_attention_pooling_of_another_size_raises_user_error():
    with pytest.raises(UserError, match="takes feature maps of 4 x 4 and gets 8 x 4; use images of the size"):
        AttentionPool2d(4, 32, 8)(torch.randn(2, 32, 8, 4))
