"""Steps that complete samples for in-painting, upscaling and colouring."""

import numpy as np
import pytest
import torch
from images_on_disk import pixels

from ldm.config.instantiate import instantiate_from_config
from ldm.data.laion import AddBW, AddLR, AddMask
from ldm.data.synthetic_masks import MASK_MODES, synthetic_mask
from ldm.errors import UserError


def sample(size=64, seed=0):
    return {"jpg": torch.tensor(pixels(size, size, seed)).float() / 127.5 - 1, "txt": "text"}


def masks(mode, size, count=40):
    random = np.random.default_rng(0)
    return [synthetic_mask(size, size, MASK_MODES[mode], random) for _ in range(count)]


@pytest.mark.parametrize("mode", MASK_MODES)
@pytest.mark.parametrize("share", [1.0, 0.125])
def test_masks_of_every_mode_cover_a_part_of_the_image(mode, share):
    made = masks(mode, int(MASK_MODES[mode].size * share))
    assert all(set(np.unique(mask)) <= {0.0, 1.0} and mask.dtype == np.float32 and mask.any() for mask in made)
    coverage = np.mean([mask.mean() for mask in made])
    low, high = {"256narrow": (0.02, 0.35), "512train-large": (0.15, 0.6)}.get(mode, (0.08, 0.5))
    assert low < coverage < high


def test_narrow_masks_have_thin_strokes_and_large_ones_wide_strokes():
    def widest(mode):
        from scipy.ndimage import distance_transform_edt

        return np.median([2 * distance_transform_edt(mask).max() for mask in masks(mode, MASK_MODES[mode].size, 15)])

    assert widest("256narrow") < 25 < widest("256train") < widest("512train-large")


@pytest.mark.parametrize("mode", ["512train", "thick", "half"])
def test_mask_is_one_where_the_image_becomes_grey(mode):
    torch.manual_seed(0)
    item = AddMask(mode)(sample())
    mask, image = item["mask"], item["masked_image"]
    assert mask.shape == (64, 64, 1) and mask.dtype == torch.float32
    assert torch.equal(image, torch.where(mask > 0.5, 0.0, item["jpg"]))
    assert 0 < mask.mean() < 1


def test_dropped_mask_covers_the_whole_image():
    item = AddMask("256train", p_drop=1.0)(sample())
    assert item["mask"].min() == 1 and not item["masked_image"].any()
    assert AddMask("256train", p_drop=0.0)(sample())["mask"].min() == 0


def test_masks_depend_on_the_global_generator_of_torch():
    torch.manual_seed(1)
    first, other = (AddMask()(sample())["mask"] for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(first, AddMask()(sample())["mask"]) and not torch.equal(first, other)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"mode": "512trian"}, 'there is no mode "512trian" .did you mean "512train"'),
        ({"p_drop": 2}, "p_drop must be a probability"),
    ],
)
def test_unsuitable_parameters_of_masks_raise_user_error(params, message):
    with pytest.raises(UserError, match=message):
        instantiate_from_config({"target": "ldm.data.laion.AddMask", "params": params})


def test_low_resolution_image_resembles_the_image():
    torch.manual_seed(0)
    item = AddLR(factor=2, output_size=64, initial_size=48)(sample())
    assert item["lr"].shape == (64, 64, 3) and item["lr"].dtype == torch.float32 and item["lr"].abs().max() <= 1
    assert 0 < (item["lr"] - item["jpg"]).abs().mean() < 0.2
    assert AddLR(4, 16)(sample())["lr"].shape == (16, 16, 3)


def test_grey_image_has_equal_channels():
    item = AddBW()(sample())
    assert item["lr"].shape == (64, 64, 3)
    assert torch.equal(item["lr"][..., 0], item["lr"][..., 2])
    low, high = item["jpg"].amin(-1), item["jpg"].amax(-1)
    assert ((item["lr"][..., 0] >= low - 1e-6) & (item["lr"][..., 0] <= high + 1e-6)).all()


def test_data_module_has_its_published_name():
    from ldm.data.laion import WebDataModuleFromConfig
    from ldm.training.shards import WebDataModuleFromConfig as home

    assert WebDataModuleFromConfig is home
