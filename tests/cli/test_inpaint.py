"""Tests of the command `inpaint` with a tiny model."""

from __future__ import annotations

import json
import os
import shlex
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from task_checks import pixels, run_without_torch
from tiny_models import inpainting_config, write_model

from ldm.cli import replay
from ldm.cli.inpaint import Inpaint, main
from ldm.cli.options import sampler_settings
from ldm.config.instantiate import instantiate_from_config
from ldm.config.model_config import read_config
from ldm.config.model_info import ModelInfo
from ldm.errors import UserError
from ldm.io.images import save_png
from ldm.pipelines import loading, sampling
from ldm.pipelines.inpainting import edge_weights
from ldm.pipelines.loading import for_inference

TASK = Inpaint()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    write_model(folder, inpainting_config())
    return folder


@pytest.fixture
def fill(model, tmp_path):
    """Return a function that runs the command on `in`, or on the inputs of the options, and returns its exit status."""

    def run(*options: object, outdir: str = "out") -> int:
        fixed = ["--model", model, "--steps", 2, "--seed", 1, "--outdir", tmp_path / outdir]
        source = [] if "--image" in options or "--indir" in options else ["--indir", tmp_path / "in"]
        return main([str(each) for each in (*fixed, *source, *options)])

    return run


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


def make_image(height: int = 12, width: int = 10, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8))


def half(height: int = 12, width: int = 10) -> Image.Image:
    """Return a mask of the left half."""
    mask = np.zeros((height, width), np.uint8)
    mask[:, : width // 2] = 255
    return Image.fromarray(mask)


def assert_kept(result: np.ndarray, image: np.ndarray) -> None:
    """Assert that the right half of the result is that of the image, and that the left half differs."""
    middle = image.shape[1] // 2
    assert result.shape == image.shape
    assert (result[:, middle:] == image[:, middle:]).all()
    assert (result[:, :middle] != image[:, :middle]).mean() > 0.5


@pytest.mark.parametrize("size", [(12, 10), (16, 16), (1, 7), (33, 5)])
def test_unmasked_pixels_are_returned_bit_for_bit(fill, folder, tmp_path, size):
    make_image(*size).save(folder / "x.png")
    half(*size).save(folder / "x_mask.png")
    assert fill() == 0
    assert_kept(pixels(tmp_path / "out" / "x.png"), np.asarray(make_image(*size)))
    with Image.open(tmp_path / "out" / "x.png") as file:
        assert file.text["task"] == "inpaint" and file.text["seed"] == "1" and file.text["steps"] == "2"


def test_conditioning_is_the_published_one(fill, folder, monkeypatch):
    """The conditioning is the latents of the masked image, then the mask as -1 and 1 at their size; no guidance."""
    make_image(8, 8).save(folder / "x.png")
    half(8, 8).save(folder / "x_mask.png")
    seen = {}

    def sample(model, shape, **options):
        seen.update(model=model, **options)
        return torch.zeros(shape)

    monkeypatch.setattr(sampling, "sample_latents", sample)
    assert fill() == 0
    image = torch.from_numpy(np.array(make_image(8, 8))).permute(2, 0, 1)[None] / 127.5 - 1
    image[..., :4] = -1
    mode = seen["model"].first_stage_model.encode(image).mode()
    torch.testing.assert_close(seen["cond"][:, :3], mode, rtol=1e-5, atol=1e-5)
    assert seen["cond"][0, 3].tolist() == [[1.0, 1.0, -1.0, -1.0]] * 4
    assert seen["scale"] == 1 and seen["uncond"] is None and seen["sampler"] == "ddim"


@pytest.mark.parametrize("options", [(), ("--eta", 1), ("--plms",), ("--dpm",), ("--tile", 8)], ids=str)
def test_image_does_not_depend_on_the_batch_size(fill, folder, tmp_path, options):
    for i in range(8):
        make_image(seed=i).save(folder / f"{i}.png")
        half().save(folder / f"{i}_mask.png")
    for size in (1, 3, 8):
        assert fill("--batch_size", size, *options, outdir=f"b{size}") == 0
    for i in range(8):
        alone, three, eight = (pixels(tmp_path / f"b{size}" / f"{i}.png") for size in (1, 3, 8))
        assert np.abs(alone - three).max() <= 1 and np.abs(alone - eight).max() <= 1


def test_replay_is_identical_and_refuses_changed_files(fill, folder, tmp_path, capsys):
    for i in range(3):
        make_image(seed=i).save(folder / f"{i}.png")
        half().save(folder / f"{i}_mask.png")
    assert fill("--eta", 0.5, "--batch_size", 2, "--feather", 2, "--n_samples", 2) == 0
    results = [str(tmp_path / "out" / f"{i}-{j}.png") for i in range(3) for j in range(2)]
    assert replay.main(results) == 0
    assert (pixels(results[0]) != pixels(results[1])).any()
    half().rotate(180).save(folder / "0_mask.png")
    assert replay.main(results[:1]) == 2
    assert "has changed since the image was sampled" in capsys.readouterr().err


def test_mask_of_a_single_image(fill, tmp_path):
    """The mask is named, is beside the image, or is the transparency of the image."""
    make_image().save(tmp_path / "photo.jpg", quality=95)
    half().save(tmp_path / "other.webp", lossless=True)
    assert fill("--image", tmp_path / "photo.jpg", "--mask", tmp_path / "other.webp", outdir="a") == 0
    half().save(tmp_path / "photo_mask.png")
    assert fill("--image", tmp_path / "photo.jpg", outdir="b") == 0
    (tmp_path / "alone").mkdir()
    (tmp_path / "photo.jpg").rename(tmp_path / "alone" / "photo")  # Pillow recognises the format by its content
    assert fill("--image", tmp_path / "alone" / "photo", "--mask", tmp_path / "other.webp", outdir="d") == 0
    assert fill("--image", tmp_path / "alone" / "photo", outdir="e") == 2
    image = np.asarray(Image.open(tmp_path / "alone" / "photo"))
    assert_kept(pixels(tmp_path / "a" / "photo.png"), image)
    assert (pixels(tmp_path / "a" / "photo.png") == pixels(tmp_path / "b" / "photo.png")).all()
    own = make_image().convert("RGBA")
    own.putalpha(half().point(lambda v: 255 - v))
    own.save(tmp_path / "own.png")
    assert fill("--image", tmp_path / "own.png", outdir="c") == 0
    assert_kept(pixels(tmp_path / "c" / "own.png"), np.asarray(make_image()))


def exif_rotated(path):
    image = make_image().transpose(Image.Transpose.ROTATE_90)  # a camera's sensor; a clockwise turn restores it
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(path, exif=exif, format="PNG")


def sixteen_bits(path):
    values = np.arange(120).reshape(12, 10) * 257
    Image.fromarray(values.astype(np.uint16)).save(path, format="PNG")


def animated(path):
    make_image().save(path, format="PNG", save_all=True, append_images=[make_image(seed=1)], duration=50)


FORMATS = {
    "rotated by the camera": (exif_rotated, lambda path: np.asarray(make_image())),
    "16 bits": (sixteen_bits, lambda path: np.repeat(np.arange(120).reshape(12, 10, 1), 3, 2)),
    "animated": (animated, lambda path: np.asarray(make_image())),
    "CMYK": (
        lambda path: make_image().convert("CMYK").save(path, format="TIFF"),
        lambda path: np.asarray(Image.open(path).convert("RGB")),
    ),
    "palette": (
        lambda path: make_image().quantize(16).save(path, format="PNG"),
        lambda path: np.asarray(Image.open(path).convert("RGB")),
    ),
    "grey": (
        lambda path: half().save(path, format="PNG"),
        lambda path: np.asarray(half().convert("RGB")),
    ),
}


@pytest.mark.parametrize("case", FORMATS)
def test_every_kind_of_image_is_read(fill, folder, tmp_path, case):
    write, expected = FORMATS[case]
    write(folder / "x.png")
    half().convert("P").save(folder / "x_mask.png")
    assert fill("--skip_grid") == 0
    assert_kept(pixels(tmp_path / "out" / "x.png"), expected(folder / "x.png"))


def test_strokes_on_a_transparent_mask_are_filled(fill, folder, tmp_path):
    make_image().save(folder / "x.png")
    mask = Image.new("RGBA", (10, 12), (255, 255, 255, 0))
    mask.paste((255, 255, 255, 255), (0, 0, 5, 12))
    mask.save(folder / "x_mask.png")
    assert fill() == 0
    assert_kept(pixels(tmp_path / "out" / "x.png"), np.asarray(make_image()))


def bomb(path):
    """Write a PNG file whose header claims 50,000 × 50,000 pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")))


def truncated(path):
    make_image(64, 64).save(path)
    path.write_bytes(path.read_bytes()[:2000])


BAD = {
    "no mask": (lambda d: (d / "x_mask.png").unlink(), "x.png", "has no mask"),
    "no image": (lambda d: (d / "x.png").unlink(), "x_mask.png", "has no image beside it"),
    "sizes": (lambda d: half(5, 5).save(d / "x_mask.png"), "x_mask.png", "5 × 5 pixels"),
    "black": (lambda d: Image.new("L", (10, 12)).save(d / "x_mask.png"), "x_mask.png", "nothing to fill"),
    "no image file": (lambda d: (d / "x.png").write_text("text"), "x.png", "cannot read"),
    "no mask file": (lambda d: (d / "x_mask.png").write_bytes(b""), "x_mask.png", "cannot read"),
    "truncated": (lambda d: truncated(d / "x.png"), "x.png", "truncated"),
    "bomb": (lambda d: bomb(d / "x.png"), "x.png", "million pixels"),
}


@pytest.mark.parametrize("case", BAD)
def test_invalid_pair_is_one_line_and_the_others_are_filled(fill, folder, tmp_path, caplog, capsys, case):
    spoil, name, message = BAD[case]
    for stem in ("a", "x", "z"):
        make_image().save(folder / f"{stem}.png")
        half().save(folder / f"{stem}_mask.png")
    spoil(folder)
    assert fill() == 2
    (error,) = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert name in error and message in error and "\n" not in error
    assert "Traceback" not in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "grid-0000.png", "z.png"]


def test_white_mask_logs_a_warning(fill, folder, tmp_path, caplog):
    make_image().save(folder / "x.png")
    Image.new("L", (10, 12), 255).save(folder / "x_mask.png")
    assert fill() == 0
    assert "the model sees nothing" in caplog.text and (tmp_path / "out" / "x.png").is_file()


OPTIONS = {
    "nothing": ([], "give either --indir"),
    "both": (["--indir", "{in}", "--image", "x.png"], "give either --indir"),
    "mask without image": (["--indir", "{in}", "--mask", "m.png"], "--mask belongs to --image"),
    "no folder": (["--indir", "nowhere"], "there is no such folder"),
    "empty folder": (["--indir", "{tmp}"], "holds no images"),
    "outdir": (["--indir", "{in}", "--outdir", "{in}"], "is the folder of the input"),
    "tile": (["--indir", "{in}", "--tile", "9"], "tile 9 is not a multiple of 4"),
    "small tile": (["--indir", "{in}", "--tile", "4"], "tile 4 is too small for this model; give 8 or more"),
    "steps": (["--indir", "{in}", "--steps", "101"], "more than the model's 100"),
    "eta": (["--indir", "{in}", "--plms", "--eta", "1"], 'sampler "plms" is deterministic; eta must be 0'),
    "text model": (
        ["--indir", "{in}", "--model", "emoji64"],
        '"caption", not on "masked_image"; choose an in-painting model',
    ),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_invalid_option_is_one_line(model, folder, tmp_path, capsys, monkeypatch, case):
    options, message = OPTIONS[case]
    make_image().save(folder / "x.png")
    monkeypatch.setattr(loading, "load_files", None)  # not reached
    options = [option.format(**{"in": folder, "tmp": tmp_path}) for option in options]
    fixed = [] if "--model" in options else ["--model", str(model)]
    assert main([*fixed, "--outdir", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error and not (tmp_path / "out").exists()


def test_images_that_differ_in_their_suffix_have_separate_results(fill, folder, tmp_path):
    make_image().save(folder / "x.png")
    make_image(seed=1).save(folder / "x.webp", lossless=True)
    half().save(folder / "x_mask.png")
    assert fill("--skip_grid") == 0
    for name, seed in (("x.png.png", 0), ("x.webp.png", 1)):
        assert_kept(pixels(tmp_path / "out" / name), np.asarray(make_image(seed=seed)))


def test_name_that_is_not_valid_text_is_escaped(fill, folder, tmp_path):
    """File systems accept any bytes; the text of a PNG file does not."""
    name = os.fsdecode(b"p\xff")
    try:
        make_image().save(folder / f"{name}.png")
    except OSError:
        pytest.skip("this file system accepts only text")
    half().save(folder / f"{name}_mask.png")
    assert fill("--skip_grid") == 0
    (result,) = (tmp_path / "out").iterdir()
    with Image.open(result) as file:
        assert result.name == f"{name}.png" and file.text["image"].endswith("p\\udcff.png")
        assert json.loads(file.text["ldm"])["inputs"]["image"].endswith(f"{name}.png")


def test_results_replace_earlier_ones(fill, folder, tmp_path):
    make_image().save(folder / "x.png")
    half().save(folder / "x_mask.png")
    for seed in (1, 2):
        assert fill("--skip_grid", "--seed", seed) == 0
    (result,) = (tmp_path / "out").iterdir()
    with Image.open(result) as file:
        assert result.name == "x.png" and file.text["seed"] == "2"


def test_grid_shows_the_mask_and_the_result(fill, folder, tmp_path):
    make_image().save(folder / "x.png")
    half().save(folder / "x_mask.png")
    assert fill() == 0
    grid = pixels(tmp_path / "out" / "grid-0000.png")
    assert grid.shape == (12 + 4, 2 * 12 + 2, 3)
    assert (grid[2:14, 2:7] == 255).all() and (grid[2:14, 14:24] == pixels(tmp_path / "out" / "x.png")).all()


def test_feather_is_inside_the_mask():
    mask = np.zeros((9, 12), bool)
    mask[:, :6] = True
    weights = edge_weights(mask, 3)
    np.testing.assert_allclose(weights[4], [1, 1, 1, 0.75, 0.5, 0.25, 0, 0, 0, 0, 0, 0])
    assert (edge_weights(mask, 0) == mask).all()


def test_published_options_keep_their_defaults(monkeypatch, tmp_path):
    parsed = TASK.make_parser().parse_args([])
    args = {**vars(parsed), **sampler_settings(parsed)}
    assert (args["steps"], args["indir"], args["sampler"], args["eta"], args["n_samples"]) == (50, None, "ddim", 0, 1)
    assert TASK.published == "inpainting_big"
    monkeypatch.setattr("ldm.config.assets.ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="run ldm download_weights inpainting_big"):
        TASK.choose_model(parsed)


PHOTOGRAPHS = "--indir data/inpainting_examples --outdir outputs/inpainting_results --seed 1"


@pytest.mark.parametrize(
    ("line", "images"),
    [
        (TASK.arguments, ["alarm_clock", "octopus", "penguin", "pineapple", "strawberry", "sunflower"]),
        (PHOTOGRAPHS, ["astronaut", "chelsea", "coffee", "rocket"]),
    ],
)
def test_examples_work_as_typed(repo_root, model, tmp_path, monkeypatch, line, images):
    """A tiny model replaces the real one, and small copies replace the images; the command is the script."""
    monkeypatch.chdir(tmp_path)
    options = shlex.split(line)
    folder = Path(options[options.index("--indir") + 1])
    (tmp_path / folder).mkdir(parents=True)
    for path in (repo_root / folder).glob("*.*g"):
        with Image.open(path) as file:  # small ones take less time
            file.resize((33, 21)).save(tmp_path / folder / path.name)
    command = [sys.executable, repo_root / "scripts/inpaint.py", *options, "--model", model, "--steps", "1"]
    done = subprocess.run(command, capture_output=True, text=True, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    results = sorted(path.name for path in (tmp_path / "outputs/inpainting_results").iterdir())
    assert results == sorted(f"{name}.png" for name in [*images, "grid-0000"])


def test_options_are_checked_before_torch_is_imported(model):
    assert run_without_torch("inpaint", "--model", model, "--indir", "nowhere")[0] == 2


@pytest.mark.parametrize(
    ("path", "multiple"), [("models/ldm/inpainting_big/config.yaml", 32), ("configs/emoji/inpaint_64.yaml", 16)]
)
def test_configurations_suit_the_task(repo_root, path, multiple):
    """The networks of the published and the bundled model take the conditioning of the task, at a rectangular size."""
    config = read_config(repo_root / path)
    pipeline = TASK.pipeline(TASK.make_parser().parse_args(["--indir", "x"]), ModelInfo("m", config))
    pipeline.check(ModelInfo("m", config))
    assert pipeline.steps == 50
    with torch.device("meta"):
        model = instantiate_from_config(for_inference(config))
        image, mask = torch.zeros(2, 3, 64, 96), torch.zeros(2, 1, 64, 96)
        conditioning = model.get_learned_conditioning({"masked_image": image, "mask": mask})
        latents = torch.zeros(2, model.channels, 64 // model.downsampling, 96 // model.downsampling)
        assert model.apply_model(latents, torch.zeros(2), conditioning).shape == latents.shape
    assert model.downsampling * model.model.diffusion_model.downsampling == multiple


@pytest.mark.parametrize("name", ["inpaint_64", "superres_64"])
def test_datasets_return_what_the_bundled_models_train_on(repo_root, name):
    config = OmegaConf.to_container(OmegaConf.load(repo_root / f"configs/emoji/{name}.yaml"))
    sizes = {"image": (64, 64, 3), "masked_image": (64, 64, 3), "mask": (64, 64, 1), "LR_image": (16, 16, 3)}
    for part in ("train", "validation"):
        item = instantiate_from_config(config["data"]["params"][part])[7]
        assert {config["model"]["params"]["cond_stage_key"], "image"} <= item.keys()
        assert all(item[key].shape == size for key, size in sizes.items() if key in item)


def test_training_batch_has_the_mask_in_its_conditioning():
    """The network of the published configuration takes seven channels, which include the mask."""
    model = instantiate_from_config(OmegaConf.create(inpainting_config()))
    image, mask = torch.rand(2, 16, 16, 3) * 2 - 1, torch.ones(2, 16, 16, 1)
    batch = {"image": image, "masked_image": torch.where(mask > 0, -1.0, image), "mask": mask}
    _, conditioning = model.get_input(batch, "image")
    assert conditioning.shape == (2, 4, 8, 8) and (conditioning[:, 3] == 1).all()
    assert model.shared_step(batch)[0].isfinite()


# -- masks at the size of the latents --------------------------------------------------------------------------


def thin(height: int = 12, width: int = 10) -> Image.Image:
    """Return a mask of one row, which no latent of 2 × 2 pixels takes."""
    mask = np.zeros((height, width), np.uint8)
    mask[5, 1:9] = 255
    return Image.fromarray(mask)


def lost_masks(caplog) -> list[str]:
    return [record.message.partition(" loses ")[0] for record in caplog.records if " loses " in record.message]


def test_mask_that_is_lost_is_reported_once_with_its_file(fill, folder, caplog):
    for name, mask in (("a", thin()), ("b", half()), ("c", thin())):
        make_image().save(folder / f"{name}.png")
        mask.save(folder / f"{name}_mask.png")
    rgba = np.dstack([np.asarray(make_image()), 255 - np.asarray(thin())])
    Image.fromarray(rgba).save(folder / "d.png")
    assert fill("--n_samples", 2) == 0
    names = [f'the mask "{folder / name}_mask.png"' for name in "ac"]
    assert lost_masks(caplog) == [*names, f'the transparent part of "{folder / "d.png"}"']
    assert any(record.message.endswith("--mask_mode max keeps it") for record in caplog.records)
    caplog.clear()
    assert fill("--mask_mode", "max", outdir="largest") == 0
    assert not lost_masks(caplog)


def test_mask_mode_is_recorded_and_replayed(fill, folder, tmp_path):
    make_image().save(folder / "x.png")
    thin().save(folder / "x_mask.png")
    for mode in ("nearest", "max"):
        assert fill("--mask_mode", mode, outdir=mode) == 0
        with Image.open(tmp_path / mode / "x.png") as file:
            assert file.text["mask_mode"] == mode
        assert replay.main([str(tmp_path / mode / "x.png")]) == 0
    nearest, largest = (pixels(tmp_path / mode / "x.png") for mode in ("nearest", "max"))
    assert (nearest != largest).any()


def test_record_without_a_mask_mode_is_replayed_with_nearest(fill, folder, tmp_path):
    make_image().save(folder / "x.png")
    thin().save(folder / "x_mask.png")
    assert fill() == 0
    path = tmp_path / "out" / "x.png"
    with Image.open(path) as file:
        record, image = json.loads(file.text["ldm"]), np.asarray(file)
    del record["settings"]["mask_mode"]
    save_png(image, path, {"ldm": json.dumps(record)})
    assert replay.main([str(path)]) == 0
