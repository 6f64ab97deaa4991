"""The library and the commands sample the same images, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from library_tasks import half_mask, random_images
from PIL import Image
from task_checks import pixels
from tiny_models import class_config, inpainting_config, superresolution_config, text_config, write_model

import ldm
from ldm.cli.main import main

IMAGES = random_images(3, 20, 12)
OPTIONS = {"progress": False, "output_type": "numpy"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Return a folder with models, and with images and a mask."""
    base = tmp_path_factory.mktemp("agreement")
    configs = {"text": text_config(), "classes": class_config(11, cond_dropout=0.1)}
    configs |= {"inpaint": inpainting_config(), "superres": superresolution_config()}
    for name, config in configs.items():
        write_model(base / name, config)
    (base / "images").mkdir()
    (base / "pairs").mkdir()
    for i, image in enumerate(IMAGES):
        for folder in ("images", "pairs"):
            Image.fromarray(image).save(base / folder / f"{i}.png")
        Image.fromarray(half_mask(20, 12)).save(base / "pairs" / f"{i}_mask.png")
    return base


def run(command, *words) -> None:
    assert main([command, *map(str, words), "--skip_grid"]) == 0


def assert_equal(folder, images) -> None:
    paths = sorted(path for path in folder.rglob("*.png"))
    assert len(paths) == len(images) > 0
    for path, image in zip(paths, images, strict=True):
        assert (pixels(path) == image).all(), path


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ([], {}),
        (["--ddim_steps", 14], {"steps": 14}),  # enough to pack the weights
        (["--dpm", "--negative_prompt", "fox"], {"sampler": "dpm", "negative_prompt": "fox"}),
        (["--ddim_eta", 1, "--scale", 1], {"eta": 1.0, "scale": 1.0}),
        (["--H", 24, "--W", 8], {"height": 24, "width": 8}),
    ],
    ids=str,
)
def test_txt2img(base, tmp_path, words, options):
    words = ["--ddim_steps", 3, *words]
    run(
        "txt2img",
        "--model",
        base / "text",
        "--prompt",
        "rocket",
        "--n_samples",
        3,
        "--seed",
        7,
        "--outdir",
        tmp_path,
        *words,
    )
    model = ldm.load(base / "text", device="cpu")
    options = {"steps": 3, "batch_size": 3, **OPTIONS, **options}
    assert_equal(tmp_path, ldm.text_to_image(model, 3 * ["rocket"], seed=7, **options))


@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_img2img(base, tmp_path, strength):
    fixed = ["--model", base / "text", "--image", base / "images", "--prompt", "rocket", "--n_samples", 1]
    run("img2img", *fixed, "--strength", strength, "--steps", 5, "--seed", 7, "--outdir", tmp_path, "--batch_size", 2)
    model = ldm.load(base / "text", device="cpu")
    options = {"strength": strength, "steps": 5, "seed": 7, "batch_size": 2, **OPTIONS}
    assert_equal(tmp_path, ldm.image_to_image(model, IMAGES, "rocket", **options))


@pytest.mark.parametrize(
    ("words", "options"),
    [([], {}), (["--tile", 8, "--feather", 2, "--eta", 1], {"tile": 8, "feather": 2, "eta": 1.0})],
    ids=str,
)
def test_inpaint(base, tmp_path, words, options):
    fixed = ["--model", base / "inpaint", "--indir", base / "pairs", "--steps", 3, "--seed", 7, "--batch_size", 3]
    run("inpaint", *fixed, "--outdir", tmp_path, *words)
    model = ldm.load(base / "inpaint", device="cpu")
    options = {"steps": 3, "seed": 7, **OPTIONS, **options}
    assert_equal(
        tmp_path, ldm.inpaint(model, [Image.fromarray(image) for image in IMAGES], half_mask(20, 12), **options)
    )


@pytest.mark.parametrize(
    ("words", "options"),
    [([], {}), (["--tile", 0, "--eta", 0], {"tile": 0, "eta": 0.0}), (["--plms"], {"sampler": "plms"})],
    ids=str,
)
def test_superres(base, tmp_path, words, options):
    fixed = ["--model", base / "superres", "--indir", base / "images", "--steps", 3, "--seed", 7, "--batch_size", 3]
    run("superres", *fixed, "--outdir", tmp_path, *words)
    model = ldm.load(base / "superres", device="cpu")
    assert_equal(tmp_path, ldm.super_resolve(model, IMAGES, **{"steps": 3, "seed": 7, **OPTIONS, **options}))


def test_class2img(base, tmp_path):
    fixed = ["--model", base / "classes", "--classes", "3", "5", "--n_samples", 2, "--steps", 3, "--seed", 7]
    run("class2img", *fixed, "--outdir", tmp_path)
    model = ldm.load(base / "classes", device="cpu")
    assert_equal(tmp_path, ldm.class_to_image(model, [3, 3, 5, 5], steps=3, seed=7, batch_size=2, **OPTIONS))


def test_defaults_of_the_guidance_scale_agree(base, tmp_path):
    run(
        "txt2img",
        "--model",
        base / "text",
        "--prompt",
        "fox",
        "--n_samples",
        1,
        "--ddim_steps",
        2,
        "--seed",
        7,
        "--outdir",
        tmp_path,
    )
    (image,) = ldm.text_to_image(ldm.load(base / "text", device="cpu"), "fox", steps=2, seed=7, progress=False)
    assert_equal(tmp_path, [np.asarray(image)])
