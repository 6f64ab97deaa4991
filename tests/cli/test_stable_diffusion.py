"""Tests of the commands with tiny models in the structure of Stable Diffusion, with the published options."""

from __future__ import annotations

import json
import shutil

import pytest
from library_tasks import half_mask, random_images
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from task_checks import assert_one_line, pixels, samples
from tiny_models import inpainting_config, superresolution_config, write_clip, write_model
from tiny_stable_diffusion import stable_diffusion_config, text_inpainting_config, upscaler_config

import ldm
from ldm.cli import img2img, inpaint, replay, superres, txt2img
from ldm.cli.main import main
from ldm.config.model_info import ModelInfo

IMAGES = random_images(2, 16, 16)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Return a folder with models, and with images and masks."""
    pytest.importorskip("transformers")
    base = tmp_path_factory.mktemp("stable diffusion")
    vocabulary = write_clip(base / "clip")
    write_model(base / "v1", stable_diffusion_config(1, vocabulary))
    write_model(base / "v2", stable_diffusion_config(2, vocabulary, parameterization="v"))
    write_model(base / "fill", text_inpainting_config(1, vocabulary))
    write_model(base / "enlarge", upscaler_config(vocabulary))
    for folder in ("images", "pairs"):
        (base / folder).mkdir()
        for i, image in enumerate(IMAGES):
            Image.fromarray(image).save(base / folder / f"{i}.png")
    for i in range(len(IMAGES)):
        Image.fromarray(half_mask(16, 16)).save(base / "pairs" / f"{i}_mask.png")
    return base


@pytest.fixture
def run(base, tmp_path):
    """Return a function that runs a command with a model of `base`, and returns its exit status."""

    def run(command, model, *words, outdir="out") -> int:
        fixed = ["--ckpt", base / model / "model.ckpt", "--seed", 4, "--outdir", tmp_path / outdir]
        return main([command, *map(str, [*fixed, *words])])

    return run


def settings(path) -> dict:
    """Return the settings that are recorded in an image."""
    with Image.open(path) as file:
        record = json.loads(file.text["ldm"])
    return {**record["settings"], **record["inputs"], "seed": record["seed"], "precision": record["precision"]}


# -- text to image ---------------------------------------------------------------------------------------------

PUBLISHED = ["--plms", "--H", 16, "--W", 24, "--C", 4, "--f", 2, "--precision", "full", "--n_rows", 4]


def test_published_options_of_txt2img(run, tmp_path):
    options = [*PUBLISHED, "--prompt", "a cat", "--n_iter", 2, "--n_samples", 2, "--ddim_eta", 0.0]
    assert run("txt2img", "v1", *options) == 0
    paths = samples(tmp_path / "out")
    assert [path.name for path in paths] == ["0000.png", "0001.png", "0002.png", "0003.png"]
    expected = {"sampler": "plms", "steps": 50, "scale": 7.5, "eta": 0.0, "precision": "float32", "seed": 4}
    assert expected.items() <= settings(paths[0]).items()
    assert pixels(paths[0]).shape == (16, 24, 3)
    assert pixels(tmp_path / "out" / "a-cat.png").shape == (16 + 4, 4 * 26 + 2, 3), "one row of four"
    assert replay.main([str(path) for path in paths]) == 0


def test_defaults_follow_from_the_model(run, tmp_path):
    assert run("txt2img", "v2", "--dpm_solver", "--n_samples", 1, "--prompt", "cat") == 0
    (path,) = samples(tmp_path / "out")
    assert {"sampler": "dpm", "steps": 50, "scale": 9.0}.items() <= settings(path).items()
    assert pixels(path).shape == (16, 16, 3)


@pytest.mark.parametrize(("name", "precision"), [("full", "float32"), ("autocast", "auto"), ("float16", "float16")])
def test_precisions_have_their_published_names_too(name, precision):
    assert txt2img.Txt2Img().parse(["--precision", name]).precision == precision
    with pytest.raises(SystemExit):
        txt2img.Txt2Img().parse(["--precision", "half"])


@pytest.mark.parametrize("sampler", [[], ["--plms"], ["--ddim_eta", 1.0]], ids=str)
def test_fixed_code_uses_the_same_start_noise_in_every_round(run, tmp_path, sampler):
    fixed = ["--prompt", "cat", "--ddim_steps", 3, "--n_iter", 2, "--n_samples", 2, *sampler]
    assert run("txt2img", "v1", *fixed, "--fixed_code", outdir="fixed") == 0
    assert run("txt2img", "v1", *fixed, outdir="free") == 0
    (a, b, again, other), free = samples(tmp_path / "fixed"), samples(tmp_path / "free")
    assert [settings(path)["start_seed"] for path in (a, b, again, other)] == [4, 5, 4, 5]
    assert (pixels(a) == pixels(free[0])).all() and (pixels(b) == pixels(free[1])).all(), "the first round"
    is_noisy = "--ddim_eta" in sampler
    assert (pixels(again) == pixels(a)).all() != is_noisy, "the steps of every round have their own noise"
    assert (pixels(again) != pixels(free[2])).any() and (pixels(a) != pixels(b)).any()
    assert replay.main([str(path) for path in (a, b, again, other)]) == 0


def test_skip_save_writes_the_grid_only(run, tmp_path, capsys):
    options = ["--prompt", "cat", "--ddim_steps", 2, "--n_samples", 2]
    assert run("txt2img", "v1", *options, "--skip_save") == 0
    assert [path.name for path in (tmp_path / "out").rglob("*.png")] == ["cat.png"]
    assert run("txt2img", "v1", *options, outdir="all") == 0
    assert (pixels(tmp_path / "out" / "cat.png") == pixels(tmp_path / "all" / "cat.png")).all()
    assert capsys.readouterr().out.startswith("2 images in ")


def test_prompts_of_a_file_share_the_fixed_code(run, tmp_path):
    (tmp_path / "prompts.txt").write_text("cat\ndog\n")
    options = ["--from-file", tmp_path / "prompts.txt", "--ddim_steps", 2, "--n_samples", 2, "--skip_grid"]
    assert run("txt2img", "v1", *options, "--fixed_code") == 0
    found = [(each["prompt"], each["start_seed"]) for each in map(settings, samples(tmp_path / "out"))]
    assert found == [("cat", 4), ("cat", 5), ("dog", 4), ("dog", 5)]


def test_laion400m_is_the_published_model(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("ldm.config.assets.ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    task = txt2img.Txt2Img()
    assert task.parse(["--laion400m"]).outdir == "outputs/txt2img-samples-laion400m"
    assert task.parse(["--laion400m", "--outdir", "x"]).outdir == "x"
    assert main(["txt2img", "--laion400m"]) == 2
    message = "--laion400m is the model text2img-large; run ldm download_weights text2img-large"
    assert message in capsys.readouterr().err
    shutil.copytree(base / "v1", tmp_path / "models/ldm/text2img-large")
    assert task.choose_model(task.parse(["--laion400m"])).name == "text2img-large"
    assert main(["txt2img", "--laion400m", "--ckpt", "x"]) == 2
    assert "leave out --model, --config and --ckpt" in capsys.readouterr().err


BAD = {
    "channels": (["--C", 3], '--C 3 is not that of the model "v1", 4; leave it out'),
    "factor": (["--f", 8], '--f 8 is not that of the model "v1", 2; leave it out'),
    "no file": (["--skip_save", "--skip_grid"], "--skip_save and --skip_grid together write nothing; leave one out"),
}


@pytest.mark.parametrize("case", BAD)
def test_contradicting_option_is_one_line(run, tmp_path, capsys, case):
    options, message = BAD[case]
    assert_one_line(run("txt2img", "v1", *options), capsys.readouterr().err, message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("command", "model", "words", "message"),
    [
        ("txt2img", "fill", [], 'the model "fill" is conditioned on a masked image beside its text; use ldm inpaint'),
        (
            "img2img",
            "enlarge",
            ["--init-img", "x"],
            "is conditioned on a small image beside its text; use ldm",
        ),
        ("inpaint", "v1", ["--image", "x"], 'is conditioned on "txt", not on "masked_image"; choose an in-painting'),
        ("superres", "fill", ["--image", "x"], 'is conditioned on "txt", not on "LR_image"; choose a super-resolution'),
    ],
)
def test_model_of_another_task_is_one_line(run, capsys, command, model, words, message):
    assert_one_line(run(command, model, *words), capsys.readouterr().err, message)


def test_damaged_start_seed_is_one_line(run, tmp_path, capsys):
    options = ["--prompt", "cat", "--ddim_steps", 2, "--n_samples", 1, "--skip_grid", "--fixed_code"]
    assert run("txt2img", "v1", *options) == 0
    (path,) = samples(tmp_path / "out")
    with Image.open(path) as file:
        image, record = file.copy(), json.loads(file.text["ldm"])
    for seed in ("x", -1, 2**70):
        info = PngInfo()
        info.add_text("ldm", json.dumps({**record, "inputs": {**record["inputs"], "start_seed": seed}}))
        image.save(path, pnginfo=info)
        assert_one_line(replay.main([str(path)]), capsys.readouterr().err, "are damaged: the seed is not")


# -- image to image --------------------------------------------------------------------------------------------


def test_img2img_runs_the_published_number_of_steps(run, base, tmp_path):
    options = ["--init-img", base / "images/0.png", "--prompt", "cat", "--strength", 0.75, "--ddim_steps", 10]
    assert run("img2img", "v1", *options, "--n_samples", 2, "--n_iter", 2, "--fixed_code") == 0
    paths = samples(tmp_path / "out")
    expected = {"strength": 0.75, "steps": 10, "scale": 5.0, "published_start": True, "timestep_spacing": "uniform"}
    assert expected.items() <= settings(paths[0]).items()
    assert (pixels(paths[0]) == pixels(paths[2])).all() and (pixels(paths[0]) != pixels(paths[1])).any()
    assert replay.main([str(path) for path in paths]) == 0
    model = ldm.load(base / "v1", device="cpu")
    options = {"strength": 0.75, "steps": 10, "seed": 4, "progress": False, "output_type": "numpy", "batch_size": 2}
    images = ldm.image_to_image(model, IMAGES[0], 2 * ["cat"], **options)
    for path, image in zip(paths[:2], images, strict=True):
        assert (pixels(path) == image).all()


def test_default_guidance_scale_of_img2img(run, base, tmp_path):
    options = ["--init-img", base / "images/0.png", "--ddim_steps", 4, "--n_samples", 1]
    assert run("img2img", "v2", *options) == 0
    (path,) = samples(tmp_path / "out")
    assert settings(path)["scale"] == 9.0


# -- in-painting -----------------------------------------------------------------------------------------------


def test_inpaint_by_a_prompt(run, base, tmp_path):
    options = ["--indir", base / "pairs", "--steps", 3, "--prompt", "a cat", "--negative_prompt", "dog"]
    assert run("inpaint", "fill", *options, "--n_samples", 2, "--mask_mode", "max", "--eta", 1) == 0
    paths = [tmp_path / "out" / f"{i}-{j}.png" for i in range(2) for j in range(2)]
    expected = {"prompt": "a cat", "negative_prompt": "dog", "scale": 7.5, "mask_mode": "max", "eta": 1.0, "steps": 3}
    assert expected.items() <= settings(paths[0]).items()
    for i, path in enumerate(paths):
        kept = ~half_mask(16, 16)
        assert (pixels(path)[kept] == IMAGES[i // 2][kept]).all()
    assert (pixels(paths[0]) != pixels(paths[1])).any()
    assert replay.main([str(path) for path in paths]) == 0
    grid = pixels(tmp_path / "out" / "grid-0000.png")
    assert grid.shape == (2 * 18 + 2, 4 * 18 + 2, 3), "each masked image beside its result"
    assert (grid[2:18, 2:10] == 255).all()


def test_inpaint_agrees_with_the_library(run, base, tmp_path):
    options = ["--indir", base / "pairs", "--steps", 3, "--prompt", "cat", "--scale", 3, "--batch_size", 2]
    assert run("inpaint", "fill", *options, "--skip_grid") == 0
    model = ldm.load(base / "fill", device="cpu")
    images = ldm.inpaint(
        model, IMAGES, half_mask(16, 16), "cat", scale=3, steps=3, seed=4, progress=False, output_type="numpy"
    )
    for i, image in enumerate(images):
        assert (pixels(tmp_path / "out" / f"{i}.png") == image).all()


# -- super-resolution ------------------------------------------------------------------------------------------


def test_superres_by_a_prompt(run, base, tmp_path):
    options = ["--indir", base / "images", "--prompt", "a cat", "--noise_level", 30, "--batch_size", 2, "--steps", 3]
    assert run("superres", "enlarge", *options) == 0
    paths = [tmp_path / "out" / f"{i}.png" for i in range(2)]
    expected = {"prompt": "a cat", "noise_level": 30, "scale": 9.0, "eta": 0.0, "factor": 2, "tile": 16}
    assert expected.items() <= settings(paths[0]).items()
    assert replay.main([str(path) for path in paths]) == 0
    model = ldm.load(base / "enlarge", device="cpu")
    fixed = {"steps": 3, "seed": 4, "progress": False, "output_type": "numpy"}
    for path, image in zip(paths, ldm.super_resolve(model, IMAGES, "a cat", noise_level=30, **fixed), strict=True):
        assert pixels(path).shape == (32, 32, 3) and (pixels(path) == image).all()
    assert pixels(tmp_path / "out" / "grid-0000.png").shape == (34 + 2, 4 * 34 + 2, 3)


def test_default_steps_and_eta_of_superres_follow_from_the_model():
    task, info = superres.Superres(), ModelInfo("m", upscaler_config())
    pipelines = [
        task.pipeline(task.make_parser().parse_args(["--image", "x", *words]), info) for words in ([], ["--steps", "9"])
    ]
    assert [(each.steps, each.eta, each.noise_level) for each in pipelines] == [(50, 0.0, 20), (9, 0.0, 20)]
    other = task.pipeline(task.make_parser().parse_args(["--image", "x"]), ModelInfo("m", superresolution_config()))
    assert (other.steps, other.eta) == (100, 1.0)


def test_default_noise_level_is_the_published_one(run, base, tmp_path):
    assert run("superres", "enlarge", "--image", base / "images/0.png", "--steps", 2) == 0
    found = settings(tmp_path / "out" / "0.png")
    assert found["noise_level"] == 20 and "prompt" not in found


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        ("inpaint", ["--prompt", "cat"], "reads no text; leave out the prompt"),
        ("inpaint", ["--scale", 3], "reads no text; leave out the prompt"),
        ("superres", ["--negative_prompt", "cat"], "reads no text; leave out the prompt"),
        ("superres", ["--noise_level", 20], "adds no noise to its images; leave out the noise level"),
    ],
)
def test_models_without_a_text_refuse_its_options(tmp_path, capsys, command, words, message):
    config = inpainting_config() if command == "inpaint" else superresolution_config()
    write_model(tmp_path / "m", config)
    status = main([command, "--model", str(tmp_path / "m"), "--image", "x.png", *map(str, words)])
    assert_one_line(status, capsys.readouterr().err, message)


@pytest.mark.parametrize("command", ["inpaint", "superres"])
def test_cut_prompts_log_one_line(run, base, caplog, command):
    folder = base / ("pairs" if command == "inpaint" else "images")
    model = "fill" if command == "inpaint" else "enlarge"
    assert run(command, model, "--indir", folder, "--prompt", "cat " * 80, "--steps", 2, "--tile", 0) == 0
    (line,) = (record.getMessage() for record in caplog.records if "tokens" in record.getMessage())
    assert line.startswith('the prompt "cat cat') and "the model reads 77" in line


@pytest.mark.parametrize("task", [txt2img.Txt2Img(), img2img.Img2Img(), inpaint.Inpaint(), superres.Superres()])
def test_help_names_the_defaults_of_stable_diffusion(task, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    text = task.make_parser().format_help()
    assert "Stable Diffusion" in text and "None" not in text
