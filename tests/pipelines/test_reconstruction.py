"""Tests of `ldm.pipelines.reconstruction`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from library_tasks import random_images
from PIL import Image
from tiny_models import make_model, text_config

import ldm
from ldm.io.pixels import to_batch, to_uint8

IMAGES = random_images(3, 16, 16)


@pytest.fixture(scope="module")
def model():
    return make_model(text_config())


def codebook_config():
    config = text_config()["params"]["first_stage_config"]
    params = {**config["params"], "n_embed": 16}
    params["ddconfig"] = {**params["ddconfig"], "double_z": False}
    return {"target": "ldm.models.autoencoder.VQModel", "params": params}


@pytest.mark.parametrize("stage", ["latent diffusion", "KL", "codebook"])
def test_images_are_encoded_and_decoded(model, stage):
    stage = {
        "latent diffusion": lambda: model,
        "KL": lambda: model.first_stage_model,
        "codebook": lambda: make_model(codebook_config()),
    }[stage]()
    autoencoder = getattr(stage, "first_stage_model", stage)
    x = to_batch(list(IMAGES))
    encoded = autoencoder.encode(x)
    z = encoded[0] if isinstance(encoded, tuple) else encoded.mode()
    expected = autoencoder.decode(z).clamp(-1, 1)
    results = ldm.reconstruct(stage, IMAGES, output_type="pt", progress=False)
    torch.testing.assert_close(torch.stack(results), expected, rtol=0, atol=1e-5)
    latents = ldm.reconstruct(stage, IMAGES, output_type="latent", progress=False)
    torch.testing.assert_close(torch.stack(latents), z, rtol=0, atol=1e-5)


def test_output_types_contain_the_same_images(model):
    results = {
        kind: ldm.reconstruct(model, IMAGES, output_type=kind, progress=False) for kind in ("pil", "numpy", "pt")
    }
    for pil, numpy, pt in zip(*results.values(), strict=True):
        assert isinstance(pil, Image.Image) and pil.size == (16, 16)
        assert numpy.dtype == np.uint8 and (np.asarray(pil) == numpy).all() and (to_uint8(pt) == numpy).all()
        assert pt.dtype == torch.float32 and len(torch.unique(pt)) > 256, "tensors are not rounded to levels"


@pytest.mark.parametrize("size", [(16, 16), (9, 21), (3, 5), (2, 4)])
def test_images_keep_their_size(model, size):
    image = random_images(1, *size)
    sides = {"numpy": lambda x: x.shape[:2], "pt": lambda x: x.shape[1:], "pil": lambda x: x.size[::-1]}
    for kind, sides_of in sides.items():
        (result,) = ldm.reconstruct(model, image, output_type=kind, progress=False)
        assert tuple(sides_of(result)) == size


def test_batches_and_callback(model):
    calls = []
    options = {"output_type": "numpy", "progress": False}
    alone = ldm.reconstruct(model, IMAGES, batch_size=1, callback=lambda *call: calls.append(call), **options)
    together = ldm.reconstruct(model, IMAGES, batch_size=8, **options)
    assert calls == [(1, 3), (2, 3), (3, 3)]
    assert all(np.abs(a.astype(int) - b).max() <= 1 for a, b in zip(alone, together, strict=True))


def test_model_without_a_configuration_is_accepted(model):
    stage = type(model.first_stage_model)(**text_config()["params"]["first_stage_config"]["params"]).eval()
    assert len(ldm.reconstruct(stage, IMAGES, progress=False)) == 3


def test_nothing_is_printed_or_written(model, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    ldm.reconstruct(model, IMAGES, progress=False)
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "") and not list(tmp_path.iterdir())


def test_unknown_option_raises_type_error(model):
    with pytest.raises(TypeError, match="stepz"):
        ldm.reconstruct(model, IMAGES, stepz=3)


def test_device_and_precision_move_the_model():
    model = make_model(text_config())
    (half,) = ldm.reconstruct(model, IMAGES[0], device="cpu", precision="bfloat16", output_type="pt", progress=False)
    assert model.dtype == torch.bfloat16 and half.dtype == torch.float32


@pytest.mark.parametrize("stage", ["latent diffusion", "KL", "codebook"])
@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_overflow_of_float16_is_computed_in_float32(stage, part, caplog):
    model = make_model(codebook_config() if stage == "codebook" else text_config())
    model = model.first_stage_model if stage == "KL" else model
    autoencoder = getattr(model, "first_stage_model", model)
    layer = getattr(autoencoder, part).conv_in
    layer.weight.mul_(1e5)
    layer.bias.mul_(1e5)
    expected = ldm.reconstruct(model, IMAGES, output_type="latent" if part == "encoder" else "pt", progress=False)
    half = ldm.reconstruct(
        model, IMAGES, output_type="latent" if part == "encoder" else "pt", precision="float16", progress=False
    )
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        "the first stage overflows in float16; images that overflow are computed again in float32"
    ]
    assert {value.dtype for value in autoencoder.parameters()} == {torch.float16}
    difference = torch.stack(half) - torch.stack(expected)
    if stage == "codebook" and part == "encoder":  # rounding selects other entries here and there
        assert (difference.abs().amax(dim=1) < 1e-2).float().mean() > 0.9
    else:
        torch.testing.assert_close(torch.stack(half), torch.stack(expected), rtol=0, atol=3e-2)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_image_with_values_that_are_not_finite_is_an_error(part, value):
    model = make_model(text_config())
    getattr(model.first_stage_model, part).conv_out.bias[0] = value
    message = (
        f"the {'latents' if part == 'encoder' else 'pixels'} of image 0 \\(seed 3\\) are not finite; check the weights"
    )
    with pytest.raises(ldm.PartialResultError, match=message):
        ldm.reconstruct(model, IMAGES, seed=3, progress=False)
