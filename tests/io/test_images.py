"""Images: load, save, value ranges and grids."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from ldm.errors import UserError
from ldm.io.grids import draw_boxes, log_txt_as_img, make_grid, shrink
from ldm.io.images import load_image, next_index, open_image, save_png
from ldm.io.pixels import to_uint8


@pytest.fixture
def image() -> np.ndarray:
    return np.random.RandomState(0).randint(0, 256, (24, 32, 3), dtype=np.uint8)


def test_every_level_survives_save_and_load(tmp_path):
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    save_png(levels, tmp_path / "a.png")
    tensor = load_image(tmp_path / "a.png")
    assert tensor.shape == (1, 3, 16, 16) and tensor.min() == -1 and tensor.max() == 1
    assert (to_uint8(tensor)[0] == levels).all()


def test_levels_are_rounded_down_as_in_the_published_code():
    x = torch.rand(1, 3, 50, 50, generator=torch.Generator().manual_seed(0)) * 2 - 1
    published = (255 * ((x + 1) / 2).clamp(0, 1)).permute(0, 2, 3, 1).numpy().astype(np.uint8)
    difference = to_uint8(x).astype(int) - published
    assert set(np.unique(difference)) <= {0, 1} and (difference != 0).mean() < 2e-3


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((2, 3, 5, 6), (2, 5, 6, 3)), ((3, 5, 6), (5, 6, 3)), ((2, 5, 6, 3), (2, 5, 6, 3)), ((2, 1, 5, 6), (2, 5, 6, 1))],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channels_are_last(shape, expected, dtype):
    x = torch.full(shape, 3.0, dtype=dtype)
    assert to_uint8(x).shape == expected and (to_uint8(x) == 255).all()
    assert to_uint8(x.float().numpy()).shape == expected


def test_pixels_are_unchanged_and_other_shapes_raise_value_error(image):
    assert (to_uint8(image) == image).all()
    with pytest.raises(ValueError, match="channels"):
        to_uint8(torch.zeros(5, 5, 5))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_no_pixels(value):
    """They would become black or white pixels, which look like an image."""
    image = torch.zeros(3, 2, 2)
    image[1, 0, 1] = value
    for given in (image, image.half(), image.numpy()):
        with pytest.raises(ValueError, match="values that are not finite"):
            to_uint8(given)


@pytest.mark.parametrize(
    ("count", "channels", "nrow", "padding"), [(7, 3, 3, 2), (2, 1, 8, 2), (4, 3, 2, 0), (1, 3, 4, 2)]
)
def test_grids_equal_those_of_torchvision(count, channels, nrow, padding):
    x = torch.rand(count, channels, 5, 6, generator=torch.Generator().manual_seed(1)) * 2 - 1
    expected = torchvision.utils.make_grid(torch.from_numpy(to_uint8(x)).permute(0, 3, 1, 2), nrow, padding)
    grid = make_grid(x, nrow, padding)
    assert grid.dtype == np.uint8 and (grid == expected.permute(1, 2, 0).numpy()).all()


def test_a_grid_needs_images():
    with pytest.raises(ValueError, match="grid"):
        make_grid(torch.zeros(0, 3, 4, 4))


def test_a_png_stores_text(tmp_path, image):
    text = {"prompt": "grüße 🚀\nsecond line", "seed": 3}
    save_png(image, tmp_path / "new" / "a.png", text)
    with Image.open(tmp_path / "new" / "a.png") as file:
        assert file.text == {"prompt": "grüße 🚀\nsecond line", "seed": "3"}
        assert (np.asarray(file) == image).all()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]


def test_an_unwritable_path_raises_user_error(tmp_path, image):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        save_png(image, tmp_path / "file" / "a.png")


@pytest.mark.parametrize(("size", "shape"), [(None, (24, 32)), (16, (16, 16)), ((8, 12), (8, 12))])
def test_images_are_cropped_and_resized(tmp_path, image, size, shape):
    save_png(image, tmp_path / "a.png")
    assert load_image(tmp_path / "a.png", size).shape == (1, 3, *shape)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.new(mode, (4, 4)).save(path)
    x = load_image(path)
    assert x.shape == (1, 3, 4, 4) and x.min() >= -1 and x.max() <= 1


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bits_keep_their_brightness(tmp_path, suffix):
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(levels).save(tmp_path / f"a.{suffix}", "PPM" if suffix == "pgm" else None)
    pixels = np.asarray(open_image(tmp_path / f"a.{suffix}"))
    assert (pixels == np.round(levels / 257)[..., None]).all()


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_of_32_bits_raise_user_error(tmp_path, dtype):
    Image.fromarray(np.ones((4, 4), dtype)).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match="32 bits"):
        open_image(tmp_path / "a.tif")


def test_every_mode_keeps_its_colours(tmp_path, image):
    rgb = Image.fromarray(image)
    rgb.convert("CMYK").save(tmp_path / "cmyk.tif")
    assert (np.asarray(open_image(tmp_path / "cmyk.tif")) == image).all()
    flat = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    flat.save(tmp_path / "red.jpg", quality=100)
    assert np.abs(np.asarray(open_image(tmp_path / "red.jpg")).astype(int) - [255, 0, 0]).max() < 4
    palette = rgb.quantize(16)
    palette.save(tmp_path / "p.png")
    assert (np.asarray(open_image(tmp_path / "p.png")) == np.asarray(palette.convert("RGB"))).all()


def test_the_first_frame_of_an_animation_is_read(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for name in ("a.gif", "a.webp", "a.png"):
        options = {"lossless": True} if name == "a.webp" else {}
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
        assert open_image(tmp_path / name).getpixel((0, 0)) == (255, 0, 0)


def bomb(side):
    """Return a PNG that claims `side` × `side` pixels and contains none."""
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"")
    chunks = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (header, data, b"IEND")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_huge_images_raise_user_error(tmp_path, recwarn):
    (tmp_path / "a.png").write_bytes(bomb(50_000))
    with pytest.raises(UserError, match=r"a\.png.* more than 178 million pixels"):
        open_image(tmp_path / "a.png")
    assert not recwarn.list


def test_large_images_are_read_without_a_warning(tmp_path, monkeypatch, recwarn, image):
    save_png(image, tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", image[..., 0].size - 1)
    assert open_image(tmp_path / "a.png").size == (32, 24)
    assert not recwarn.list


def test_transparent_parts_become_white(tmp_path):
    Image.new("RGBA", (4, 4), (200, 0, 0, 0)).save(tmp_path / "a.png")
    assert (load_image(tmp_path / "a.png") == 1).all()


def test_the_exif_rotation_is_applied(tmp_path, image):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(image).save(tmp_path / "a.jpg", exif=exif)
    assert load_image(tmp_path / "a.jpg").shape == (1, 3, 32, 24)


@pytest.mark.parametrize("content", [None, b"", b"hello", b"\x89PNG\r\n\x1a\n1234"])
def test_a_file_that_is_not_an_image_raises_user_error(tmp_path, content):
    path = tmp_path / "a.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.png"):
        load_image(path)


def test_a_truncated_image_raises_user_error(tmp_path, image):
    save_png(image, tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="cannot read the image"):
        load_image(tmp_path / "a.png")


def test_numbers_continue_after_the_highest(tmp_path):
    assert next_index(tmp_path / "absent") == 0
    for name in ("0000.png", "0007.png", "grid-0012.png", "a0099.png", "0050.jpg"):
        (tmp_path / name).touch()
    assert next_index(tmp_path) == 8 and next_index(tmp_path, "grid-") == 13


def test_text_is_black_on_white_and_wraps():
    x = log_txt_as_img((64, 40), ["", "a", "many words that will not fit on one line of so few pixels"])
    assert x.shape == (3, 3, 40, 64) and x.min() >= -1 and x.max() <= 1
    assert (x[0] == 1).all()
    assert (x[1] < 0).any() and (x[1, :, 15:] == 1).all()
    assert (x[2, :, 15:] < 0).any()


def test_boxes_have_outlines_and_labels():
    image = to_uint8(draw_boxes((40, 20), [(0.25, 0.0, 0.5, 1.0), (0.75, 0.0, 0.75, 0.5)], ["", ""]))
    assert image.shape == (20, 40, 3)
    outlined = (image != 255).any(axis=-1)
    expected = np.zeros((20, 40), bool)
    expected[:, [10, 20]] = expected[[0, 19], 10:21] = True  # 0.25 and 0.5 of 39, rounded
    expected[:11, 29] = True
    assert (outlined == expected).all()
    cat, dog = (to_uint8(draw_boxes((80, 40), [(0, 0, 1, 1)], [label])) for label in ("cat", "dog"))
    assert (cat != dog).any() and (cat[16:] == dog[16:]).all()


def test_equal_labels_have_one_colour_and_boxes_are_cut_at_the_border():
    image = to_uint8(draw_boxes((60, 60), [(0, 0, 0.2, 1), (0.4, 0, 0.6, 1), (0.8, -1, 3, 5)], ["a", "b", "a"]))
    first, second, third = (tuple(image[30, column]) for column in (0, 24, 47))
    assert first == third != second
    assert (image[30, 59] == 255).all(), "its right edge lies outside"


def test_transparency_is_kept_on_request(tmp_path):
    Image.new("RGBA", (2, 2), (10, 20, 30, 40)).save(tmp_path / "x.png")
    Image.new("RGB", (2, 2)).save(tmp_path / "y.png")
    assert open_image(tmp_path / "x.png", keep_alpha=True).getpixel((0, 0)) == (10, 20, 30, 40)
    assert open_image(tmp_path / "y.png", keep_alpha=True).mode == "RGB"


def test_large_images_are_averaged_down():
    image = np.zeros((40, 20, 3), np.uint8)
    image[:, ::2] = 100
    small = shrink(image, 20)
    assert small.shape == (20, 10, 3) and (small == 50).all()
    assert shrink(image, 40) is image
