"""Tests of `ldm.pipelines.inpainting`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from library_tasks import half_mask, random_images
from PIL import Image
from tiny_models import inpainting_config, make_model

import ldm
from ldm.errors import UserError
from ldm.pipelines import sampling
from ldm.pipelines.inpainting import MaskedImage, blend, edge_weights

IMAGES = random_images(3, 16, 16)
MASK = half_mask(16, 16)


@pytest.fixture(scope="module")
def model():
    return make_model(inpainting_config())


def fill(model, images, masks, **options):
    options = {"steps": 3, "seed": 1, "progress": False, "output_type": "numpy", **options}
    return ldm.inpaint(model, images, masks, **options)


@pytest.mark.parametrize("size", [(16, 16), (12, 10), (1, 7), (33, 5)])
def test_unmasked_pixels_are_returned_bit_for_bit(model, size):
    image, mask = random_images(1, *size)[0], half_mask(*size)
    (result,) = fill(model, image, mask)
    assert result.shape == image.shape and (result[~mask] == image[~mask]).all()
    assert (result[mask] != image[mask]).mean() > 0.5


def test_images_and_masks_of_every_type_give_the_same_image(model):
    expected = fill(model, IMAGES[0], MASK)[0]
    image = Image.fromarray(IMAGES[0])
    for mask in (
        Image.fromarray(MASK),
        Image.fromarray((255 * MASK).astype(np.uint8)),
        MASK.astype(np.uint8),
        MASK.astype(np.float32),
        torch.from_numpy(MASK),
        torch.from_numpy(MASK)[None].float(),
        torch.from_numpy(MASK)[None, None],
        [MASK],
        MASK[None],
        MASK[..., None],
    ):
        assert (fill(model, image, mask)[0] == expected).all()


def test_masks_are_one_for_all_or_one_for_each(model):
    masks = np.stack([MASK, ~MASK, MASK.T])
    for given in (masks, list(masks), torch.from_numpy(masks), torch.from_numpy(masks)[:, None], masks[..., None]):
        results = fill(model, IMAGES, given)
        for result, image, mask in zip(results, IMAGES, masks, strict=True):
            assert (result[~mask] == image[~mask]).all() and (result[mask] != image[mask]).any()
    assert all(
        (result[~MASK] == image[~MASK]).all() for result, image in zip(fill(model, IMAGES, MASK), IMAGES, strict=True)
    )
    assert len(fill(model, IMAGES[0], list(masks))) == 3, "one image with several masks"
    with pytest.raises(ValueError, match="3 images and 2 masks do not match; give one for each, or one for all"):
        fill(model, IMAGES, list(masks[:2]))
    with pytest.raises(ValueError, match=r"a mask has the shape \(H, W\), .*, got \(2, 16, 16\)"):
        fill(model, IMAGES, masks[:2])


def test_conditioning_is_the_masked_image_and_its_mask(model, monkeypatch):
    seen = {}

    def sample(model, shape, **options):
        seen.update(options)
        return torch.zeros(shape)

    monkeypatch.setattr(sampling, "sample_latents", sample)
    fill(model, IMAGES[0], MASK)
    masked = torch.from_numpy(IMAGES[0]).permute(2, 0, 1)[None] / 127.5 - 1
    masked[..., :8] = -1
    mode = model.first_stage_model.encode(masked).mode()
    torch.testing.assert_close(seen["cond"][:, :3], mode, rtol=1e-5, atol=1e-5)
    assert seen["cond"][0, 3].tolist() == 8 * [[1.0] * 4 + [-1.0] * 4]
    assert seen["scale"] == 1 and seen["uncond"] is None


@pytest.mark.parametrize("sampler", ["ddim", "plms", "dpm", "ddpm"])
def test_large_images_are_sampled_in_tiles(model, sampler):
    image, mask = random_images(1, 24, 40)[0], half_mask(24, 40)
    whole, tiled, again = (fill(model, image, mask, tile=tile, sampler=sampler)[0] for tile in (0, 16, 16))
    assert (tiled == again).all() and (tiled != whole).any()
    assert (tiled[~mask] == image[~mask]).all()


@pytest.mark.parametrize(
    ("image", "mask", "options", "message"),
    [
        (IMAGES[0], half_mask(5, 4), {}, "the mask has 4 × 5 pixels, its image 16 × 16; make them equal"),
        (IMAGES[0], np.zeros((16, 16), bool), {}, "the mask is black everywhere: there is nothing to fill"),
        (IMAGES[0], MASK, {"tile": 9}, "tile 9 is not a multiple of 4"),
        (IMAGES[0], MASK, {"tile": 4}, "tile 4 is too small for this model; give 8 or more, or 0 for none"),
    ],
)
def test_invalid_inputs_raise_user_error(model, image, mask, options, message):
    with pytest.raises(UserError, match=message):
        fill(model, image, mask, **options)


def test_feather_fades_in_inside_the_mask(model):
    sharp, soft = (fill(model, IMAGES[0], MASK, feather=feather)[0] for feather in (0, 3))
    assert (soft[:, 8:] == IMAGES[0][:, 8:]).all() and (soft[:, :5] == sharp[:, :5]).all()
    assert (soft[:, 5:8] != sharp[:, 5:8]).any()
    weights = edge_weights(half_mask(9, 12), 3)
    np.testing.assert_allclose(weights[4], [1, 1, 1, 0.75, 0.5, 0.25, 0, 0, 0, 0, 0, 0])


def test_blend_weights_the_filling():
    request = MaskedImage(np.zeros((4, 8, 3), np.uint8), half_mask(4, 8))
    blended = blend(request, np.full((4, 8, 3), 200, np.uint8), 1)
    assert blended[1, :, 0].tolist() == [200, 200, 200, 100, 0, 0, 0, 0]


@pytest.mark.parametrize("feather", [0, 1, 4])
def test_edge_weights_are_those_of_dilation(feather):
    """The mean over 0 to `feather` dilations of the area outside the mask, as kornia dilates."""
    import kornia

    mask = np.random.RandomState(0).rand(24, 31) < 0.8
    mask[4:18, 5:25] = True
    outside, kernel = torch.from_numpy(~mask)[None, None].float(), torch.ones(3, 3)
    expected = 1 - outside
    for _ in range(feather):
        outside = kornia.morphology.dilation(outside, kernel)
        expected = expected + 1 - outside
    assert np.allclose(edge_weights(mask, feather), (expected / (feather + 1))[0, 0], atol=1e-6)
