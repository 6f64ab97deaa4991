"""Tests of `ldm.pipelines.inputs`: images, masks and label maps of any type."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from library_tasks import half_mask, random_images
from PIL import Image

from ldm.pipelines.inputs import as_labels, as_list, as_mask, as_pixels, broadcast

PIXELS = random_images(1, 6, 10)[0]
FLOATS = (PIXELS / 127.5 - 1).astype(np.float32)

IMAGES = {
    "PIL": Image.fromarray(PIXELS),
    "uint8 (H, W, C)": PIXELS,
    "uint8 (C, H, W)": PIXELS.transpose(2, 0, 1),
    "float32 (H, W, C)": FLOATS,
    "float64 (C, H, W)": FLOATS.transpose(2, 0, 1).astype(np.float64),
    "tensor uint8 (C, H, W)": torch.from_numpy(PIXELS).permute(2, 0, 1),
    "tensor uint8 (H, W, C)": torch.from_numpy(PIXELS),
    "tensor float (C, H, W)": torch.from_numpy(FLOATS).permute(2, 0, 1),
    "tensor with gradients": torch.from_numpy(FLOATS).permute(2, 0, 1).clone().requires_grad_(True),
    "opaque RGBA": Image.fromarray(PIXELS).convert("RGBA"),
    "opaque array": np.dstack([PIXELS, np.full((6, 10), 255, np.uint8)]),
}


@pytest.mark.parametrize("name", IMAGES)
def test_images_of_every_type_become_the_same_pixels(name):
    pixels = as_pixels(IMAGES[name])
    assert pixels.dtype == np.uint8 and (pixels == PIXELS).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_tensors_are_images(dtype):
    pixels = as_pixels(torch.from_numpy(FLOATS).permute(2, 0, 1).to(dtype))
    assert np.abs(pixels.astype(int) - PIXELS).max() <= 1


@pytest.mark.parametrize("shape", [(6, 10), (6, 10, 1), (1, 6, 10)], ids=str)
def test_grey_images_become_rgb(shape):
    grey = PIXELS[..., 0]
    for image in (grey.reshape(shape), torch.from_numpy(grey.reshape(shape)), FLOATS[..., 0].reshape(shape)):
        assert (as_pixels(image) == grey[..., None].repeat(3, axis=-1)).all()
    assert (as_pixels(Image.fromarray(grey)) == grey[..., None]).all()


def test_transparent_parts_become_white():
    rgba = Image.fromarray(PIXELS).convert("RGBA")
    rgba.putalpha(Image.fromarray(np.where(half_mask(6, 10), 0, 255).astype(np.uint8)))
    for image in (rgba, np.asarray(rgba), torch.from_numpy(np.array(rgba)).permute(2, 0, 1)):
        pixels = as_pixels(image)
        assert (pixels[:, :5] == 255).all() and (pixels[:, 5:] == PIXELS[:, 5:]).all()


def test_float_values_outside_their_range_are_clipped():
    assert (as_pixels(np.full((2, 2, 3), 3.0)) == 255).all() and (as_pixels(np.full((2, 2, 3), -3.0)) == 0).all()


@pytest.mark.parametrize(
    "image", [PIXELS.astype(np.int64), PIXELS.astype(np.uint16), PIXELS > 9], ids=lambda x: str(x.dtype)
)
def test_other_types_raise_value_error(image):
    """Their range is unknown: 0 … 255 must not be mistaken for [-1, 1]."""
    with pytest.raises(ValueError, match=f"an image has uint8 values, or float values in .-1, 1., got {image.dtype}"):
        as_pixels(image)


@pytest.mark.parametrize("path", ["image.png", Path("image.png")], ids=["str", "Path"])
def test_paths_raise_type_error(path):
    with pytest.raises(TypeError, match=r'not paths; open "image\.png" with PIL\.Image\.open'):
        as_list(path)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (3, 4), (4, 3), (3, 1)], ids=str)
def test_small_images_are_not_mistaken_for_channels(size):
    """The channels of arrays come last, and those of tensors first."""
    image = random_images(1, *size)[0]
    assert (as_pixels(image) == image).all() and (as_pixels(Image.fromarray(image)) == image).all()
    assert (as_pixels(torch.from_numpy(image).permute(2, 0, 1)) == image).all()


@pytest.mark.parametrize("shape", [(4,), (6, 10, 5), (2, 2, 6, 10, 3)], ids=str)
def test_other_shapes_raise_value_error(shape):
    with pytest.raises(ValueError, match="with 1, 3 or 4 channels, got"):
        as_pixels(np.zeros(shape, np.uint8))


@pytest.mark.parametrize(
    "form", ["PIL", "list", "tuple", "generator", "(B, H, W, C)", "(B, C, H, W)", "tensor", "array"]
)
def test_one_image_many_images_and_batches_are_lists(form):
    batch = random_images(3, 6, 10)
    given, count = {
        "PIL": (Image.fromarray(batch[0]), 1),
        "array": (batch[0], 1),
        "list": (list(batch), 3),
        "tuple": (tuple(Image.fromarray(each) for each in batch), 3),
        "generator": ((each for each in batch), 3),
        "(B, H, W, C)": (batch, 3),
        "(B, C, H, W)": (batch.transpose(0, 3, 1, 2), 3),
        "tensor": (torch.from_numpy(batch).permute(0, 3, 1, 2), 3),
    }[form]
    images = as_list(given)
    assert isinstance(images, list) and len(images) == count
    assert all((as_pixels(image) == pixels).all() for image, pixels in zip(images, batch, strict=False))


MASK = half_mask(6, 10)
MASKS = {
    "PIL L": Image.fromarray((255 * MASK).astype(np.uint8)),
    "PIL 1": Image.fromarray(MASK),
    "PIL RGB": Image.fromarray((255 * MASK).astype(np.uint8)).convert("RGB"),
    "bool": MASK,
    "uint8 0 and 255": (255 * MASK).astype(np.uint8),
    "uint8 0 and 1": MASK.astype(np.uint8),
    "int64 0 and 1": MASK.astype(np.int64),
    "float": MASK.astype(np.float32),
    "(1, H, W)": MASK[None],
    "(H, W, 1)": MASK[..., None],
    "tensor bool": torch.from_numpy(MASK),
    "tensor float (1, H, W)": torch.from_numpy(MASK)[None].float(),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_of_every_type_become_the_same_mask(name):
    mask = as_mask(MASKS[name])
    assert mask.dtype == bool and (mask == MASK).all()


def test_transparent_parts_of_a_mask_are_black():
    image = Image.new("RGBA", (10, 6), (255, 255, 255, 0))
    image.paste((255, 255, 255, 255), (0, 0, 5, 6))
    assert (as_mask(image) == MASK).all()


def test_grey_values_of_a_mask_are_white_from_the_middle():
    assert as_mask(np.array([[0, 127, 128, 255]], np.uint8)).tolist() == [[False, False, True, True]]
    assert as_mask(np.array([[0.0, 0.49, 0.5, 1.0]])).tolist() == [[False, False, True, True]]
    assert not as_mask(np.zeros((2, 3), np.uint8)).any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_raise_value_error(value):
    image = np.zeros((4, 6, 3), np.float32)
    image[1, 2, 0] = value
    with pytest.raises(ValueError, match="the image has values that are not finite"):
        as_pixels(image)
    with pytest.raises(ValueError, match="the mask has values that are not finite"):
        as_mask(torch.from_numpy(image[..., 0]))


def test_masks_of_other_shapes_raise_value_error():
    with pytest.raises(ValueError, match=r"a mask has the shape \(H, W\), .*, got \(6, 10, 3\)"):
        as_mask(PIXELS)


def test_label_maps_of_every_type_become_the_same_labels():
    labels = np.random.default_rng(0).integers(0, 9, (6, 10))
    palette = Image.fromarray(labels.astype(np.uint8))
    palette.putpalette(bytes(range(256)) * 3)
    for each in (
        labels,
        labels.astype(np.uint8),
        torch.from_numpy(labels),
        Image.fromarray(labels.astype(np.uint8)),
        palette,
    ):
        found = as_labels(each)
        assert found.dtype == np.int64 and (found == labels).all()
    for wrong in (PIXELS, FLOATS[..., 0], Image.fromarray(PIXELS)):
        with pytest.raises(
            ValueError, match=r"a label map (has integer values of the shape|is a grey or palette image)"
        ):
            as_labels(wrong)


def test_values_are_repeated_for_every_image():
    assert broadcast("fox", 2, "prompts") == ["fox", "fox"] and broadcast(["fox"], 2, "prompts") == ["fox", "fox"]
    assert broadcast(["a", "b"], 2, "prompts") == ["a", "b"]
    with pytest.raises(ValueError, match="3 images and 2 prompts do not match; give one for each, or one for all"):
        broadcast(["a", "b"], 3, "prompts")
