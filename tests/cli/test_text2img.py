"""The command that draws from text, run in this process on a tiny model."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import write_model

from ldm.errors import UserError
from ldm.tasks.text2img import TextToImage

TASK = TextToImage()


@pytest.fixture(scope="module")
def txt2img(load_script):
    return load_script("txt2img")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """`good`, and models that are broken in one way each."""
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
def draw(txt2img, models, tmp_path):
    """Run the command on the good model in few steps; returns its exit status."""

    def run(*options: str) -> int:
        fixed = ["--model", str(models / "good"), "--ddim_steps", "2", "--seed", "1", "--outdir", str(tmp_path / "out")]
        return txt2img.main([*fixed, *map(str, options)])

    return run


def pixels(path) -> np.ndarray:
    with Image.open(path) as file:
        return np.asarray(file)


def files(folder) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_samples_and_a_grid_are_written(draw, tmp_path, capsys):
    assert draw("--prompt", "red heart") == 0
    out = tmp_path / "out"
    assert files(out) == ["red-heart.png", *(f"samples/{i:04}.png" for i in range(4))]
    assert pixels(out / "red-heart.png").shape == (16 + 4, 4 * 18 + 2, 3)
    assert pixels(out / "samples" / "0003.png").shape == (16, 16, 3)
    printed = capsys.readouterr().out
    assert "0000.png to 0003.png" in printed and "red-heart.png" in printed


def test_numbers_go_on_and_nothing_is_overwritten(draw, tmp_path):
    for _ in range(3):
        assert draw("--prompt", "fox", "--n_samples", 1, "--n_iter", 2) == 0
    grids = ["fox-1.png", "fox-2.png", "fox.png"]
    assert files(tmp_path / "out") == [*grids, *(f"samples/{i:04}.png" for i in range(6))]


def test_the_settings_are_in_every_picture(draw, tmp_path):
    assert draw("--prompt", "grün 🚀", "--negative_prompt", "fox", "--plms", "--scale", 2, "--n_samples", 2) == 0
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


def test_the_sampler_asked_for_draws_and_is_noted(draw, tmp_path):
    for option in ([], ["--plms"], ["--dpm"]):
        assert draw("--prompt", "fox", "--ddim_steps", 4, "--n_samples", 1, "--skip_grid", *option) == 0
    paths = [tmp_path / "out" / "samples" / f"{i:04}.png" for i in range(3)]
    assert [Image.open(path).text["sampler"] for path in paths] == ["ddim", "plms", "dpm"]
    ddim, plms, dpm = map(pixels, paths)
    assert (ddim != plms).any() and (ddim != dpm).any() and (plms != dpm).any()


def test_the_seed_decides(draw, tmp_path):
    out = tmp_path / "out" / "samples"
    for seed in (5, 5, 6):
        assert draw("--prompt", "fox", "--seed", seed, "--n_samples", 1, "--skip_grid") == 0
    first, again, other = (pixels(out / f"{i:04}.png") for i in range(3))
    assert (first == again).all() and (first != other).any()
    assert not list((tmp_path / "out").glob("*.png"))


def test_without_a_seed_the_drawn_one_is_noted(txt2img, models, tmp_path):
    options = ["--model", str(models / "good"), "--ddim_steps", "1", "--n_samples", "1", "--outdir", str(tmp_path)]
    for _ in range(2):
        assert txt2img.main(options) == 0
    seeds = [Image.open(tmp_path / "samples" / f"000{i}.png").text["seed"] for i in range(2)]
    assert seeds[0] != seeds[1]


def test_a_file_of_prompts_is_drawn_in_its_order(draw, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\ufefffox\n\n  red heart  \r\nrainbow\n\n", encoding="utf-8")
    assert draw("--from-file", prompts, "--n_samples", 2, "--batch_size", 4) == 0
    out = tmp_path / "out"
    assert files(out) == ["grid-0000.png", *(f"samples/{i:04}.png" for i in range(6))]
    drawn = [Image.open(out / "samples" / f"{i:04}.png").text["prompt"] for i in range(6)]
    assert drawn == ["fox", "fox", "red heart", "red heart", "rainbow", "rainbow"]
    assert pixels(out / "grid-0000.png").shape == (3 * 18 + 2, 2 * 18 + 2, 3)


def test_a_file_of_one_prompt_gives_what_the_prompt_gives(draw, tmp_path):
    (tmp_path / "one.txt").write_text("fox\n")
    assert draw("--prompt", "fox", "--skip_grid") == 0
    assert draw("--from-file", tmp_path / "one.txt", "--skip_grid") == 0
    samples = tmp_path / "out" / "samples"
    for i in range(4):
        assert (pixels(samples / f"{i:04}.png") == pixels(samples / f"{i + 4:04}.png")).all()


def test_other_sizes_are_drawn(draw, tmp_path):
    assert draw("--prompt", "fox", "--H", 24, "--W", 32, "--n_samples", 1) == 0
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
def test_any_prompt_makes_a_file_name(tmp_path, prompt, name):
    args = TASK.make_parser().parse_args([])
    assert TASK.sheet_path(tmp_path, args, [{"prompt": prompt}]) == tmp_path / name


def test_unknown_words_are_a_warning(draw, caplog):
    assert draw("--prompt", "fox zzyx", "--n_samples", 1) == 0
    assert "zzyx" in caplog.text and "fox" not in caplog.text


BAD = {
    "no such model": (["--model", "emoji46"], "no model"),
    "truncated": (["--model", "{models}/truncated"], "truncated"),
    "foreign": (["--model", "{models}/foreign"], "foreign checkpoint"),
    "pickle with code": (["--model", "{models}/evil"], "refused"),
    "not from text": (["--model", "{models}/class"], "class_label"),
    "missing checkpoint": (["--ckpt", "{models}/none.ckpt"], "no checkpoint"),
    "missing configuration": (["--ckpt", "{models}/good/model.ckpt", "--config", "x.yaml"], "no configuration"),
    "configuration alone": (["--config", "{models}/good/config.yaml"], "--ckpt"),
    "model and checkpoint": (["--ckpt", "x"], "--model"),
    "odd height": (["--H", "18"], "nearest: 16 or 20"),
    "odd width": (["--W", "3"], "nearest: 4"),
    "too many steps": (["--ddim_steps", "101"], "100 or fewer"),
    "noisy plms": (["--plms", "--ddim_eta", "0.5"], "--ddim_eta"),
    "noisy dpm": (["--dpm", "--ddim_eta", "0.5"], "--dpm is deterministic; leave out --ddim_eta 0.5, or --dpm"),
    "idle negative prompt": (["--negative_prompt", "x", "--scale", "1"], "--scale"),
    "broken characters": (["--prompt", "\udce4"], "--prompt is not valid text"),
    "no prompt file": (["--from-file", "none.txt"], "no prompt file"),
    "empty prompt file": (["--from-file", "{models}/empty.txt"], "is empty"),
    "binary prompt file": (["--from-file", "{models}/good/model.ckpt"], "UTF-8"),
    "folder as prompt file": (["--from-file", "{models}"], "cannot read"),
    "outdir is a file": (["--outdir", "{models}/good/config.yaml"], "is a file"),
    "no such device": (["--device", "toaster"], "--device"),
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
def test_a_mistake_is_one_line_and_nothing_is_written(txt2img, models, tmp_path, monkeypatch, capsys, case):
    options, message = BAD[case]
    (models / "empty.txt").write_text(" \n\n")
    monkeypatch.chdir(tmp_path)
    options = [option.replace("{models}", str(models)) for option in options]
    named = {"--model", "--config", "--ckpt"} & set(options) and case != "model and checkpoint"
    model = [] if named else ["--model", str(models / "good")]
    fixed = ["--n_samples", "1", "--ddim_steps", "2", "--outdir", "out"]
    assert txt2img.main([*model, *fixed, *options]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("error: ") and message in error[-1]
    assert "Traceback" not in "".join(error) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_a_bad_option_is_one_line(txt2img, capsys, case):
    options, message = BAD_OPTIONS[case]
    with pytest.raises(SystemExit) as exit:
        txt2img.main(options)
    error = capsys.readouterr().err.strip()
    assert exit.value.code == 2 and error.startswith("error: ") and message in error and "\n" not in error


def test_an_interruption_is_told(txt2img, models, tmp_path, monkeypatch, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(TextToImage, "draw", interrupt)
    options = ["--model", str(models / "good"), "--ddim_steps", "2", "--outdir", str(tmp_path)]
    assert txt2img.main(options) == 130
    assert capsys.readouterr().err.strip().endswith("interrupted")


def test_a_model_is_chosen_and_named(repo_root, models, tmp_path, monkeypatch, caplog):
    """The published model where it was downloaded, else the bundled one, else an explanation."""
    caplog.set_level("INFO")
    monkeypatch.setattr("ldm.config.assets.ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    args = TASK.make_parser().parse_args([])
    with pytest.raises(UserError, match=r"download_weights\.py text2img-large"):
        TASK.choose_model(args)
    shutil.copytree(models / "good", tmp_path / "models/ldm/emoji64")
    assert TASK.choose_model(args).name == "emoji64"
    assert "model: emoji64" in caplog.text and "download_weights.py text2img-large" in caplog.text
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
    assert TASK.read_prompts(args, chosen) == ["a painting of a virus monster playing guitar"]


def test_the_published_options_keep_their_defaults():
    args = vars(TASK.make_parser().parse_args([]))
    published = {"outdir": "outputs/txt2img-samples", "steps": 200, "sampler": "ddim", "eta": 0.0, "n_iter": 1}
    published |= {"n_samples": 4, "scale": 5.0}
    assert {key: args[key] for key in published} == published
    assert {"prompt", "H", "W"} <= args.keys(), "their defaults follow the model"


@pytest.mark.parametrize("options", [["--help"], ["--ddim_steps", "none"], ["--H", "9", "--model", "{models}/good"]])
def test_torch_is_not_imported_before_the_options_are_right(repo_root, models, options):
    code = (
        "import runpy, sys\n"
        "sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as exit: assert exit.code in (0, 2), exit.code\n"
        "assert not {'torch', 'numpy', 'PIL'} & set(sys.modules)\n"
    )
    options = [option.replace("{models}", str(models)) for option in options]
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, repo_root / "scripts/txt2img.py", *options], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - start < 5
