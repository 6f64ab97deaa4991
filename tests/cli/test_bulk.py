"""Thousands of samples, shown with a few of tiny models."""

from __future__ import annotations

import shlex
import shutil

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tiny_models import class_config, pixel_config, text_config, unconditional_config, write_model

from ldm import inference
from ldm.config.instantiate import instantiate_from_config
from ldm.config.model_config import read_config
from ldm.tasks import bulk
from ldm.tasks.classes import class_conditioning
from ldm.tasks.sample_diffusion import SampleDiffusion

TASK = SampleDiffusion()


@pytest.fixture(scope="module")
def sample(load_script):
    return load_script("sample_diffusion").main


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Models told nothing, classes (with and without a null class), words; and one of pixels."""
    base = tmp_path_factory.mktemp("models")
    write_model(base / "faces", unconditional_config(timesteps=20), global_step=1234)
    write_model(base / "guided", class_config(4, cond_dropout=0.1))
    write_model(base / "unguided", class_config(3))
    write_model(base / "drawings", text_config())
    write_model(base / "pixels", pixel_config(timesteps=20))
    write_model(base / "boxes", text_config(cond_stage_key="coordinates_bbox"))
    return base


@pytest.fixture
def draw(sample, models, tmp_path):
    """Run the command in few steps; gives its exit status."""

    def run(model: str | None, *options: object) -> int:
        fixed = [] if model is None else ["-r", models / model, "-l", tmp_path, "-c", 3, "--seed", 7]
        return sample([str(each) for each in (*fixed, *options)])

    return run


def only(paths):
    (found,) = paths
    return found


def run_of(tmp_path, model="faces"):
    return only((tmp_path / model / "samples").glob("*/*"))


def samples(folder) -> list[np.ndarray]:
    return [np.asarray(Image.open(path)).astype(int) for path in sorted((folder / "img").glob("*.png"))]


def array(folder) -> dict[str, np.ndarray]:
    with np.load(only((folder / "numpy").iterdir()), allow_pickle=False) as file:
        return dict(file)


def same(one, other) -> bool:
    return len(one) == len(other) and all((a == b).all() for a, b in zip(one, other, strict=True))


# -- the files -------------------------------------------------------------------------------------------------


def test_the_published_files_are_written(draw, tmp_path, capsys):
    assert draw("faces", "-n", 5, "--batch_size", 2) == 0
    folder = run_of(tmp_path)
    assert folder.parent.name == "00001234"
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    images = [f"img/sample_{i:06}.png" for i in range(5)]
    assert files == ["grid.png", *images, "numpy/5x16x16x3-samples.npz", "sampling_config.yaml"]
    options = yaml.safe_load((folder / "sampling_config.yaml").read_text())
    published = {"n_samples": 5, "eta": 1.0, "vanilla_sample": False, "custom_steps": 3, "batch_size": 2}
    assert {name: options[name] for name in published} == published and options["seed"] == 7
    arrays = array(folder)
    assert set(arrays) == {"arr_0", "seeds"} and arrays["arr_0"].dtype == np.uint8
    assert (arrays["arr_0"] == np.stack(samples(folder))).all()
    assert arrays["seeds"].tolist() == [7, 8, 9, 10, 11]
    assert [Image.open(folder / image).text["seed"] for image in images] == ["7", "8", "9", "10", "11"]
    assert str(folder) in capsys.readouterr().out


def test_without_a_logdir_samples_go_to_the_models_folder(sample, models, tmp_path):
    shutil.copytree(models / "faces", tmp_path / "faces")
    for given in ("faces", "faces/model.ckpt"):
        assert sample(["-r", str(tmp_path / given), "-n", "1", "-c", "1"]) == 0
    assert len(list((tmp_path / "faces" / "samples" / "00001234").iterdir())) == 2


def test_a_training_run_is_a_model_too(sample, models, tmp_path):
    run = tmp_path / "logs" / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "configs").mkdir()
    shutil.copy(models / "faces" / "model.ckpt", run / "checkpoints" / "last.ckpt")
    for time in ("2024", "2025"):
        shutil.copy(models / "faces" / "config.yaml", run / "configs" / f"{time}-project.yaml")
    for given in (run, run / "checkpoints" / "last.ckpt"):
        assert sample(["-r", str(given), "-n", "1", "-c", "1"]) == 0
        shutil.rmtree(only((run / "samples" / "00001234").iterdir()))


def test_two_runs_of_one_second_have_folders_of_their_own(draw, tmp_path, monkeypatch):
    monkeypatch.setattr(bulk.time, "strftime", lambda form: "now")
    assert draw("faces", "-n", 1) == draw("faces", "-n", 1) == 0
    assert sorted(path.name for path in (tmp_path / "faces/samples/00001234").iterdir()) == ["now", "now-1"]


# -- what is drawn ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [(), ("-v",), ("-e", 0), ("--dpm",), ("--plms",)], ids=str)
def test_a_sample_is_the_same_at_every_batch_size(draw, tmp_path, options):
    runs = []
    for size in (1, 3, 8):
        assert draw("faces", "-n", 8, "--batch_size", size, "-l", tmp_path / str(size), *options) == 0
        runs.append(samples(run_of(tmp_path / str(size))))
    for alone, threes, eights in zip(*runs, strict=True):
        assert np.abs(alone - threes).max() <= 1 and np.abs(alone - eights).max() <= 1
    assert (runs[0][0] != runs[0][1]).any()


def test_vanilla_sampling_is_the_models_own(models, draw, tmp_path):
    """All of its steps, against `p_sample_loop` from the same noise."""
    from ldm.io.pixels import to_uint8
    from ldm.models.diffusion.noise import SeededNoise

    assert draw("pixels", "-n", 2, "-v") == 0
    model = inference.load_model(models / "pixels" / "config.yaml", models / "pixels" / "model.ckpt")
    with inference.prepared(model):
        drawn = model.p_sample_loop(None, (2, 3, 8, 8), draw=SeededNoise([7, 8]), verbose=False)
    assert same(samples(run_of(tmp_path, "pixels")), list(to_uint8(drawn.clamp(-1, 1))))
    text = Image.open(run_of(tmp_path, "pixels") / "img/sample_000000.png").text
    assert (text["sampler"], text["steps"]) == ("ddpm", "20")


def test_classes_take_turns(draw, tmp_path):
    assert draw("guided", "-n", 8) == 0
    arrays = array(run_of(tmp_path, "guided"))
    assert arrays["arr_1"].tolist() == [0, 1, 2, 0, 1, 2, 0, 1] and arrays["arr_1"].dtype == np.int64


def test_chosen_classes_are_guided(draw, tmp_path):
    for scale in (1, 3):
        assert draw("guided", "-n", 4, "--classes", "2", "0-1", "--scale", scale, "-l", tmp_path / str(scale)) == 0
    plain, guided = (run_of(tmp_path / str(scale), "guided") for scale in (1, 3))
    assert array(plain)["arr_1"].tolist() == [2, 0, 1, 2]
    assert all((a != b).any() for a, b in zip(samples(plain), samples(guided), strict=True))


def test_the_drawings_are_classes(draw, tmp_path):
    assert draw("drawings", "-n", 2, "--classes", "red heart", "fox", "--scale", 3) == 0
    folder = run_of(tmp_path, "drawings")
    assert [Image.open(folder / f"img/sample_00000{i}.png").text["class"] for i in range(2)] == ["red heart", "fox"]
    assert array(folder)["arr_1"].tolist() == [150, 1160]


@pytest.mark.parametrize("model", ["faces", "guided", "drawings"])
def test_samples_are_drawn_again(draw, load_script, tmp_path, capsys, model):
    assert draw(model, "-n", 5, "--batch_size", 3) == 0
    paths = [str(path) for path in sorted((run_of(tmp_path, model) / "img").iterdir())]
    assert load_script("replay").main(paths) == 0
    assert capsys.readouterr().out.count("identical") == 5


def test_values_of_the_configuration_may_be_given(draw, load_script, tmp_path):
    given = "model.params.scale_factor=0.3"
    for folder, options in (("a", ()), ("b", ("--classes", "0", given)), ("c", (given, "--classes", "0"))):
        assert draw("guided", "-n", 1, "-l", tmp_path / folder, *options) == 0
    one, two, three = (run_of(tmp_path / folder, "guided") for folder in "abc")
    assert same(samples(two), samples(three)) and not same(samples(one), samples(two))
    assert load_script("replay").main([str(two / "img" / "sample_000000.png")]) == 0


# -- going on --------------------------------------------------------------------------------------------------


def interrupt_after(monkeypatch, batches):
    drawn, left = SampleDiffusion.draw, iter([True] * batches)

    def interrupted(self, *args):
        if next(left, False):
            return drawn(self, *args)
        raise KeyboardInterrupt

    monkeypatch.setattr(SampleDiffusion, "draw", interrupted)


@pytest.mark.parametrize("model", ["faces", "guided"])
def test_an_interrupted_run_goes_on(draw, tmp_path, capsys, model):
    assert draw(model, "-n", 7, "--batch_size", 2, "-l", tmp_path / "whole") == 0
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, 2)
        assert draw(model, "-n", 7, "--batch_size", 2) == 130
    folder = run_of(tmp_path, model)
    assert len(list((folder / "img").iterdir())) == 4 and not (folder / "numpy").exists()
    assert f"4 of 7 samples are finished; go on with --continue {folder}" in capsys.readouterr().out
    (folder / "img" / "sample_000000.png").unlink()  # and one got lost
    before = {path: path.stat().st_mtime_ns for path in (folder / "img").iterdir()}
    assert draw(None, "--continue", folder) == 0
    assert before == {path: path.stat().st_mtime_ns for path in before}, "nothing is drawn twice"
    whole = run_of(tmp_path / "whole", model)
    assert same(samples(folder), samples(whole))
    for name, values in array(whole).items():
        assert (array(folder)[name] == values).all()


def test_a_run_can_grow(draw, tmp_path):
    assert draw("guided", "-n", 7, "-l", tmp_path / "whole") == 0
    assert draw("guided", "-n", 4) == 0
    folder = run_of(tmp_path, "guided")
    assert draw(None, "--continue", folder, "-n", 7, "--batch_size", 3) == 0
    grown, whole = samples(folder), samples(run_of(tmp_path / "whole", "guided"))
    assert all(np.abs(a - b).max() <= 1 for a, b in zip(grown, whole, strict=True))
    assert sorted(path.name for path in (folder / "numpy").iterdir()) == [
        "4x16x16x3-samples.npz",
        "7x16x16x3-samples.npz",
    ]
    assert yaml.safe_load((folder / "sampling_config.yaml").read_text())["n_samples"] == 7


def test_a_finished_run_has_nothing_left_to_do(draw, tmp_path, capsys):
    assert draw("faces", "-n", 2) == 0
    folder = run_of(tmp_path)
    (folder / "numpy" / "2x16x16x3-samples.npz").unlink()
    assert draw(None, "--continue", folder) == 0 and len(array(folder)["arr_0"]) == 2
    capsys.readouterr()
    assert draw(None, "--continue", folder) == 0
    assert capsys.readouterr().out.startswith("all 2 samples are there")


def test_values_of_the_configuration_hold_when_a_run_goes_on(draw, models, tmp_path, monkeypatch):
    given = "model.params.scale_factor=0.3"
    assert draw("faces", "-n", 4, "-l", tmp_path / "whole", given) == 0
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, 1)
        assert draw("faces", "-n", 4, "--batch_size", 2, given) == 130
    assert draw(None, "-r", models / "faces", "--continue", run_of(tmp_path), "--seed", 7, given) == 0
    pairs = zip(samples(run_of(tmp_path)), samples(run_of(tmp_path / "whole")), strict=True)
    assert all(np.abs(a - b).max() <= 1 for a, b in pairs)


OTHER = {
    "seed": (["--seed", "8"], "seed 8 is not the run's 7"),
    "steps": (["-c", "4"], "custom_steps 4 is not the run's 3"),
    "eta": (["-e", "0"], "eta 0.0 is not the run's 1.0"),
    "sampler": (["--dpm"], "sampler dpm is not"),
    "vanilla": (["-v"], "vanilla_sample True is not"),
    "classes": (["--classes", "1"], "classes ['1'] is not the run's None"),
    "scale": (["--scale", "2"], "scale 2.0 is not the run's 1.0"),
    "precision": (["--precision", "float16"], "precision float16 is not"),
    "fewer": (["-n", "1"], "the run is of 2 samples"),
    "logdir": (["-l", "elsewhere"], "leave out --logdir"),
    "model": (["-r", "{models}/guided"], "the run is of"),
    "override": (["model.params.scale_factor=0.4"], "overrides"),
}


@pytest.fixture(scope="module")
def finished(sample, models, tmp_path_factory):
    base = tmp_path_factory.mktemp("finished")
    assert sample(["-r", str(models / "faces"), "-l", str(base), "-n", "2", "-c", "3", "--seed", "7"]) == 0
    return run_of(base)


@pytest.mark.parametrize("case", OTHER)
def test_a_run_goes_on_as_it_began_or_not_at_all(draw, models, finished, capsys, case):
    options, message = OTHER[case]
    options = [option.replace("{models}", str(models)) for option in options]
    assert draw(None, "--continue", finished, *options) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and message in error.splitlines()[-1]


def test_a_model_that_was_trained_on_is_told(draw, models, tmp_path, capsys):
    shutil.copytree(models / "faces", tmp_path / "faces")
    assert draw(None, "-r", tmp_path / "faces", "-n", 1, "-c", 1) == 0
    write_model(tmp_path / "faces", unconditional_config(timesteps=20), global_step=1235)
    assert draw(None, "--continue", run_of(tmp_path), "-n", 2) == 2
    assert "is of step 1235, the run of 1234" in capsys.readouterr().err
    (tmp_path / "faces" / "model.ckpt").unlink()
    assert draw(None, "--continue", run_of(tmp_path), "-n", 2) == 2
    assert "which is not there" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, "- 1", "{", "seed: 1", "n_samples: many"])
def test_what_is_no_run_is_one_line(draw, tmp_path, capsys, content):
    if content is not None:
        (tmp_path / "sampling_config.yaml").write_text(content)
    assert draw(None, "--continue", tmp_path) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: --continue") and "\n" not in error


@pytest.mark.parametrize(
    "damage", [lambda path: path.write_bytes(b"x"), lambda path: Image.new("RGB", (2, 2)).save(path)]
)
def test_a_damaged_sample_is_named(draw, tmp_path, capsys, damage):
    assert draw("faces", "-n", 2) == 0
    folder = run_of(tmp_path)
    damage(folder / "img" / "sample_000001.png")
    (folder / "numpy" / "2x16x16x3-samples.npz").unlink()
    assert draw(None, "--continue", folder) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "sample_000001.png" in error and "delete it and go on" in error
    assert not list((folder / "numpy").iterdir())
    (folder / "img" / "sample_000001.png").unlink()
    assert draw(None, "--continue", folder) == 0


# -- mistakes --------------------------------------------------------------------------------------------------

BAD = {
    "no model named": ([], "name its folder with -r"),
    "no such model": (["-r", "nope"], "no model"),
    "two models": (["-r", "{models}/faces", "--model", "x"], "leave out --model"),
    "from boxes": (["-r", "{models}/boxes"], "choose a class-conditional model"),
    "classes of nothing": (["-r", "{models}/faces", "--classes", "1"], "leave out --classes"),
    "guidance from nothing": (["-r", "{models}/faces", "--scale", "2"], "leave out --scale"),
    "no null class": (["-r", "{models}/unguided", "--scale", "2"], "no null class"),
    "unknown class": (["-r", "{models}/drawings", "--classes", "rockett"], 'did you mean "rocket"'),
    "class beyond": (["-r", "{models}/guided", "--classes", "0-3"], "are 0 to 2"),
    "steps": (["-r", "{models}/faces", "-c", "21"], "20 or fewer"),
    "noisy dpm": (["-r", "{models}/faces", "--dpm", "-e", "1"], "deterministic"),
    "stray word": (["-r", "{models}/faces", "words"], "model.key.sub=value"),
    "another section": (["-r", "{models}/faces", "data.params.x=1"], "model.key.sub=value"),
    "unknown value": (["-r", "{models}/faces", "model.params.timestep=9"], 'did you mean "timesteps"'),
    "logdir is a file": (["-r", "{models}/faces", "-l", "{models}/faces/config.yaml"], "is a file"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_one_line_and_nothing_is_written(sample, models, tmp_path, monkeypatch, capsys, case):
    options, message = BAD[case]
    monkeypatch.chdir(tmp_path)
    before = sorted(models.rglob("*"))
    assert sample(["-n", "1", "-c", "1", *(option.replace("{models}", str(models)) for option in options)]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("error: ") and message in error[-1]
    assert not list(tmp_path.iterdir()) and sorted(models.rglob("*")) == before


def test_the_published_options_keep_their_defaults():
    args = vars(TASK.make_parser().parse_args([]))
    published = {"resume": None, "n_samples": 50_000, "vanilla_sample": False, "logdir": "none", "custom_steps": 50}
    assert {key: args[key] for key in published} == published and args["batch_size"] == 10
    settings = TASK._sampler(TASK.make_parser().parse_args([]), {"params": {}})
    assert settings == {"sampler": "ddim", "steps": 50, "eta": 1.0}


def test_the_example_works_as_typed(sample, models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(models / "drawings", tmp_path / "models/ldm/emoji64")
    assert sample([*shlex.split(TASK.example)[2:], "-c", "1"]) == 0
    folder = run_of(tmp_path / "outputs", "emoji64")
    assert array(folder)["arr_0"].shape == (64, 16, 16, 3)
    assert Image.open(folder / "grid.png").size == (8 * 18 + 2, 8 * 18 + 2)


@pytest.mark.parametrize("name", ["celeba256", "ffhq256", "lsun_beds256", "lsun_churches256"])
def test_the_published_models_go_through(repo_root, name):
    """Their shapes, on the device that computes no values."""
    config = read_config(repo_root / "models" / "ldm" / name / "config.yaml")
    with torch.device("meta"):
        model = instantiate_from_config(inference.for_inference(config))
    size = TASK.size(config)
    assert size == {"height": 256, "width": 256} and class_conditioning(model, [{}]) == (None, None)
    side = 256 // model.downsampling
    latents = torch.empty(2, model.channels, side, side, device="meta")
    assert model.apply_model(latents, torch.empty(2, device="meta"), None).shape == latents.shape
