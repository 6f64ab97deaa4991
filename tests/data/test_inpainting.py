"""Random masks, and data sets for inpainting and super-resolution models."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from ldm.config.instantiate import instantiate_from_config
from ldm.data.emoji import EmojiValidation
from ldm.data.inpainting import MAX_COVERAGE, MaskedPictures, masked, random_mask
from ldm.data.masks import find_masks
from ldm.data.superresolution import SmallerPictures
from ldm.errors import UserError

SOURCE = {"target": "ldm.data.emoji.EmojiValidation", "params": {"size": 64, "names": ["rocket", "fox"]}}


def test_masks_cover_part_of_the_image():
    masks = [random_mask(24, 40, np.random.default_rng(i)) for i in range(200)]
    coverage = np.array([(mask > 0).mean() for mask in masks])
    assert all(mask.shape == (24, 40, 1) and set(np.unique(mask)) == {-1, 1} for mask in masks)
    assert coverage.min() > 0 and coverage.max() <= MAX_COVERAGE and coverage.std() > 0.05
    assert 0.1 < coverage.mean() < 0.4
    frequency = np.mean([mask > 0 for mask in masks], axis=0)
    assert frequency.min() > 0.02, "some pixel is never masked"


def test_masks_fit_tiny_images():
    for i in range(50):
        assert (random_mask(3, 2, np.random.default_rng(i)) > 0).any()


def test_items_contain_mask_and_masked_image():
    dataset, source = MaskedPictures(SOURCE), EmojiValidation(64, names=["rocket", "fox"])
    assert len(dataset) == len(source)
    item = dataset[0]
    is_masked = item["mask"][..., 0] > 0
    assert (item["image"] == source[0]["image"]).all() and item["caption"] == source[0]["caption"]
    assert (item["masked_image"][is_masked] == -1).all()
    assert (item["masked_image"][~is_masked] == item["image"][~is_masked]).all()
    assert item["masked_image"].dtype == item["mask"].dtype == np.float32
    assert (masked(item["image"], -np.ones_like(item["mask"])) == item["image"]).all()


def test_masks_depend_on_torch_seed_or_item_index():
    training, fixed = MaskedPictures(SOURCE), MaskedPictures(SOURCE, fixed=True)

    def two(dataset, seed):
        torch.manual_seed(seed)
        return [dataset[0]["mask"] for _ in range(2)]

    assert all((a == b).all() for a, b in zip(two(training, 1), two(training, 1), strict=True))
    assert (two(training, 1)[0] != two(training, 1)[1]).any() and (two(training, 1)[0] != two(training, 2)[0]).any()
    assert (two(fixed, 1)[0] == two(fixed, 2)[1]).all() and (fixed[0]["mask"] != fixed[1]["mask"]).any()


def test_smaller_images_are_resized_by_pillow():
    from PIL import Image

    item = SmallerPictures(SOURCE)[0]
    pixels = Image.fromarray(((item["image"] + 1) * 127.5).round().astype(np.uint8))
    small = np.asarray(pixels.resize((16, 16), Image.Resampling.BICUBIC)) / 127.5 - 1
    np.testing.assert_allclose(item["LR_image"], small, atol=1e-6)
    assert "mask" not in item and item["caption"].startswith(("rocket", "fox"))
    with pytest.raises(UserError, match="not divisible by downscale_f"):
        SmallerPictures(SOURCE, downscale_f=5)


def test_default_masks_stay_as_they_were():
    """The first masks of seed 0: their hash was computed before other kinds of masks existed."""
    torch.manual_seed(0)
    dataset = MaskedPictures(SOURCE)
    digest = hashlib.sha256(b"".join((dataset[0]["mask"] > 0).tobytes() for _ in range(5)))
    assert digest.hexdigest()[:16] == "85fa12c45a2a3f57"


@pytest.mark.parametrize("kind", ["thin", "medium", "thick", "box", "half"])
def test_kind_of_masks_is_a_parameter(kind):
    config = {"target": "ldm.data.inpainting.MaskedPictures", "params": {"dataset": SOURCE, "masks": kind}}
    dataset = instantiate_from_config(config)
    torch.manual_seed(3)
    item = dataset[0]
    torch.manual_seed(3)
    expected = find_masks(kind)(64, 64, np.random.default_rng(int(torch.randint(2**31, ()))))
    assert np.array_equal(item["mask"], expected) and item["mask"].shape == (64, 64, 1)
    assert np.array_equal(item["masked_image"], masked(item["image"], expected))
    fixed = MaskedPictures(SOURCE, fixed=True, masks=kind)
    assert np.array_equal(fixed[1]["mask"], find_masks(kind)(64, 64, np.random.default_rng(1)))


def test_unknown_masks_raise_user_error():
    with pytest.raises(UserError, match='there are no masks "brush"'):
        MaskedPictures(SOURCE, masks="brush")
