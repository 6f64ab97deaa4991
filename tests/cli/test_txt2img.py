"""Tests of the command `txt2img` with a tiny model."""

from __future__ import annotations

import shutil
import time

import numpy as np
import pytest
import torch
from PIL import Image
from task_checks import run_without_torch
from tiny_models import write_model

from ldm.cli.options import sampler_settings
from ldm.cli.txt2img import Txt2Img, main
from ldm.config.model_info import ModelInfo
from ldm.errors import UserError
from ldm.pipelines.text import TextToImage

TASK = Txt2Img()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return a folder with a valid model, `good`, and models with one flaw each."""
    base = tmp_path_factory.mktemp("models")
    write_model(base / "good")
    for name in ("truncated", "foreign", "evil", "class"):
        shutil.copytree(base / "good", base / name)
    whole = (base / "good" / "model.ckpt").read_bytes()
    (base / "truncated" / "model.ckpt").write_bytes(whole[: len(whole) // 2])
    torch.save({"state_dict": {"other.weight": torch.ones(3)}}, base / "foreign" / "model.ckpt")
    torch.save({"state_dict": {}, "callbacks": {pytest.UsageError: 1}}, base / "evil" / "model.ckpt")
    config = (
        (base / "class" / "config.yaml").read_text().replace("cond_stage_key: caption", "cond_stage_key: class_label")
    )
    (base / "class" / "config.yaml").write_text(config)
    return base


@pytest.fixture
def sample(models, tmp_path):
    """Return a function that runs the command with the valid model and two steps, and returns its exit status."""

    def run(*options: str) -> int:
        fixed = ["--model", str(models / "good"), "--ddim_steps", "2", "--seed", "1", "--outdir", str(tmp_path / "out")]
        return main([*fixed, *map(str, options)])

    return run


def pixels(path) -> np.ndarray:
    with Image.open(path) as file:
        return np.asarray(file)


def files(folder) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_samples_and_a_grid_are_written(sample, tmp_path, capsys):
    assert sample("--prompt", "red heart") == 0
    out = tmp_path / "out"
    assert files(out) == ["red-heart.png", *(f"samples/{i:04}.png" for i in range(4))]
    assert pixels(out / "red-heart.png").shape == (16 + 4, 4 * 18 + 2, 3)
    assert pixels(out / "samples" / "0003.png").shape == (16, 16, 3)
    printed = capsys.readouterr().out
    assert "0000.png to 0003.png" in printed and "red-heart.png" in printed


def test_numbering_continues_and_no_file_is_overwritten(sample, tmp_path):
    for _ in range(3):
        assert sample("--prompt", "fox", "--n_samples", 1, "--n_iter", 2) == 0
    grids = ["fox-1.png", "fox-2.png", "fox.png"]
    assert files(tmp_path / "out") == [*grids, *(f"samples/{i:04}.png" for i in range(6))]


def test_every_image_contains_the_settings(sample, tmp_path):
    assert sample("--prompt", "grün 🚀", "--negative_prompt", "fox", "--plms", "--scale", 2, "--n_samples", 2) == 0
    with Image.open(tmp_path / "out" / "samples" / "0001.png") as file:
        text = file.text
    expected = {
        "prompt": "grün 🚀",
        "negative_prompt": "fox",
        "seed": "2",
        "sampler": "plms",
        "steps": "2",
        "eta": "0.0",
        "scale": "2.0",
        "model": "good",
        "precision": "float32",
        "index": "1",
    }
    assert {key: text[key] for key in expected} == expected and text["version"].startswith("ldm ")


def test_sampler_option_selects_the_sampler_and_is_recorded(sample, tmp_path):
    for option in ([], ["--plms"], ["--dpm"]):
        assert sample("--prompt", "fox", "--ddim_steps", 4, "--n_samples", 1, "--skip_grid", *option) == 0
    paths = [tmp_path / "out" / "samples" / f"{i:04}.png" for i in range(3)]
    assert [Image.open(path).text["sampler"] for path in paths] == ["ddim", "plms", "dpm"]
    ddim, plms, dpm = map(pixels, paths)
    assert (ddim != plms).any() and (ddim != dpm).any() and (plms != dpm).any()


def test_seed_determines_the_image(sample, tmp_path):
    out = tmp_path / "out" / "samples"
    for seed in (5, 5, 6):
        assert sample("--prompt", "fox", "--seed", seed, "--n_samples", 1, "--skip_grid") == 0
    first, again, other = (pixels(out / f"{i:04}.png") for i in range(3))
    assert (first == again).all() and (first != other).any()
    assert not list((tmp_path / "out").glob("*.png"))


def test_random_seed_is_recorded(models, tmp_path):
    options = ["--model", str(models / "good"), "--ddim_steps", "1", "--n_samples", "1", "--outdir", str(tmp_path)]
    for _ in range(2):
        assert main(options) == 0
    seeds = [Image.open(tmp_path / "samples" / f"000{i}.png").text["seed"] for i in range(2)]
    assert seeds[0] != seeds[1]


def test_prompts_of_a_file_are_sampled_in_order(sample, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\ufefffox\n\n  red heart  \r\nrainbow\n\n", encoding="utf-8")
    assert sample("--from-file", prompts, "--n_samples", 2, "--batch_size", 4) == 0
    out = tmp_path / "out"
    assert files(out) == ["grid-0000.png", *(f"samples/{i:04}.png" for i in range(6))]
    prompts = [Image.open(out / "samples" / f"{i:04}.png").text["prompt"] for i in range(6)]
    assert prompts == ["fox", "fox", "red heart", "red heart", "rainbow", "rainbow"]
    assert pixels(out / "grid-0000.png").shape == (3 * 18 + 2, 2 * 18 + 2, 3)


def test_file_of_one_prompt_equals_the_prompt_option(sample, tmp_path):
    (tmp_path / "one.txt").write_text("fox\n")
    assert sample("--prompt", "fox", "--skip_grid") == 0
    assert sample("--from-file", tmp_path / "one.txt", "--skip_grid") == 0
    samples = tmp_path / "out" / "samples"
    for i in range(4):
        assert (pixels(samples / f"{i:04}.png") == pixels(samples / f"{i + 4:04}.png")).all()


def test_size_options_set_the_image_size(sample, tmp_path):
    assert sample("--prompt", "fox", "--H", 24, "--W", 32, "--n_samples", 1) == 0
    assert pixels(tmp_path / "out" / "samples" / "0000.png").shape == (24, 32, 3)


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("a/b\\c: d?", "abc-d.png"),
        ("../../etc", "etc.png"),
        ("", "grid.png"),
        ("🚀" * 200, "🚀" * 37 + ".png"),
        ("x" * 400, "x" * 150 + ".png"),
    ],
)
def test_grid_is_named_after_any_prompt(tmp_path, prompt, name):
    args = TASK.make_parser().parse_args([])
    assert next(TASK.grid_paths(tmp_path, args, [{"prompt": prompt}])) == tmp_path / name


def test_unknown_words_log_a_warning(sample, caplog):
    assert sample("--prompt", "fox zzyx", "--n_samples", 1) == 0
    assert "zzyx" in caplog.text and "fox" not in caplog.text


def test_each_cut_prompt_of_a_run_logs_one_line(sample, tmp_path, caplog):
    """The model reads 16 tokens; eight images of four prompts, in batches of two, of which two prompts are too long."""
    (tmp_path / "prompts.txt").write_text(f"fox\n{'fox ' * 15}\n{'Fox ' * 16}!\n{'fox ' * 15}\n")
    options = ["--from-file", tmp_path / "prompts.txt", "--n_samples", 2, "--batch_size", 2]
    assert sample(*options, "--negative_prompt", "rocket " * 15) == 0
    lines = [record.getMessage() for record in caplog.records if "tokens" in record.getMessage()]
    numbers = "tokens (start and end token included), and the model reads 16; cut:"
    assert [line.partition(" has ")[2] for line in lines] == [
        f'17 {numbers} "… fox"',
        f'19 {numbers} "… Fox Fox !"',
        f'17 {numbers} "… rocket"',
    ]
    assert [line.partition(' "')[0] for line in lines] == ["the prompt", "the prompt", "the negative prompt"]


BAD = {
    "no such model": (["--model", "emoji46"], "no model"),
    "truncated": (["--model", "{models}/truncated"], "truncated"),
    "foreign": (["--model", "{models}/foreign"], "belongs to another model"),
    "pickle with code": (["--model", "{models}/evil"], "refused"),
    "not from text": (["--model", "{models}/class"], 'is conditioned on "class_label", not on text'),
    "missing checkpoint": (["--ckpt", "{models}/none.ckpt"], "no checkpoint"),
    "missing configuration": (["--ckpt", "{models}/good/model.ckpt", "--config", "x.yaml"], "no configuration"),
    "configuration alone": (["--config", "{models}/good/config.yaml"], "--ckpt"),
    "model and checkpoint": (["--ckpt", "x"], "--model"),
    "odd height": (["--H", "18"], "nearest: 16 or 20"),
    "odd width": (["--W", "3"], "nearest: 4"),
    "too many steps": (["--ddim_steps", "101"], "100 or fewer"),
    "noisy plms": (["--plms", "--ddim_eta", "0.5"], 'sampler "plms" is deterministic; eta must be 0, got 0.5'),
    "noisy dpm": (["--dpm", "--ddim_eta", "0.5"], 'sampler "dpm" is deterministic; eta must be 0, got 0.5'),
    "negative prompt without guidance": (
        ["--negative_prompt", "x", "--scale", "1"],
        "the negative prompt has no effect without guidance",
    ),
    "broken characters": (["--prompt", "\udce4"], "--prompt is not valid text"),
    "no prompt file": (["--from-file", "none.txt"], "no prompt file"),
    "empty prompt file": (["--from-file", "{models}/empty.txt"], "is empty"),
    "binary prompt file": (["--from-file", "{models}/good/model.ckpt"], "UTF-8"),
    "folder as prompt file": (["--from-file", "{models}"], "cannot read"),
    "outdir is a file": (["--outdir", "{models}/good/config.yaml"], "is a file"),
    "no such device": (["--device", "toaster"], 'the device "toaster" is not available here'),
}
BAD_OPTIONS = {
    "two samplers": (["--plms", "--dpm"], "not allowed with"),
    "two prompts": (["--prompt", "a", "--from-file", "b"], "not allowed with"),
    "typo": (["--ddim_stepz", "3"], 'did you mean "--ddim_steps"'),
    "words": (["--n_samples", "many"], "not a whole number"),
    "zero": (["--n_samples", "0"], "0 is not between 1"),
    "negative": (["--ddim_eta", "-1"], "negative"),
    "nan": (["--scale", "nan"], "finite"),
    "seed": (["--seed", "-1"], "-1"),
    "precision": (["--precision", "int8"], "invalid choice"),
}


@pytest.mark.parametrize("case", BAD)
def test_error_is_one_line_and_writes_nothing(models, tmp_path, monkeypatch, capsys, case):
    options, message = BAD[case]
    (models / "empty.txt").write_text(" \n\n")
    monkeypatch.chdir(tmp_path)
    options = [option.replace("{models}", str(models)) for option in options]
    named = {"--model", "--config", "--ckpt"} & set(options) and case != "model and checkpoint"
    model = [] if named else ["--model", str(models / "good")]
    fixed = ["--n_samples", "1", "--ddim_steps", "2", "--outdir", "out"]
    assert main([*model, *fixed, *options]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("error: ") and message in error[-1]
    assert "Traceback" not in "".join(error) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_invalid_option_is_one_line(capsys, case):
    options, message = BAD_OPTIONS[case]
    with pytest.raises(SystemExit) as exit:
        main(options)
    error = capsys.readouterr().err.strip()
    assert exit.value.code == 2 and error.startswith("error: ") and message in error and "\n" not in error


def test_interruption_returns_130(models, tmp_path, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(TextToImage, "sample", interrupt)
    options = ["--model", str(models / "good"), "--ddim_steps", "2", "--outdir", str(tmp_path)]
    assert main(options) == 130
    assert capsys.readouterr().err.strip().endswith("interrupted")


def test_default_model_is_the_published_one_or_the_bundled_one(repo_root, models, tmp_path, monkeypatch, caplog):
    """Without either, an error names the command that downloads the published model."""
    caplog.set_level("INFO")
    monkeypatch.setattr("ldm.config.assets.ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    args = TASK.make_parser().parse_args([])
    with pytest.raises(UserError, match=r"run ldm download_weights text2img-large, or name one with --model"):
        TASK.choose_model(args)
    shutil.copytree(models / "good", tmp_path / "models/ldm/emoji64")
    assert TASK.choose_model(args).name == "emoji64"
    assert "model: emoji64" in caplog.text and "download_weights text2img-large" in caplog.text
    (tmp_path / "models/ldm/text2img-large").mkdir()
    config = "configs/latent-diffusion/txt2img-1p4B-eval.yaml"
    (tmp_path / config).parent.mkdir(parents=True)
    shutil.copy(repo_root / config, tmp_path / config)
    for weights in ("model.ckpt", "model.safetensors"):
        path = tmp_path / "models/ldm/text2img-large" / weights
        path.touch()
        chosen = TASK.choose_model(args)
        assert chosen.name == "text2img-large" and chosen.config.name == "txt2img-1p4B-eval.yaml"
        assert chosen.checkpoint.resolve() == path
        path.unlink()
    path.touch()
    assert TASK.choose_model(TASK.make_parser().parse_args(["--model", "emoji64"])).name == "emoji64"
    assert TASK.read_prompts(args, ModelInfo.read(chosen)) == ["a painting of a virus monster playing guitar"]


def test_published_options_keep_their_defaults():
    parsed = TASK.make_parser().parse_args([])
    args = {**vars(parsed), **sampler_settings(parsed)}
    published = {"outdir": "outputs/txt2img-samples", "steps": 200, "sampler": "ddim", "eta": 0.0, "n_iter": 1}
    published |= {"n_samples": 4, "scale": 5.0}
    assert {key: args[key] for key in published} == published
    assert {"prompt", "H", "W"} <= args.keys(), "their defaults depend on the model"


@pytest.mark.parametrize(
    ("options", "status"),
    [(["--help"], 0), (["--ddim_steps", "none"], 2), (["--H", "9", "--model", "{models}/good"], 2)],
)
def test_options_are_checked_before_torch_is_imported(models, options, status):
    options = [option.replace("{models}", str(models)) for option in options]
    start = time.monotonic()
    assert run_without_torch("txt2img", *options)[0] == status
    assert time.monotonic() - start < 5
