"""Pairs for super-resolution: sizes, crops, and all degradations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from images_on_disk import values, write
from PIL import Image
from tiny_models import randomise, text_config
from torch.utils.data import default_collate

from ldm.config.instantiate import instantiate_from_config
from ldm.data.image_files import ImageFiles
from ldm.data.superresolution import DEGRADATIONS, SmallerPictures, SuperResolution, find_degradation
from ldm.errors import UserError
from ldm.modules.image_degradation import degradation_fn_bsr, degradation_fn_bsr_light

WHOLE = {"size": 32, "min_crop_f": 1.0, "random_crop": False}


@pytest.fixture
def images(tmp_path):
    """Create a square image of 32 pixels and a wide image of 24 × 36."""
    write(tmp_path / "a.png", height=32, width=32)
    write(tmp_path / "b.png", height=24, width=36)
    return ImageFiles([tmp_path / "a.png", tmp_path / "b.png"], {"number": [0, 1]})


def square(images):
    return np.asarray(Image.open(images.paths[0]))


@pytest.mark.parametrize("degradation", DEGRADATIONS)
def test_image_sizes_and_value_ranges(images, degradation):
    dataset = SuperResolution(images, 16, degradation, downscale_f=4)
    for item in (dataset[0], dataset[1]):
        assert item["image"].shape == (16, 16, 3) and item["LR_image"].shape == (4, 4, 3)
        assert {item[key].dtype for key in ("image", "LR_image")} == {np.dtype("float32")}
        assert all(item[key].min() >= -1 and item[key].max() <= 1 for key in ("image", "LR_image"))
    assert dataset[1]["number"] == 1 and len(dataset) == 2


def test_pillow_and_opencv_degradations(images):
    array = square(images)
    results = {
        name: SuperResolution(images, degradation=name, **WHOLE)[0]["LR_image"]
        for name in ("pil_bicubic", "pil_nearest", "cv_area", "cv_nearest")
    }
    assert np.array_equal(SuperResolution(images, degradation="cv_area", **WHOLE)[0]["image"], values(array))
    for name, method in (("pil_bicubic", Image.Resampling.BICUBIC), ("pil_nearest", Image.Resampling.NEAREST)):
        assert np.array_equal(results[name], values(np.asarray(Image.fromarray(array).resize((8, 8), method))))
    means = array.reshape(8, 4, 8, 4, 3).mean(axis=(1, 3))
    assert (results["cv_area"] + 1) * 127.5 == pytest.approx(means, abs=0.51)
    assert np.array_equal(results["cv_nearest"], values(array[::4, ::4]))


@pytest.mark.parametrize(
    ("name", "function"), [("bsrgan", degradation_fn_bsr), ("bsrgan_light", degradation_fn_bsr_light)]
)
def test_bsrgan_degradations(images, name, function):
    torch.manual_seed(3)
    item = SuperResolution(images, degradation=name, **WHOLE)[0]
    torch.manual_seed(3)
    torch.rand(())  # for the size of the crop
    assert np.array_equal(item["LR_image"], values(function(square(images), sf=4)["image"]))


def test_crop_size_and_position(images):
    array = square(images)
    middle = SuperResolution(images, 16, "cv_area", min_crop_f=0.5, max_crop_f=0.5, random_crop=False)[0]
    assert np.array_equal(middle["image"], values(array[8:24, 8:24]))
    torch.manual_seed(0)
    random = SuperResolution(images, 16, "cv_area", min_crop_f=0.5, max_crop_f=0.5)
    assert len({random[0]["image"].tobytes() for _ in range(20)}) > 10


def test_items_depend_on_the_seed(images):
    dataset, items = SuperResolution(images, 16, "bsrgan"), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        items.append(dataset[1])
    assert np.array_equal(items[0]["LR_image"], items[1]["LR_image"])
    assert not np.array_equal(items[0]["LR_image"], items[2]["LR_image"])


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
def test_invalid_parameters_raise_user_error(images, params, message):
    with pytest.raises(UserError, match=message):
        SuperResolution(images, **params)


def test_model_trains_on_pairs(images):
    """As in models/ldm/bsr_sr, the low-resolution image is concatenated with the latent."""
    identity = {"target": "torch.nn.Identity"}
    config = text_config(cond_stage_config=identity, cond_stage_key="LR_image", conditioning_key="concat")
    unet = config["params"]["unet_config"]["params"]
    unet.update(in_channels=6, use_spatial_transformer=False)
    del unet["context_dim"], unet["transformer_depth"]
    config["params"]["cond_stage_trainable"] = False
    model = randomise(instantiate_from_config(config)).train()
    batch = default_collate([SuperResolution(images, 16, "bsrgan_light", downscale_f=2)[i] for i in (0, 1)])
    _, c = model.get_input(batch, "image")
    assert torch.equal(c, batch["LR_image"].movedim(-1, 1))
    loss, _ = model.shared_step(batch)
    loss.backward()
    first = model.model.diffusion_model.input_blocks[0][0].weight.grad
    assert first[:, 3:].norm() > 0, "the network uses the channels of the low-resolution image"


# -- wrapper ---------------------------------------------------------------------------------------------------

SOURCE = {"target": "ldm.data.emoji.EmojiValidation", "params": {"size": 64, "names": ["rocket", "fox"]}}


@pytest.mark.parametrize("degradation", DEGRADATIONS)
def test_wrapper_adds_a_degraded_version(degradation):
    config = {"target": "ldm.data.superresolution.SmallerPictures"}
    config["params"] = {"dataset": SOURCE, "degradation": degradation, "downscale_f": 4}
    dataset = instantiate_from_config(config)
    torch.manual_seed(5)
    item = dataset[1]
    assert item["LR_image"].shape == (16, 16, 3) and item["LR_image"].dtype == np.float32
    assert item["LR_image"].min() >= -1 and item["LR_image"].max() <= 1 and len(dataset) == 2
    pixels = ((item["image"] + 1) * 127.5).round().astype(np.uint8)
    torch.manual_seed(5)
    assert np.array_equal(item["LR_image"], values(find_degradation(degradation, 16, 4)(pixels)))
    batch = default_collate([dataset[0], dataset[1]])
    assert batch["LR_image"].shape == (2, 16, 16, 3) and len(batch["caption"]) == 2


@pytest.mark.parametrize("degradation", ["bsrgan", "bsrgan_light"])
def test_fixed_degradations_depend_on_the_index(degradation):
    fixed, random = (SmallerPictures(SOURCE, degradation, fixed=value) for value in (True, False))
    torch.manual_seed(1)
    first, state = fixed[0]["LR_image"], torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state), "the global generator stays as it was"
    torch.manual_seed(2)
    assert np.array_equal(fixed[0]["LR_image"], first) and not np.array_equal(random[0]["LR_image"], first)


def test_wrapper_needs_squares_of_one_size(tmp_path):
    write(tmp_path / "a.png", height=32, width=32)
    write(tmp_path / "b.png", height=16, width=16)
    source = {"target": "ldm.data.openimages.FullOpenImagesValidation", "params": {"data_root": str(tmp_path)}}
    dataset = SmallerPictures(source)
    assert dataset[0]["LR_image"].shape == (8, 8, 3)
    with pytest.raises(UserError, match=r"images must have one size, not 32 × 32 and 16 × 16 px; set their size"):
        dataset[1]
    wide = {"target": "ldm.data.image_files.ImageFiles", "params": {"paths": [tmp_path / "c.png"], "labels": {}}}
    write(tmp_path / "c.png", height=16, width=32)
    with pytest.raises(UserError, match="images must be square, not 32 × 16 px"):
        SmallerPictures(wide)


def test_unreadable_image_is_replaced_by_the_next(images, caplog):
    images.paths[0].write_bytes(b"no image")
    dataset = SuperResolution(images, 16, "cv_area")
    assert [dataset[0]["number"], dataset[0]["number"]] == [1, 1]
    assert caplog.text.count("a.png") == 1
    subset = SuperResolution(torch.utils.data.Subset(images, [1, 0]), 16, "cv_area")
    assert [subset[0]["number"], subset[1]["number"]] == [1, 1]


def test_published_attributes(images):
    dataset = SuperResolution(images, 16, "cv_area", downscale_f=2, random_crop=False)
    assert (dataset.LR_size, dataset.center_crop, dataset.base) == (8, True, images)
