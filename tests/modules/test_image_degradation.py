"""Tests of the degradations against closed forms, kornia and Pillow, and of the two random pipelines."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.emoji import compose, load_drawings
from ldm.modules.image_degradation import degradation_fn_bsr, degradation_fn_bsr_light
from ldm.modules.image_degradation.bsrgan import FULL, LIGHT, Recipe, degrade
from ldm.modules.image_degradation.kernels import anisotropic, blur, gaussian_kernel, isotropic
from ldm.modules.image_degradation.ops import (
    NOISE_KINDS,
    RESIZE_METHODS,
    from_pixels,
    gaussian_noise,
    jpeg,
    resize,
    to_pixels,
)


def emoji_image(index=700, size=128):
    """Return an emoji on an orange background, (size, size, 3) uint8."""
    return ((compose(load_drawings(size).rgba[index], "orange", size=size) + 1) * 127.5).astype(np.uint8)


def moments(kernel):
    """Return the mean (2,) and covariance (2, 2) of a kernel, relative to its centre."""
    half = len(kernel) // 2
    points = np.stack(np.meshgrid(*[np.arange(-half, half + 1)] * 2, indexing="ij"), -1).reshape(-1, 2)
    mass = kernel.reshape(-1, 1)
    mean = (mass * points).sum(0)
    return mean, ((points - mean) * mass).T @ (points - mean)


# -- kernels ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "covariance", [isotropic(1.3), isotropic(2.8), anisotropic(0.0, (8.0, 0.5)), anisotropic(2.1, (6.0, 1.5))]
)
@pytest.mark.parametrize("shift", [0.0, 1.5])
def test_kernels_have_sum_one_and_the_given_covariance(covariance, shift):
    kernel = gaussian_kernel(41, covariance, shift)
    mean, spread = moments(kernel)
    assert kernel.sum() == pytest.approx(1, abs=1e-12)
    assert mean == pytest.approx([shift, shift], abs=1e-3)
    assert spread.flatten() == pytest.approx(covariance.flatten(), rel=1e-2, abs=1e-3)


@pytest.mark.parametrize(("size", "deviation"), [(7, 0.6), (13, 1.7), (21, 2.8)])
def test_isotropic_kernels_match_kornia(size, deviation):
    from kornia.filters import get_gaussian_kernel2d

    expected = get_gaussian_kernel2d((size, size), (deviation, deviation), dtype=torch.float64)[0]
    assert gaussian_kernel(size, isotropic(deviation)) == pytest.approx(expected.numpy(), abs=1e-12)


@pytest.mark.parametrize("size", [7, 21])
def test_blur_matches_kornia(size):
    from kornia.filters import filter2d

    image = from_pixels(emoji_image())
    kernel = gaussian_kernel(size, anisotropic(0.7, (6.0, 1.5)), shift=0.5)
    x = torch.from_numpy(image).permute(2, 0, 1)[None]
    expected = filter2d(x, torch.from_numpy(kernel)[None], border_type="reflect")[0].permute(1, 2, 0)
    assert blur(image, kernel) == pytest.approx(expected.numpy(), abs=1e-6)


def test_axes_of_an_anisotropic_kernel_follow_the_angle():
    assert anisotropic(0.0, (8.0, 0.5)).flatten() == pytest.approx([8.0, 0, 0, 0.5])
    assert anisotropic(np.pi / 2, (8.0, 0.5)).flatten() == pytest.approx([0.5, 0, 0, 8.0])
    covariance = anisotropic(0.7, (5.0, 2.0))
    axis = np.array([np.cos(0.7), np.sin(0.7)])
    assert covariance @ axis == pytest.approx(5.0 * axis)
    assert isotropic(2.0) == pytest.approx(anisotropic(1.0, (4.0, 4.0)))


def test_narrow_kernels_preserve_images_and_all_kernels_preserve_constants():
    image = from_pixels(emoji_image())
    assert blur(image, gaussian_kernel(7, isotropic(0.05))) == pytest.approx(image, abs=1e-6)
    constant = np.full((10, 9, 3), 0.3, np.float32)
    assert blur(constant, gaussian_kernel(21, anisotropic(1.0, (8.0, 2.0)))) == pytest.approx(constant, abs=1e-6)


def test_blurred_impulse_is_the_kernel():
    impulse = np.zeros((15, 15, 3), np.float32)
    impulse[7, 7, 1] = 1.0
    kernel = gaussian_kernel(7, anisotropic(0.4, (3.0, 1.0)), shift=0.5)
    blurred = blur(impulse, kernel)
    assert blurred[4:11, 4:11, 1] == pytest.approx(kernel[::-1, ::-1], abs=1e-7)
    assert not blurred[..., [0, 2]].any()


# -- resizing, noise, compression ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", RESIZE_METHODS)
def test_resize_preserves_the_range_and_constant_images(method):
    resized = resize(from_pixels(emoji_image(size=64)), (13, 21), method)
    assert resized.shape == (13, 21, 3) and resized.dtype == np.float32
    assert resized.min() >= 0 and resized.max() <= 1
    assert resize(np.full((20, 30, 3), 0.3, np.float32), (7, 50), method) == pytest.approx(0.3, abs=1e-5)


@pytest.mark.parametrize(
    ("method", "size"),
    [
        *((method, size) for method in ("nearest", "bilinear", "bicubic") for size in ((13, 21), (70, 100), (16, 32))),
        ("area", (16, 32)),
        ("area", (32, 64)),
    ],
)
def test_resize_matches_kornia(method, size):
    import kornia

    """In double precision: positions between pixels lose digits in single precision."""
    image = from_pixels(emoji_image(size=64))
    align_corners = False if method in ("bilinear", "bicubic") else None
    x = torch.from_numpy(image).permute(2, 0, 1).double()
    expected = kornia.geometry.resize(x, size, method, align_corners=align_corners).clamp(0, 1).permute(1, 2, 0)
    assert resize(image, size, method) == pytest.approx(expected.numpy(), abs=5e-7)


def test_area_averages_blocks_and_nearest_takes_their_first_pixel():
    image = from_pixels(emoji_image(size=64))
    assert resize(image, (16, 16), "area") == pytest.approx(image.reshape(16, 4, 16, 4, 3).mean(axis=(1, 3)), abs=1e-6)
    assert np.array_equal(resize(image, (16, 16), "nearest"), image[::4, ::4])


def weights_of(method, old, new):
    """Return the weights (new, old) of a method along one axis, from impulses on grey, which are not clipped."""
    rows = 0.25 + 0.5 * np.eye(old, dtype=np.float32)
    columns = [resize(np.tile(row[:, None, None], (1, 3, 3)), (new, 3), method)[:, 0, 0] for row in rows]
    return (np.stack(columns, axis=1) - 0.25) / 0.5


def test_lanczos_weights_match_the_formula():
    weights = weights_of("lanczos", 40, 20)  # sampled between two pixels: distances 0.5 to 3.5 on both sides
    distances = np.arange(8) - 3.5
    formula = np.sinc(distances) * np.sinc(distances / 4)
    assert weights[10, 17:25] == pytest.approx(formula / formula.sum(), abs=2e-6)
    assert weights.sum(axis=1) == pytest.approx(np.ones(20), abs=1e-5)
    assert weights_of("lanczos", 9, 9) == pytest.approx(np.eye(9), abs=2e-6)


@pytest.mark.parametrize(("old", "new"), [(64, 13), (100, 21), (30, 20), (9, 8), (40, 20)])
def test_area_weights_are_the_shares_of_pixels(old, new):
    """A new pixel covers old / new pixels; one that it covers in part counts in part, as published."""
    edges = np.arange(new + 1) * old / new
    covered = np.minimum(edges[1:, None], np.arange(1, old + 1)) - np.maximum(edges[:-1, None], np.arange(old))
    assert weights_of("area", old, new) == pytest.approx(covered.clip(0) * new / old, abs=5e-6)


@pytest.mark.parametrize("method", RESIZE_METHODS)
def test_pixels_are_resized_as_floats_are(method):
    """OpenCV computes with pixels in fixed-point numbers, whose results are at most one level away."""
    image = emoji_image(size=64)
    resized = resize(image, (13, 21), method)
    assert resized.dtype == np.uint8
    floats = resize(from_pixels(image), (13, 21), method) * 255
    assert np.abs(resized - floats).max() < 1


@pytest.mark.parametrize("kind", NOISE_KINDS)
def test_noise_has_the_covariance_of_its_kind(kind):
    level = 0.05
    constant = np.full((200, 200, 3), 0.5, np.float32)
    noise = (gaussian_noise(constant, level, kind, np.random.default_rng(0)) - constant).reshape(-1, 3)
    covariance = np.cov(noise.T) / level**2
    # 40,000 samples: the standard error of a variance is 0.007.
    assert noise.mean() == pytest.approx(0, abs=0.001)
    if kind == "colour":
        assert covariance == pytest.approx(np.eye(3), abs=0.035)
    elif kind == "gray":
        assert covariance == pytest.approx(np.ones((3, 3)), abs=0.035)
    else:
        variances = np.linalg.eigvalsh(covariance)
        rng = np.random.default_rng(0)
        rng.standard_normal(constant.shape)
        rng.standard_normal((3, 3))
        assert variances == pytest.approx(np.sort(rng.uniform(size=3)), abs=0.035)
        assert np.abs(covariance - np.diag(np.diag(covariance))).max() > 0.05, "channels are correlated"


@pytest.mark.parametrize("quality", [30, 80, 95])
def test_jpeg_matches_pillow(quality):
    pixels = emoji_image()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    assert np.array_equal(to_pixels(jpeg(from_pixels(pixels), quality)), np.asarray(Image.open(file)))


def test_pixel_conversion_is_lossless():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.array_equal(to_pixels(from_pixels(levels)), levels)


# -- pipelines -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [degradation_fn_bsr, degradation_fn_bsr_light])
@pytest.mark.parametrize(
    ("shape", "sf", "expected"), [((64, 96), 4, (16, 24)), ((67, 65), 2, (33, 32)), ((9, 8), 4, (2, 2))]
)
def test_results_are_reduced_by_the_scale_factor(function, shape, sf, expected):
    image = emoji_image()[: shape[0], : shape[1]]
    for seed in range(8):
        result = function(image=image, sf=sf, rng=np.random.default_rng(seed))["image"]
        assert result.shape == (*expected, 3) and result.dtype == np.uint8


@pytest.mark.parametrize("function", [degradation_fn_bsr, degradation_fn_bsr_light])
def test_results_are_seeded(function):
    image = emoji_image()
    before = image.copy()
    by_rng = [function(image, rng=np.random.default_rng(seed))["image"] for seed in (1, 1, 2)]
    assert np.array_equal(by_rng[0], by_rng[1]) and not np.array_equal(by_rng[0], by_rng[2])
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)  # torch's global generator seeds the default generator
        results += [function(image)["image"], function(image)["image"]]
    assert np.array_equal(results[0], results[2]) and np.array_equal(results[1], results[3])
    assert not np.array_equal(results[0], results[1]) and not np.array_equal(results[0], results[4])
    assert np.array_equal(image, before)


def psnr(a, b):
    return -10 * np.log10(np.square(from_pixels(a) - from_pixels(b)).mean())


def test_light_degradation_is_milder():
    image = emoji_image()
    reference = np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC))
    scores = {
        recipe: [psnr(degrade(image, recipe, 4, np.random.default_rng(seed)), reference) for seed in range(40)]
        for recipe in (FULL, LIGHT)
    }
    full, light = (np.array(scores[recipe]) for recipe in (FULL, LIGHT))
    error = np.sqrt(full.var() / 40 + light.var() / 40)
    assert light.mean() > full.mean() + 4 * error
    assert full.mean() > 12, "the image content is preserved without a shift"


def test_downsampling_does_not_shift_the_image():
    """Degrade a ramp without blur and noise; a shift by half a pixel would change it by 1.3 levels."""
    ramp = np.tile(np.linspace(40, 200, 64)[None, :, None], (64, 1, 3)).round().astype(np.uint8)
    expected = ramp.reshape(16, 4, 16, 4, 3).mean(axis=(1, 3))
    recipe = Recipe(blur=1.0, blur_share=0.0, noise=(0, 0), jpeg=(95, 95))
    for seed in range(40):
        result = degrade(ramp, recipe, 4, np.random.default_rng(seed)).astype(float)
        # Compression changes some pixels by one level, and the mean by less.
        assert (result - expected)[4:-4, 4:-4].mean() == pytest.approx(0, abs=0.6), seed


@pytest.mark.parametrize(
    "image", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8), np.zeros((8, 8, 3), np.float32)]
)
def test_other_shapes_and_dtypes_raise_value_error(image):
    with pytest.raises(ValueError, match=r"needs an image \(H, W, 3\) of uint8"):
        degradation_fn_bsr(image)


def test_too_small_image_raises_value_error():
    with pytest.raises(ValueError, match="8 × 3 pixels cannot be reduced by a factor of 4"):
        degradation_fn_bsr(np.zeros((3, 8, 3), np.uint8))
