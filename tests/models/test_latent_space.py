"""Tests of the first stage in half precision: images and latents that leave its range."""

from __future__ import annotations

import pytest
import torch
from parity_cases import assert_close
from parity_replay import SPLIT
from tiny_models import inpainting_config, make_model, text_config

from ldm.models.diffusion.batch_keys import MASK_KEY, MASKED_KEY
from ldm.modules.precision import finite_items

IMAGES = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)
LATENTS = torch.linspace(-2, 2, 2 * 3 * 8 * 8).view(2, 3, 8, 8)
TILES = {**SPLIT, "ks": (4, 4), "stride": (2, 2), "vqf": 2, "patch_distributed_vq": True}


def loud(config, part: str):
    """Return a model whose `part` of the first stage overflows in float16; a normalisation follows its first layer."""
    model = make_model(config)
    layer = getattr(model.first_stage_model, part).conv_in
    layer.weight.mul_(1e5)
    layer.bias.mul_(1e5)
    return model


@pytest.mark.parametrize("tiles", [None, TILES], ids=["whole", "tiles"])
def test_decoding_that_overflows_is_repeated_in_float32(tiles, caplog):
    model = loud(text_config(), "decoder")
    model.split_input_params = tiles
    expected = model.decode_first_stage(LATENTS)
    half = model.to(torch.float16)
    assert not finite_items(half.first_stage_model.decode((LATENTS / half.scale_factor).half())).any()
    assert_close(half.decode_first_stage(LATENTS).float(), expected, 2e-2)
    half.decode_first_stage(LATENTS)
    assert [record.message for record in caplog.records] == [
        "the first stage overflows in float16; images that overflow are computed again in float32"
    ]
    assert {value.dtype for value in half.first_stage_model.parameters()} == {torch.float16}


@pytest.mark.parametrize("tiles", [None, TILES | {"ks": (8, 8), "stride": (4, 4)}], ids=["whole", "tiles"])
def test_encoding_that_overflows_is_repeated_in_float32(tiles):
    model = loud(text_config(), "encoder")
    model.split_input_params = tiles
    expected = model.encode_first_stage(IMAGES)
    half = model.to(torch.float16)
    assert not half.first_stage_model.encode(IMAGES.half()).mean.isfinite().all()
    posterior = half.encode_first_stage(IMAGES.half())
    assert posterior.mean.dtype == torch.float16
    assert_close(posterior.mean.float(), expected.mean, 2e-2)
    assert_close(posterior.std.float(), expected.std, 2e-2)


def test_masked_images_that_overflow_are_encoded_again_in_float32():
    model = loud(inpainting_config(), "encoder")
    batch = {MASKED_KEY: IMAGES, MASK_KEY: torch.ones(2, 1, 16, 16)}
    expected = model.get_learned_conditioning(batch)
    half = model.to(torch.float16)
    result = half.get_learned_conditioning({name: value.half() for name, value in batch.items()})
    assert_close(result.float(), expected, 2e-2)


def test_encoding_in_range_is_not_repeated(monkeypatch):
    model = make_model(text_config()).to(torch.bfloat16)
    calls, encode = [], model.first_stage_model.encode
    monkeypatch.setattr(model.first_stage_model, "encode", lambda x: calls.append(x.dtype) or encode(x))
    model.encode_first_stage(IMAGES.bfloat16())
    assert calls == [torch.bfloat16]
