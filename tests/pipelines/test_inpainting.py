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
from ldm.pipelines.inpainting import Inpainting, MaskedImage, blend, edge_weights, lost_share, whole_latents

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


# -- masks at the size of the latents --------------------------------------------------------------------------


def mask_of(*rows: str) -> np.ndarray:
    return np.array([[letter == "#" for letter in row] for row in rows])


def stroke(rows: slice, columns: slice = slice(2, 14), size: int = 16) -> np.ndarray:
    mask = np.zeros((size, size), bool)
    mask[rows, columns] = True
    return mask


def seen_by_the_network(model, monkeypatch, mask, **options) -> torch.Tensor:
    """Return the mask in the conditioning, True where it is 1."""
    seen = {}

    def sample(model, shape, **settings):
        seen.update(settings)
        return torch.zeros(shape)

    with monkeypatch.context() as patch:
        patch.setattr(sampling, "sample_latents", sample)
        fill(model, IMAGES[0], mask, **options)
    assert set(seen["cond"][:, 3].unique().tolist()) <= {-1.0, 1.0}
    return seen["cond"][0, 3] > 0


def test_thin_stroke_is_masked_with_mask_mode_max(model, monkeypatch):
    mask = stroke(slice(5, 6))
    assert not seen_by_the_network(model, monkeypatch, mask).any(), "as published"
    kept = seen_by_the_network(model, monkeypatch, mask, mask_mode="max")
    assert kept[2, 1:7].all() and kept.sum() == 6


@pytest.mark.parametrize("mask", [MASK, stroke(slice(4, 8), slice(6, 10))], ids=["half", "square"])
def test_mask_of_whole_latents_gives_the_same_image_in_both_modes(model, mask):
    nearest, largest = (fill(model, IMAGES[0], mask, mask_mode=mode)[0] for mode in ("nearest", "max"))
    assert (nearest == largest).all() and (nearest == fill(model, IMAGES[0], mask)[0]).all()


def test_mask_mode_max_hides_whole_latents_and_changes_the_mask_alone(model, monkeypatch):
    mask, seen = stroke(slice(5, 6)), {}
    encode = model.first_stage_model.encode
    monkeypatch.setattr(model.first_stage_model, "encode", lambda x: seen.update(images=x) or encode(x))
    (result,) = fill(model, IMAGES[0], mask, mask_mode="max")
    hidden = (seen["images"][0] == -1).all(dim=0).numpy()
    assert (hidden == stroke(slice(4, 6))).all()
    assert (result[~mask] == IMAGES[0][~mask]).all() and (result[mask] != IMAGES[0][mask]).any()


@pytest.mark.parametrize("size", [(16, 16), (9, 7), (33, 5)])
def test_mask_mode_max_suits_images_of_any_size(model, size):
    image, mask = random_images(1, *size)[0], np.zeros(size, bool)
    mask[-1, -1] = mask[1, 1] = True
    (result,) = fill(model, image, mask, mask_mode="max")
    assert result.shape == image.shape and (result[~mask] == image[~mask]).all()


def test_whole_latents():
    assert (whole_latents(mask_of("#...", "...."), 2) == mask_of("##..", "##..")).all()
    assert (whole_latents(mask_of("...#", ".#..", "....", "...."), 2) == mask_of("####", "####", "....", "....")).all()


@pytest.mark.parametrize(
    ("mask", "factor", "share"),
    [
        (stroke(slice(5, 6)), 2, 1.0),  # between the pixels that are taken
        (stroke(slice(4, 6)), 2, 0.0),
        (stroke(slice(4, 5)), 2, 0.0),  # it becomes wider
        (np.ones((5, 5), bool), 4, 0.0),
        (stroke(slice(1, 11), slice(0, 16)), 4, 0.2),  # of ten rows, eight remain
        (np.eye(16, dtype=bool), 4, 0.0),
        (np.eye(16, k=1, dtype=bool), 4, 1.0),
        (stroke(slice(0, 4), slice(0, 4)) | stroke(slice(9, 11), slice(9, 13)), 4, 8 / 24),  # it keeps the square alone
    ],
    ids=["lost", "kept", "wider", "full", "narrower", "diagonal", "lost diagonal", "part"],
)
def test_lost_share_of_a_mask(mask, factor, share):
    assert lost_share(mask, factor) == pytest.approx(share)


def test_masks_that_lose_more_than_a_tenth_are_reported_once(model, caplog):
    masks = [MASK, stroke(slice(5, 6)), stroke(slice(9, 10))]
    fill(model, IMAGES, masks, steps=1)
    assert [record.message for record in caplog.records] == [
        "mask 1 loses 100 % of its area at the size of the latents (2 × 2 pixels each), which may come out dark; "
        'mask_mode="max" keeps it (and 1 more masks)'
    ]
    caplog.clear()
    fill(model, IMAGES, masks, mask_mode="max", steps=1)
    fill(model, IMAGES, MASK, steps=1)
    assert not caplog.records


def test_unknown_mask_mode_raises_user_error(model):
    with pytest.raises(UserError, match=r'no mask_mode "nearst" \(did you mean "nearest"\?\); choose nearest, max'):
        fill(model, IMAGES[0], MASK, mask_mode="nearst")


def test_settings_without_a_mask_mode_are_those_of_nearest():
    """Images of earlier versions do not state it."""
    settings = Inpainting(feather=2).settings()
    assert settings.pop("mask_mode") == "nearest"
    assert Inpainting.from_settings(settings) == Inpainting(feather=2, mask_mode="nearest")
    assert Inpainting.from_settings(Inpainting(mask_mode="max").settings()).mask_mode == "max"


def test_read_only_masks_log_no_warning(model, recwarn):
    mask = MASK.copy()
    mask.flags.writeable = False
    fill(model, IMAGES[0], mask, steps=1)
    assert not [each for each in recwarn if "not writable" in str(each.message)]
