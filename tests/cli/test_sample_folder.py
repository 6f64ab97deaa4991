"""Tests of `ldm.cli.sample_folder`, through the command `sample_diffusion` with tiny models."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import yaml
from PIL import Image
from sample_runs import array, only, run_of, same, samples
from tiny_models import class_config, unconditional_config, write_model

from ldm.cli import sample_folder
from ldm.cli.metadata import Record
from ldm.cli.sample_diffusion import SampleDiffusion, main
from ldm.pipelines.classes import ClassToImage
from ldm.pipelines.generation import BatchPosition


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return an unconditional and a class-conditional model."""
    base = tmp_path_factory.mktemp("models")
    write_model(base / "faces", unconditional_config(timesteps=20), global_step=1234)
    write_model(base / "guided", class_config(4, cond_dropout=0.1))
    return base


@pytest.fixture
def sample(models, tmp_path):
    """Return a function that runs the command in few steps and returns its exit status."""

    def run(model: str | None, *options: object) -> int:
        fixed = [] if model is None else ["-r", models / model, "-l", tmp_path, "-c", 3, "--seed", 7]
        return main([str(each) for each in (*fixed, *options)])

    return run


# -- files -----------------------------------------------------------------------------------------------------


def test_published_files_are_written(sample, tmp_path, capsys):
    assert sample("faces", "-n", 5, "--batch_size", 2) == 0
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


def test_default_logdir_is_the_folder_of_the_model(models, tmp_path):
    shutil.copytree(models / "faces", tmp_path / "faces")
    for given in ("faces", "faces/model.ckpt"):
        assert main(["-r", str(tmp_path / given), "-n", "1", "-c", "1"]) == 0
    assert len(list((tmp_path / "faces" / "samples" / "00001234").iterdir())) == 2


def test_training_run_is_a_model(models, tmp_path):
    run = tmp_path / "logs" / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "configs").mkdir()
    shutil.copy(models / "faces" / "model.ckpt", run / "checkpoints" / "last.ckpt")
    for time in ("2024", "2025"):
        shutil.copy(models / "faces" / "config.yaml", run / "configs" / f"{time}-project.yaml")
    for given in (run, run / "checkpoints" / "last.ckpt"):
        assert main(["-r", str(given), "-n", "1", "-c", "1"]) == 0
        shutil.rmtree(only((run / "samples" / "00001234").iterdir()))


def test_runs_of_the_same_second_have_separate_folders(sample, tmp_path, monkeypatch):
    monkeypatch.setattr(sample_folder.time, "strftime", lambda form: "now")
    assert sample("faces", "-n", 1) == sample("faces", "-n", 1) == 0
    assert sorted(path.name for path in (tmp_path / "faces/samples/00001234").iterdir()) == ["now", "now_1"]


def test_runs_at_the_same_time_have_separate_folders(sample, tmp_path, monkeypatch):
    """A second run starts and ends while the first one loads its model."""
    load = SampleDiffusion.load_model

    def overtaken(self, *args):
        monkeypatch.setattr(SampleDiffusion, "load_model", load)
        assert sample("guided", "-n", 4, "--classes", "1-2", "--seed", 100) == 0
        return load(self, *args)

    monkeypatch.setattr(sample_folder.time, "strftime", lambda form: "now")
    monkeypatch.setattr(SampleDiffusion, "load_model", overtaken)
    assert sample("guided", "-n", 6, "--classes", "0-2") == 0
    (parent,) = (tmp_path / "guided" / "samples").iterdir()
    assert sorted(path.name for path in parent.iterdir()) == ["now", "now_1"]
    for name, seed, count, classes in (("now", 100, 4, [1, 2]), ("now_1", 7, 6, [0, 1, 2])):
        folder = parent / name
        seeds = [Image.open(path).text["seed"] for path in sorted((folder / "img").iterdir())]
        assert seeds == [str(seed + i) for i in range(count)]
        arrays = array(folder)
        assert arrays["seeds"].tolist() == [seed + i for i in range(count)]
        assert arrays["arr_1"].tolist() == [classes[i % len(classes)] for i in range(count)]
        assert same(list(arrays["arr_0"].astype(int)), samples(folder))
        assert yaml.safe_load((folder / "sampling_config.yaml").read_text())["seed"] == seed


def test_two_processes_may_continue_one_run(sample, tmp_path, monkeypatch):
    """Neither replaces a sample of the other."""
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, 1)
        assert sample("faces", "-n", 6, "--batch_size", 2) == 130
    folder, load = run_of(tmp_path), SampleDiffusion.load_model
    times: dict = {}

    def overtaken(self, *args):
        monkeypatch.setattr(SampleDiffusion, "load_model", load)
        assert sample(None, "--continue", folder) == 0
        times.update({path: path.stat().st_mtime_ns for path in (folder / "img").iterdir()})
        return load(self, *args)

    monkeypatch.setattr(SampleDiffusion, "load_model", overtaken)
    assert sample(None, "--continue", folder) == 0
    assert len(times) == 6 and times == {path: path.stat().st_mtime_ns for path in (folder / "img").iterdir()}
    assert (array(folder)["arr_0"] == np.stack(samples(folder))).all()


# -- continuing ------------------------------------------------------------------------------------------------


def interrupt_after(monkeypatch, batches):
    sample, left = ClassToImage.sample, iter([True] * batches)

    def interrupted(self, *args):
        if next(left, False):
            return sample(self, *args)
        raise KeyboardInterrupt

    monkeypatch.setattr(ClassToImage, "sample", interrupted)


@pytest.mark.parametrize("model", ["faces", "guided"])
def test_interrupted_run_continues(sample, tmp_path, capsys, model):
    assert sample(model, "-n", 7, "--batch_size", 2, "-l", tmp_path / "whole") == 0
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, 2)
        assert sample(model, "-n", 7, "--batch_size", 2) == 130
    folder = run_of(tmp_path, model)
    assert len(list((folder / "img").iterdir())) == 4 and not (folder / "numpy").exists()
    assert f"4 of 7 samples are finished; continue with --continue {folder}" in capsys.readouterr().out
    (folder / "img" / "sample_000000.png").unlink()  # one more is missing
    before = {path: path.stat().st_mtime_ns for path in (folder / "img").iterdir()}
    assert sample(None, "--continue", folder) == 0
    assert before == {path: path.stat().st_mtime_ns for path in before}, "no sample is sampled twice"
    whole = run_of(tmp_path / "whole", model)
    assert same(samples(folder), samples(whole))
    for name, values in array(whole).items():
        assert (array(folder)[name] == values).all()


def test_weights_are_always_packed(sample, tmp_path):
    """A continued run must equal an uninterrupted one, although less of it is left."""
    assert sample("faces", "-n", 3, "--batch_size", 2) == 0
    positions = [Record.read(path).position for path in sorted((run_of(tmp_path) / "img").iterdir())]
    assert positions == [BatchPosition(0, 0, 2, True), BatchPosition(1, 1, 2, True), BatchPosition(2, 0, 1, True)]


def test_run_can_be_extended(sample, tmp_path):
    assert sample("guided", "-n", 7, "-l", tmp_path / "whole") == 0
    assert sample("guided", "-n", 4) == 0
    folder = run_of(tmp_path, "guided")
    assert sample(None, "--continue", folder, "-n", 7, "--batch_size", 3) == 0
    grown, whole = samples(folder), samples(run_of(tmp_path / "whole", "guided"))
    assert all(np.abs(a - b).max() <= 1 for a, b in zip(grown, whole, strict=True))
    assert sorted(path.name for path in (folder / "numpy").iterdir()) == [
        "4x16x16x3-samples.npz",
        "7x16x16x3-samples.npz",
    ]
    assert yaml.safe_load((folder / "sampling_config.yaml").read_text())["n_samples"] == 7


def test_finished_run_samples_nothing(sample, tmp_path, capsys):
    assert sample("faces", "-n", 2) == 0
    folder = run_of(tmp_path)
    (folder / "numpy" / "2x16x16x3-samples.npz").unlink()
    assert sample(None, "--continue", folder) == 0 and len(array(folder)["arr_0"]) == 2
    capsys.readouterr()
    assert sample(None, "--continue", folder) == 0
    assert capsys.readouterr().out.startswith("all 2 samples are finished")


def test_continued_run_keeps_the_overrides(sample, models, tmp_path, monkeypatch):
    given = "model.params.scale_factor=0.3"
    assert sample("faces", "-n", 4, "-l", tmp_path / "whole", given) == 0
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, 1)
        assert sample("faces", "-n", 4, "--batch_size", 2, given) == 130
    assert sample(None, "-r", models / "faces", "--continue", run_of(tmp_path), "--seed", 7, given) == 0
    pairs = zip(samples(run_of(tmp_path)), samples(run_of(tmp_path / "whole")), strict=True)
    assert all(np.abs(a - b).max() <= 1 for a, b in pairs)


OTHER = {
    "seed": (["--seed", "8"], "seed 8 differs from the run's 7"),
    "steps": (["-c", "4"], "custom_steps 4 differs from the run's 3"),
    "eta": (["-e", "0"], "eta 0.0 differs from the run's 1.0"),
    "sampler": (["--dpm"], "sampler dpm differs from the run's ddim"),
    "vanilla": (["-v"], "vanilla_sample True differs from the run's False"),
    "classes": (["--classes", "1"], "classes ['1'] differs from the run's None"),
    "scale": (["--scale", "2"], "scale 2.0 differs from the run's 1.0"),
    "precision": (["--precision", "float16"], "precision float16 differs from the run's float32"),
    "fewer": (["-n", "1"], "the run has 2 samples; give as many or more"),
    "logdir": (["-l", "elsewhere"], "leave out --logdir"),
    "model": (["-r", "{models}/guided"], "the run uses the model"),
    "override": (
        ["model.params.scale_factor=0.4"],
        "overrides ['model.params.scale_factor=0.4'] differs from the run's []",
    ),
}


@pytest.fixture(scope="module")
def finished(models, tmp_path_factory):
    base = tmp_path_factory.mktemp("finished")
    assert main(["-r", str(models / "faces"), "-l", str(base), "-n", "2", "-c", "3", "--seed", "7"]) == 0
    return run_of(base)


@pytest.mark.parametrize("case", OTHER)
def test_continued_run_refuses_other_options(sample, models, finished, capsys, case):
    options, message = OTHER[case]
    options = [option.replace("{models}", str(models)) for option in options]
    assert sample(None, "--continue", finished, *options) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and message in error.splitlines()[-1]


def test_continued_run_refuses_other_weights(sample, models, tmp_path, capsys):
    shutil.copytree(models / "faces", tmp_path / "faces")
    assert sample(None, "-r", tmp_path / "faces", "-n", 1, "-c", 1) == 0
    write_model(tmp_path / "faces", unconditional_config(timesteps=20), global_step=1235)
    assert sample(None, "--continue", run_of(tmp_path), "-n", 2) == 2
    assert "is from step 1235, the run from 1234" in capsys.readouterr().err
    (tmp_path / "faces" / "model.ckpt").unlink()
    assert sample(None, "--continue", run_of(tmp_path), "-n", 2) == 2
    assert "which is missing; restore it" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, "- 1", "{", "seed: 1", "n_samples: many"])
def test_invalid_run_is_one_line(sample, tmp_path, capsys, content):
    if content is not None:
        (tmp_path / "sampling_config.yaml").write_text(content)
    assert sample(None, "--continue", tmp_path) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: --continue") and "\n" not in error


@pytest.mark.parametrize(
    "damage", [lambda path: path.write_bytes(b"x"), lambda path: Image.new("RGB", (2, 2)).save(path)]
)
def test_error_names_a_damaged_sample(sample, tmp_path, capsys, damage):
    assert sample("faces", "-n", 2) == 0
    folder = run_of(tmp_path)
    damage(folder / "img" / "sample_000001.png")
    (folder / "numpy" / "2x16x16x3-samples.npz").unlink()
    assert sample(None, "--continue", folder) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "sample_000001.png" in error and "delete it and use --continue" in error
    assert not list((folder / "numpy").iterdir())
    (folder / "img" / "sample_000001.png").unlink()
    assert sample(None, "--continue", folder) == 0
