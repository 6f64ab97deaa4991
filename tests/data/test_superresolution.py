"""Pairs for super-resolution: sizes, crops, and every way of making the smaller picture."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from images_on_disk import values, write
from PIL import Image
from tiny_models import randomise, text_config
from torch.utils.data import default_collate

from ldm.config.instantiate import instantiate_from_config
from ldm.data.image_files import PictureFiles
from ldm.data.superresolution import DEGRADATIONS, SuperResolution
from ldm.errors import UserError
from ldm.modules.image_degradation import degradation_fn_bsr, degradation_fn_bsr_light

WHOLE = {"size": 32, "min_crop_f": 1.0, "random_crop": False}


@pytest.fixture
def pictures(tmp_path):
    """A square picture of 32 pixels and a wide one of 24 × 36."""
    write(tmp_path / "a.png", height=32, width=32)
    write(tmp_path / "b.png", height=24, width=36)
    return PictureFiles([tmp_path / "a.png", tmp_path / "b.png"], {"number": [0, 1]})


def square(pictures):
    return np.asarray(Image.open(pictures.paths[0]))


@pytest.mark.parametrize("degradation", DEGRADATIONS)
def test_both_sizes_and_ranges(pictures, degradation):
    dataset = SuperResolution(pictures, 16, degradation, downscale_f=4)
    for item in (dataset[0], dataset[1]):
        assert item["image"].shape == (16, 16, 3) and item["LR_image"].shape == (4, 4, 3)
        assert {item[key].dtype for key in ("image", "LR_image")} == {np.dtype("float32")}
        assert all(item[key].min() >= -1 and item[key].max() <= 1 for key in ("image", "LR_image"))
    assert dataset[1]["number"] == 1 and len(dataset) == 2


def test_pillows_and_opencvs_methods(pictures):
    array = square(pictures)
    results = {
        name: SuperResolution(pictures, degradation=name, **WHOLE)[0]["LR_image"]
        for name in ("pil_bicubic", "pil_nearest", "cv_area", "cv_nearest")
    }
    assert np.array_equal(SuperResolution(pictures, degradation="cv_area", **WHOLE)[0]["image"], values(array))
    for name, method in (("pil_bicubic", Image.Resampling.BICUBIC), ("pil_nearest", Image.Resampling.NEAREST)):
        assert np.array_equal(results[name], values(np.asarray(Image.fromarray(array).resize((8, 8), method))))
    means = array.reshape(8, 4, 8, 4, 3).mean(axis=(1, 3))
    assert (results["cv_area"] + 1) * 127.5 == pytest.approx(means, abs=0.51)
    assert np.array_equal(results["cv_nearest"], values(array[::4, ::4]))


@pytest.mark.parametrize(
    ("name", "function"), [("bsrgan", degradation_fn_bsr), ("bsrgan_light", degradation_fn_bsr_light)]
)
def test_the_degradations_of_bsrgan(pictures, name, function):
    torch.manual_seed(3)
    item = SuperResolution(pictures, degradation=name, **WHOLE)[0]
    torch.manual_seed(3)
    torch.rand(())  # the crop's size
    assert np.array_equal(item["LR_image"], values(function(square(pictures), sf=4)["image"]))


def test_squares_are_as_large_as_asked_and_anywhere(pictures):
    array = square(pictures)
    middle = SuperResolution(pictures, 16, "cv_area", min_crop_f=0.5, max_crop_f=0.5, random_crop=False)[0]
    assert np.array_equal(middle["image"], values(array[8:24, 8:24]))
    torch.manual_seed(0)
    anywhere = SuperResolution(pictures, 16, "cv_area", min_crop_f=0.5, max_crop_f=0.5)
    assert len({anywhere[0]["image"].tobytes() for _ in range(20)}) > 10


def test_the_seed_decides(pictures):
    dataset, draws = SuperResolution(pictures, 16, "bsrgan"), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(dataset[1])
    assert np.array_equal(draws[0]["LR_image"], draws[1]["LR_image"])
    assert not np.array_equal(draws[0]["LR_image"], draws[2]["LR_image"])


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"size": 16, "degradation": "bsrgan_lite"}, 'did you mean "bsrgan_light"'),
        ({"size": 16}, 'no degradation "None"'),
        ({"size": 18, "degradation": "bsrgan"}, r"multiple of downscale_f \(4\), not 18"),
        ({"degradation": "bsrgan"}, "not None"),
        ({"size": 16, "degradation": "bsrgan", "min_crop_f": 0.0}, "does not hold for 0.0, 1.0"),
    ],
)
def test_numbers_and_names_that_cannot_be(pictures, params, message):
    with pytest.raises(UserError, match=message):
        SuperResolution(pictures, **params)


def test_a_model_learns_from_pairs(pictures):
    """As models/ldm/bsr_sr: the smaller picture itself is joined to the latent of the larger one."""
    identity = {"target": "torch.nn.Identity"}
    config = text_config(cond_stage_config=identity, cond_stage_key="LR_image", conditioning_key="concat")
    unet = config["params"]["unet_config"]["params"]
    unet.update(in_channels=6, use_spatial_transformer=False)
    del unet["context_dim"], unet["transformer_depth"]
    config["params"]["cond_stage_trainable"] = False
    model = randomise(instantiate_from_config(config)).train()
    batch = default_collate([SuperResolution(pictures, 16, "bsrgan_light", downscale_f=2)[i] for i in (0, 1)])
    _, c = model.get_input(batch, "image")
    assert torch.equal(c, batch["LR_image"].movedim(-1, 1))
    loss, _ = model.shared_step(batch)
    loss.backward()
    first = model.model.diffusion_model.input_blocks[0][0].weight.grad
    assert first[:, 3:].norm() > 0, "the channels of the smaller picture are looked at"
