"""The command that fills parts of pictures, run in this process on a tiny model."""

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
from tiny_models import inpainting_config, write_model

from ldm import inference
from ldm.config.instantiate import instantiate_from_config
from ldm.config.model_config import read_config
from ldm.config.model_files import ModelFiles
from ldm.tasks.inpainting import Inpainting, edge_weights

TASK = Inpainting()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    write_model(folder, inpainting_config())
    return folder


@pytest.fixture
def fill(load_script, model, tmp_path):
    """Run the command on `in`, or what the options name, in few steps; returns its exit status."""

    def run(*options: object, outdir: str = "out") -> int:
        fixed = ["--model", model, "--steps", 2, "--seed", 1, "--outdir", tmp_path / outdir]
        source = [] if "--image" in options or "--indir" in options else ["--indir", tmp_path / "in"]
        return load_script("inpaint").main([str(each) for each in (*fixed, *source, *options)])

    return run


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


def picture(height: int = 12, width: int = 10, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8))


def half(height: int = 12, width: int = 10) -> Image.Image:
    """A mask of the left half."""
    mask = np.zeros((height, width), np.uint8)
    mask[:, : width // 2] = 255
    return Image.fromarray(mask)


def pixels(path) -> np.ndarray:
    with Image.open(path) as file:
        return np.asarray(file).astype(int)


def assert_kept(result: np.ndarray, image: np.ndarray) -> None:
    """The right half is the picture's own, the left half another."""
    middle = image.shape[1] // 2
    assert result.shape == image.shape
    assert (result[:, middle:] == image[:, middle:]).all()
    assert (result[:, :middle] != image[:, :middle]).mean() > 0.5


@pytest.mark.parametrize("size", [(12, 10), (16, 16), (1, 7), (33, 5)])
def test_what_is_not_masked_is_returned_bit_for_bit(fill, folder, tmp_path, size):
    picture(*size).save(folder / "x.png")
    half(*size).save(folder / "x_mask.png")
    assert fill() == 0
    assert_kept(pixels(tmp_path / "out" / "x.png"), np.asarray(picture(*size)))
    with Image.open(tmp_path / "out" / "x.png") as file:
        assert file.text["task"] == "inpaint" and file.text["seed"] == "1" and file.text["steps"] == "2"


def test_the_conditioning_is_the_published_one(fill, folder, monkeypatch):
    """The latents of the picture with black in its hole, then the mask as -1 and 1 at their size; no guidance."""
    picture(8, 8).save(folder / "x.png")
    half(8, 8).save(folder / "x_mask.png")
    seen = {}

    def sample(model, shape, settings, conditioning, **rest):
        seen.update(model=model, conditioning=conditioning, settings=settings)
        return torch.zeros(shape)

    monkeypatch.setattr(inference, "sample_latents", sample)
    assert fill() == 0
    image = torch.from_numpy(np.array(picture(8, 8))).permute(2, 0, 1)[None] / 127.5 - 1
    image[..., :4] = -1
    mode = seen["model"].first_stage_model.encode(image).mode()
    torch.testing.assert_close(seen["conditioning"][:, :3], mode, rtol=1e-5, atol=1e-5)
    assert seen["conditioning"][0, 3].tolist() == [[1.0, 1.0, -1.0, -1.0]] * 4
    assert seen["settings"].scale == 1 and seen["settings"].sampler == "ddim"


@pytest.mark.parametrize("options", [(), ("--eta", 1), ("--plms",), ("--dpm",), ("--tile", 8)], ids=str)
def test_a_picture_is_the_same_at_every_batch_size(fill, folder, tmp_path, options):
    for i in range(8):
        picture(seed=i).save(folder / f"{i}.png")
        half().save(folder / f"{i}_mask.png")
    for size in (1, 3, 8):
        assert fill("--batch_size", size, *options, outdir=f"b{size}") == 0
    for i in range(8):
        alone, three, eight = (pixels(tmp_path / f"b{size}" / f"{i}.png") for size in (1, 3, 8))
        assert np.abs(alone - three).max() <= 1 and np.abs(alone - eight).max() <= 1


def test_replaying_is_identical_and_refuses_changed_files(fill, folder, tmp_path, load_script, capsys):
    for i in range(3):
        picture(seed=i).save(folder / f"{i}.png")
        half().save(folder / f"{i}_mask.png")
    assert fill("--eta", 0.5, "--batch_size", 2, "--feather", 2, "--n_samples", 2) == 0
    results = [str(tmp_path / "out" / f"{i}-{j}.png") for i in range(3) for j in range(2)]
    replay = load_script("replay").main
    assert replay(results) == 0
    assert (pixels(results[0]) != pixels(results[1])).any()
    half().rotate(180).save(folder / "0_mask.png")
    assert replay(results[:1]) == 2
    assert "has changed since it was drawn from" in capsys.readouterr().err


def test_one_picture_and_its_mask(fill, tmp_path):
    """Named, beside it, or its own transparency."""
    picture().save(tmp_path / "photo.jpg", quality=95)
    half().save(tmp_path / "other.webp", lossless=True)
    assert fill("--image", tmp_path / "photo.jpg", "--mask", tmp_path / "other.webp", outdir="a") == 0
    half().save(tmp_path / "photo_mask.png")
    assert fill("--image", tmp_path / "photo.jpg", outdir="b") == 0
    (tmp_path / "alone").mkdir()
    (tmp_path / "photo.jpg").rename(tmp_path / "alone" / "photo")  # Pillow looks at what is inside
    assert fill("--image", tmp_path / "alone" / "photo", "--mask", tmp_path / "other.webp", outdir="d") == 0
    assert fill("--image", tmp_path / "alone" / "photo", outdir="e") == 2
    image = np.asarray(Image.open(tmp_path / "alone" / "photo"))
    assert_kept(pixels(tmp_path / "a" / "photo.png"), image)
    assert (pixels(tmp_path / "a" / "photo.png") == pixels(tmp_path / "b" / "photo.png")).all()
    own = picture().convert("RGBA")
    own.putalpha(half().point(lambda v: 255 - v))
    own.save(tmp_path / "own.png")
    assert fill("--image", tmp_path / "own.png", outdir="c") == 0
    assert_kept(pixels(tmp_path / "c" / "own.png"), np.asarray(picture()))


def exif_rotated(path):
    image = picture().transpose(Image.Transpose.ROTATE_90)  # the camera's sensor; turning it clockwise gives picture()
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(path, exif=exif, format="PNG")


def sixteen_bits(path):
    values = np.arange(120).reshape(12, 10) * 257
    Image.fromarray(values.astype(np.uint16)).save(path, format="PNG")


def animated(path):
    picture().save(path, format="PNG", save_all=True, append_images=[picture(seed=1)], duration=50)


FORMATS = {
    "rotated by the camera": (exif_rotated, lambda path: np.asarray(picture())),
    "16 bits": (sixteen_bits, lambda path: np.repeat(np.arange(120).reshape(12, 10, 1), 3, 2)),
    "animated": (animated, lambda path: np.asarray(picture())),
    "CMYK": (
        lambda path: picture().convert("CMYK").save(path, format="TIFF"),
        lambda path: np.asarray(Image.open(path).convert("RGB")),
    ),
    "palette": (
        lambda path: picture().quantize(16).save(path, format="PNG"),
        lambda path: np.asarray(Image.open(path).convert("RGB")),
    ),
    "grey": (
        lambda path: half().save(path, format="PNG"),
        lambda path: np.asarray(half().convert("RGB")),
    ),
}


@pytest.mark.parametrize("case", FORMATS)
def test_every_kind_of_picture_is_read_rightly(fill, folder, tmp_path, case):
    write, expected = FORMATS[case]
    write(folder / "x.png")
    half().convert("P").save(folder / "x_mask.png")
    assert fill("--skip_grid") == 0
    assert_kept(pixels(tmp_path / "out" / "x.png"), expected(folder / "x.png"))


def test_strokes_on_a_transparent_mask_are_what_is_filled(fill, folder, tmp_path):
    picture().save(folder / "x.png")
    mask = Image.new("RGBA", (10, 12), (255, 255, 255, 0))
    mask.paste((255, 255, 255, 255), (0, 0, 5, 12))
    mask.save(folder / "x_mask.png")
    assert fill() == 0
    assert_kept(pixels(tmp_path / "out" / "x.png"), np.asarray(picture()))


def bomb(path):
    """A PNG that claims 50,000 × 50,000 pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")))


def truncated(path):
    picture(64, 64).save(path)
    path.write_bytes(path.read_bytes()[:2000])


BAD = {
    "no mask": (lambda d: (d / "x_mask.png").unlink(), "x.png", "has no mask"),
    "no picture": (lambda d: (d / "x.png").unlink(), "x_mask.png", "has no picture"),
    "sizes": (lambda d: half(5, 5).save(d / "x_mask.png"), "x_mask.png", "5 × 5 pixels"),
    "black": (lambda d: Image.new("L", (10, 12)).save(d / "x_mask.png"), "x_mask.png", "nothing to fill"),
    "no picture file": (lambda d: (d / "x.png").write_text("text"), "x.png", "cannot read"),
    "no mask file": (lambda d: (d / "x_mask.png").write_bytes(b""), "x_mask.png", "cannot read"),
    "truncated": (lambda d: truncated(d / "x.png"), "x.png", "truncated"),
    "bomb": (lambda d: bomb(d / "x.png"), "x.png", "million pixels"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_pair_is_one_line_and_the_others_are_filled(fill, folder, tmp_path, caplog, capsys, case):
    spoil, name, message = BAD[case]
    for stem in ("a", "x", "z"):
        picture().save(folder / f"{stem}.png")
        half().save(folder / f"{stem}_mask.png")
    spoil(folder)
    assert fill() == 2
    (error,) = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert name in error and message in error and "\n" not in error
    assert "Traceback" not in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "grid-0000.png", "z.png"]


def test_an_all_white_mask_is_filled_with_a_warning(fill, folder, tmp_path, caplog):
    picture().save(folder / "x.png")
    Image.new("L", (10, 12), 255).save(folder / "x_mask.png")
    assert fill() == 0
    assert "the model sees nothing" in caplog.text and (tmp_path / "out" / "x.png").is_file()


OPTIONS = {
    "nothing": ([], "give either --indir"),
    "both": (["--indir", "{in}", "--image", "x.png"], "give either --indir"),
    "mask alone": (["--indir", "{in}", "--mask", "m.png"], "--mask belongs to --image"),
    "no folder": (["--indir", "nowhere"], "there is no such folder"),
    "empty folder": (["--indir", "{tmp}"], "holds no .png, .jpg"),
    "outdir": (["--indir", "{in}", "--outdir", "{in}"], "is drawn from; name another"),
    "tile": (["--indir", "{in}", "--tile", "9"], "--tile 9 is not a multiple of 4"),
    "small tile": (["--indir", "{in}", "--tile", "4"], "--tile 4 is too small for this model; give 8 or more"),
    "steps": (["--indir", "{in}", "--steps", "101"], "more than the model's 100"),
    "eta": (["--indir", "{in}", "--plms", "--eta", "1"], "--plms is deterministic"),
    "text model": (["--indir", "{in}", "--model", "emoji64"], 'draws from "caption"'),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_a_bad_option_is_one_line(load_script, model, folder, tmp_path, capsys, monkeypatch, case):
    options, message = OPTIONS[case]
    picture().save(folder / "x.png")
    monkeypatch.setattr(inference, "load_model", None)  # not reached
    options = [option.format(**{"in": folder, "tmp": tmp_path}) for option in options]
    fixed = [] if "--model" in options else ["--model", str(model)]
    assert load_script("inpaint").main([*fixed, "--outdir", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error and not (tmp_path / "out").exists()


def test_pictures_that_differ_in_their_suffix_get_results_of_their_own(fill, folder, tmp_path):
    picture().save(folder / "x.png")
    picture(seed=1).save(folder / "x.webp", lossless=True)
    half().save(folder / "x_mask.png")
    assert fill("--skip_grid") == 0
    for name, seed in (("x.png.png", 0), ("x.webp.png", 1)):
        assert_kept(pixels(tmp_path / "out" / name), np.asarray(picture(seed=seed)))


def test_a_name_that_is_no_text_does_no_harm(fill, folder, tmp_path):
    """File systems take any bytes; a PNG's text does not."""
    name = os.fsdecode(b"p\xff")
    try:
        picture().save(folder / f"{name}.png")
    except OSError:
        pytest.skip("this file system takes text only")
    half().save(folder / f"{name}_mask.png")
    assert fill("--skip_grid") == 0
    (result,) = (tmp_path / "out").iterdir()
    with Image.open(result) as file:
        assert result.name == f"{name}.png" and file.text["image"].endswith("p\\udcff.png")
        assert json.loads(file.text["ldm"])["inputs"]["image"].endswith(f"{name}.png")


def test_results_take_the_place_of_earlier_ones(fill, folder, tmp_path):
    picture().save(folder / "x.png")
    half().save(folder / "x_mask.png")
    for seed in (1, 2):
        assert fill("--skip_grid", "--seed", seed) == 0
    (result,) = (tmp_path / "out").iterdir()
    with Image.open(result) as file:
        assert result.name == "x.png" and file.text["seed"] == "2"


def test_the_sheet_shows_the_hole_and_the_result(fill, folder, tmp_path):
    picture().save(folder / "x.png")
    half().save(folder / "x_mask.png")
    assert fill() == 0
    sheet = pixels(tmp_path / "out" / "grid-0000.png")
    assert sheet.shape == (12 + 4, 2 * 12 + 2, 3)
    assert (sheet[2:14, 2:7] == 255).all() and (sheet[2:14, 14:24] == pixels(tmp_path / "out" / "x.png")).all()


def test_the_feather_is_inside_the_mask():
    mask = np.zeros((9, 12), bool)
    mask[:, :6] = True
    weights = edge_weights(mask, 3)
    np.testing.assert_allclose(weights[4], [1, 1, 1, 0.75, 0.5, 0.25, 0, 0, 0, 0, 0, 0])
    assert (edge_weights(mask, 0) == mask).all()


def test_the_published_options_keep_their_defaults():
    args = vars(TASK.make_parser().parse_args([]))
    assert (args["steps"], args["indir"], args["sampler"], args["eta"], args["n_samples"]) == (50, None, "ddim", 0, 1)
    assert TASK.published == "inpainting_big" and TASK.download.endswith("download_weights.py inpainting_big")


PHOTOGRAPHS = "python scripts/inpaint.py --indir data/inpainting_examples --outdir outputs/inpainting_results --seed 1"


@pytest.mark.parametrize(
    ("line", "pictures"),
    [
        (TASK.example, ["alarm_clock", "octopus", "penguin", "pineapple", "strawberry", "sunflower"]),
        (PHOTOGRAPHS, ["astronaut", "chelsea", "coffee", "rocket"]),
    ],
)
def test_the_examples_work_as_typed(repo_root, model, tmp_path, monkeypatch, line, pictures):
    """With a tiny model in the place of the real one, on small copies of the pictures."""
    monkeypatch.chdir(tmp_path)
    script, *options = shlex.split(line)[1:]
    folder = Path(options[options.index("--indir") + 1])
    (tmp_path / folder).mkdir(parents=True)
    for path in (repo_root / folder).glob("*.*g"):
        with Image.open(path) as file:  # small ones take less time
            file.resize((33, 21)).save(tmp_path / folder / path.name)
    command = [sys.executable, repo_root / script, *options, "--model", model, "--steps", "1"]
    done = subprocess.run(command, capture_output=True, text=True, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    results = sorted(path.name for path in (tmp_path / "outputs/inpainting_results").iterdir())
    assert results == sorted(f"{name}.png" for name in [*pictures, "grid-0000"])


def test_torch_is_not_imported_before_the_options_are_right(repo_root, model):
    code = (
        "import runpy, sys\n"
        "sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as exit: assert exit.code == 2, exit.code\n"
        "assert not {'torch', 'numpy', 'PIL'} & set(sys.modules)\n"
    )
    command = [sys.executable, "-c", code, repo_root / "scripts/inpaint.py", "--model", model, "--indir", "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("path", "multiple"), [("models/ldm/inpainting_big/config.yaml", 32), ("configs/emoji/inpaint_64.yaml", 16)]
)
def test_the_configurations_go_through(repo_root, path, multiple):
    """The networks of the published and the bundled one take what the task gives them, at a size that is no square."""
    config = read_config(repo_root / path)
    files = ModelFiles("m", repo_root / path, repo_root)
    assert TASK.settings(TASK.make_parser().parse_args(["--indir", "x"]), files, config)["steps"] == 50
    with torch.device("meta"):
        model = instantiate_from_config(inference.for_inference(config))
        image, mask = torch.zeros(2, 3, 64, 96), torch.zeros(2, 1, 64, 96)
        conditioning = model.get_learned_conditioning({"masked_image": image, "mask": mask})
        latents = torch.zeros(2, model.channels, 64 // model.downsampling, 96 // model.downsampling)
        assert model.apply_model(latents, torch.zeros(2), conditioning).shape == latents.shape
    assert model.downsampling * model.model.diffusion_model.downsampling == multiple


@pytest.mark.parametrize("name", ["inpaint_64", "superres_64"])
def test_the_bundled_models_train_on_what_their_data_give(repo_root, name):
    config = OmegaConf.to_container(OmegaConf.load(repo_root / f"configs/emoji/{name}.yaml"))
    sizes = {"image": (64, 64, 3), "masked_image": (64, 64, 3), "mask": (64, 64, 1), "LR_image": (16, 16, 3)}
    for part in ("train", "validation"):
        item = instantiate_from_config(config["data"]["params"][part])[7]
        assert {config["model"]["params"]["cond_stage_key"], "image"} <= item.keys()
        assert all(item[key].shape == size for key, size in sizes.items() if key in item)


def test_a_training_batch_has_the_mask_in_its_conditioning():
    """The published configuration lacked it; its network takes seven channels."""
    model = instantiate_from_config(OmegaConf.create(inpainting_config()))
    image, mask = torch.rand(2, 16, 16, 3) * 2 - 1, torch.ones(2, 16, 16, 1)
    batch = {"image": image, "masked_image": torch.where(mask > 0, -1.0, image), "mask": mask}
    _, conditioning = model.get_input(batch, "image")
    assert conditioning.shape == (2, 4, 8, 8) and (conditioning[:, 3] == 1).all()
    assert model.shared_step(batch)[0].isfinite()
