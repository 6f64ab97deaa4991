"""Tests of `ldm.cli.recorded_files`: `replay` from another folder finds the files that a record names."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from PIL import Image
from tiny_models import inpainting_config, map_config, superresolution_config, text_config, write_model

from ldm.cli import img2img, inpaint, replay, semantic2img, superres
from ldm.cli.recorded_files import RecordedFiles
from ldm.errors import UserError
from ldm.io.files import sha256

IMG2IMG = ["--image", "pics/a.png", "--prompt", "fox", "--n_samples", "1"]
COMMANDS = {
    "img2img": (img2img, text_config(), IMG2IMG, "out/samples"),
    "inpaint": (inpaint, inpainting_config(), ["--image", "pics/a.png"], "out"),
    "superres": (superres, superresolution_config(), ["--indir", "pics"], "out"),
    "semantic2img": (semantic2img, map_config(), ["--map", "pics/a_mask.png"], "out/samples"),
}


def draw(path, seed: int = 0) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Return a function that samples in the folder `run` with relative paths, and changes to the folder `elsewhere`.

    It returns the sampled image.
    """

    def sample(kind: str):
        command, config, words, out = COMMANDS[kind]
        write_model(tmp_path / "run/tiny", config)
        draw(tmp_path / "run/pics/a.png")
        mask = np.zeros((16, 16), np.uint8)
        mask[4:12, 4:12] = 150
        Image.fromarray(mask).save(tmp_path / "run/pics/a_mask.png")
        monkeypatch.chdir(tmp_path / "run")
        fixed = ["--model", "tiny", "--steps", "2", "--seed", "1", "--outdir", "out", "--skip_grid"]
        assert command.main([*fixed, *words]) == 0
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        return min((tmp_path / "run" / out).glob("*.png"))

    return sample


@pytest.fixture
def moved(tmp_path, run):
    """Return the same for an image that is then moved alone to `elsewhere`; the inputs move to `inputs`."""

    def sample(kind: str):
        path = shutil.move(run(kind), tmp_path / "elsewhere/result.png")
        shutil.move(tmp_path / "run/pics", tmp_path / "inputs")
        return path

    return sample


def replayed(capsys, *words: object) -> tuple[int, str, str]:
    """Return the exit status, and the last lines on stdout and stderr."""
    status = replay.main([str(word) for word in words])
    printed = capsys.readouterr()
    return status, *((text.strip().splitlines() or [""])[-1] for text in printed)


@pytest.mark.parametrize("kind", COMMANDS)
def test_results_in_the_folder_of_the_run_replay_from_anywhere(run, capsys, kind):
    """Also the model has a relative path."""
    path = run(kind)
    capsys.readouterr()
    assert replayed(capsys, path)[:2] == (0, f"{path}: identical")


@pytest.mark.parametrize("kind", COMMANDS)
def test_moved_result_needs_its_input_and_finds_it(moved, tmp_path, capsys, kind):
    path, model = moved(kind), ["--model", tmp_path / "run/tiny"]
    capsys.readouterr()
    status, _, error = replayed(capsys, path, *model)
    name = "pics/a_mask.png" if kind == "semantic2img" else "pics/a.png"
    assert status == 2
    assert error == (
        f'error: the input "{name}" of "{path}" is neither in the current folder nor in a folder above the image nor '
        "beside the image; name its folder with --input-dir"
    )
    assert replayed(capsys, path, *model, "--input-dir", tmp_path / "inputs")[:2] == (0, f"{path}: identical")


def test_error_names_the_folders_that_were_searched(moved, tmp_path, capsys):
    path = moved("img2img")
    empty = tmp_path / "empty"
    empty.mkdir()
    draw(empty / "a.png", seed=7)
    status, _, error = replayed(capsys, path, "--model", tmp_path / "run/tiny", "--input-dir", empty)
    assert status == 2 and f'nor beside the image nor in "{empty}"; name its folder' in error
    options = ["--model", tmp_path / "run/tiny", "--input-dir", empty, "--input-dir", tmp_path / "inputs"]
    assert replayed(capsys, path, *options)[0] == 0, "the option may be repeated"
    status, _, error = replayed(capsys, path, "--input-dir", tmp_path / "none")
    assert (status, error) == (2, f'error: --input-dir "{tmp_path / "none"}": there is no such folder; check the path')


def test_moved_model_is_named(moved, tmp_path, capsys):
    path = moved("img2img")
    status, _, error = replayed(capsys, path, "--input-dir", tmp_path / "inputs")
    assert status == 2
    assert error == (
        'error: the model "tiny" was at "tiny/config.yaml", which is missing in the current folder and in the folders '
        "above the image; name it with --model or --ckpt"
    )


def test_model_of_the_run_is_not_mixed_with_another(run, tmp_path, capsys):
    """The current folder has a configuration under the recorded path, but not the weights."""
    path = run("img2img")
    (tmp_path / "elsewhere/tiny").mkdir()
    (tmp_path / "elsewhere/tiny/config.yaml").write_text("model: {target: none}")
    capsys.readouterr()
    assert replayed(capsys, path)[:2] == (0, f"{path}: identical")


# -- which file is meant ---------------------------------------------------------------------------------------


@pytest.fixture
def original(tmp_path, monkeypatch):
    """Return a function that copies the input to a path; the current folder is `here`."""
    draw(tmp_path / "original.png")
    for name in ("here", "results", "one", "two"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def put(path: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "original.png", tmp_path / path)

    return put


@pytest.fixture
def search(tmp_path, original):
    """Return a function that finds the input of an image in `results` by its recorded name and hash."""
    inputs = {"prompt": "x", "image_sha256": sha256(tmp_path / "original.png")}

    def find(*folders: str, name: str = "pics/a.png") -> str:
        files = RecordedFiles(tmp_path / "results/0000.png", [tmp_path / folder for folder in folders])
        found = files.find_inputs({**inputs, "image": name})
        assert found == {**inputs, "image": found["image"]}
        return str((tmp_path / "here" / found["image"]).relative_to(tmp_path))

    return find


@pytest.mark.parametrize(
    "place", ["here/pics/a.png", "results/a.png", "results/pics/a.png", "pics/a.png", "one/a.png", "one/pics/a.png"]
)
def test_input_is_found_by_its_name(original, search, place):
    original(place)
    assert search("two", "one") == place


@pytest.mark.parametrize("place", ["results/a.png", "one/a.png", "one/far/pics/a.png", "one/renamed.jpg"])
def test_input_with_an_absolute_path_is_found(original, search, place):
    original(place)
    assert search("two", "one", name="/nowhere/far/pics/a.png") == place


def test_input_is_found_by_its_content(original, search, tmp_path):
    original("two/renamed.jpg")
    draw(tmp_path / "two/a.png", seed=1)
    assert search("one", "two") == "two/renamed.jpg"


def test_file_of_the_same_name_is_not_the_input(original, search, tmp_path):
    """A file that differs is passed over wherever it is."""
    for place in ("here/pics", "results", "results/pics", "one", "two"):
        draw(tmp_path / place / "a.png", seed=3)
    original("two/b.png")
    assert search("one", "two") == "two/b.png"
    with pytest.raises(UserError, match=r'"pics/a\.png" has changed since the image was sampled, or is another file'):
        search("one")


def test_result_with_the_name_of_its_input_is_not_the_input(original, search, tmp_path):
    """In-painting and super-resolution name results after their inputs."""
    draw(tmp_path / "results/a.png", seed=2)
    original("one/a.png")
    assert search("one") == "one/a.png"
    with pytest.raises(UserError, match=r'the input "pics/a\.png" of .* is neither in the current folder'):
        search()


def test_inputs_without_a_hash_keep_their_paths(tmp_path):
    inputs = {"prompt": "x", "mask": None, "image": "a.png", "map_sha256": "0", "seed": 3}
    assert RecordedFiles(tmp_path / "x.png").find_inputs(inputs) == inputs


@pytest.mark.parametrize("name", ["", ".", "\0", "../..", "a" * 3000], ids=["empty", "dot", "null", "up", "long"])
def test_odd_names_raise_an_error(search, name):
    with pytest.raises((UserError, OSError)):
        search(name=name)


def test_each_file_is_hashed_once(original, search, monkeypatch, tmp_path):
    read = []
    monkeypatch.setattr("ldm.cli.recorded_files.sha256", lambda path: read.append(path) or sha256(path))
    for number in range(5):
        draw(tmp_path / f"one/{number}.png", seed=number + 1)
    original("one/x.png")
    for _ in range(3):
        assert search("one") == "one/x.png"
    assert len(read) == 6
