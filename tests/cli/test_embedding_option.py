"""Tests of the option --embedding of commands that sample: files of textual inversions."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from tiny_models import write_model
from tiny_stable_diffusion import v1_config

from ldm.cli.img2img import main as img2img
from ldm.cli.metadata import Record
from ldm.cli.options import embedding
from ldm.cli.replay import main as replay
from ldm.cli.txt2img import main as txt2img

SIZE = ["--H", "16", "--W", "16", "--n_samples", "1"]
RUN = ["--ddim_steps", "2", "--seed", "1", "--skip_grid"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("v1")
    write_model(folder / "m", v1_config(folder))
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(2, 16, generator=generator)
    torch.save({"<toy>": vectors}, folder / "toy.bin")
    torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}}, folder / "gs.pt")
    torch.save({"<wide>": torch.zeros(1, 768)}, folder / "wide.bin")
    return folder


@pytest.fixture
def run(shared, tmp_path, monkeypatch):
    """Return a function that runs txt2img with a prompt in the folder of the files, and returns its image."""
    monkeypatch.chdir(shared)

    def sample(prompt, *options):
        out = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
        assert txt2img(["--model", "m", *RUN, *SIZE, "--prompt", prompt, "--outdir", str(out), *options]) == 0
        return out / "samples/0000.png"

    return sample


def pixels(path):
    return Image.open(path).tobytes()


def test_prompts_with_the_token_change(run):
    plain = pixels(run("a <toy>"))
    with_toy = pixels(run("a <toy>", "--embedding", "toy.bin"))
    assert with_toy != plain
    assert pixels(run("a cat", "--embedding", "toy.bin")) == pixels(run("a cat"))
    assert pixels(run("a *", "--embedding", "gs.pt")) == with_toy, "the same vectors"
    assert pixels(run("a <my-toy>", "--embedding", "gs.pt:<my-toy>")) == with_toy


def test_metadata_names_the_file_and_replay_uses_it(run, capsys):
    path = run("a <toy> * b", "--embedding", "toy.bin", "--embedding", "gs.pt:*")
    text = Image.open(path).text
    assert text["embeddings"] == "toy.bin, gs.pt:*"
    assert json.loads(text["ldm"])["embeddings"] == [["toy.bin", None], ["gs.pt", "*"]]
    assert replay([str(path)]) == 0 and "identical" in capsys.readouterr().out
    record = json.loads(Image.open(run("a cat")).text["ldm"])
    assert "embeddings" not in record


def test_replay_finds_a_file_above_the_image(shared, tmp_path, monkeypatch, capsys):
    write_model(tmp_path / "m", v1_config(tmp_path))
    torch.save({"<toy>": torch.ones(1, 16)}, tmp_path / "toy.bin")
    monkeypatch.chdir(tmp_path)
    command = ["--model", "m", *RUN, *SIZE, "--prompt", "a <toy>", "--embedding", "toy.bin", "--outdir", "out"]
    assert txt2img(command) == 0
    monkeypatch.chdir(shared.parent)
    assert replay([str(tmp_path / "out/samples/0000.png")]) == 0 and "identical" in capsys.readouterr().out
    (tmp_path / "toy.bin").unlink()
    assert replay([str(tmp_path / "out/samples/0000.png")]) == 2
    assert 'there is no embedding "toy.bin"' in capsys.readouterr().err


def test_other_commands_take_the_option(run, shared, tmp_path):
    Image.new("RGB", (16, 16), "red").save(tmp_path / "red.png")
    images = []
    for name, options in (("with", ["--embedding", "toy.bin"]), ("without", [])):
        out = tmp_path / name
        command = ["--model", "m", *RUN, "--init-img", str(tmp_path / "red.png"), "--prompt", "a <toy>"]
        assert img2img([*command, "--strength", "1.0", "--outdir", str(out), *options]) == 0
        images.append(pixels(next(out.rglob("*.png"))))
    assert images[0] != images[1]


@pytest.mark.parametrize("embeddings", ["x", [["x"]], [["x", 3]], [[1, None]], [["x", "y", "z"]]])
def test_damaged_record_raises_type_error(run, embeddings):
    record = json.loads(Image.open(run("a cat")).text["ldm"])
    with pytest.raises(TypeError):
        Record._parsed({**record, "embeddings": embeddings})


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("cat.pt", ("cat.pt", None)),
        ("a/cat.pt:<my-cat>", ("a/cat.pt", "<my-cat>")),
        ("cat.pt:*", ("cat.pt", "*")),
        ("C:\\files\\cat.pt", ("C:\\files\\cat.pt", None)),
        ("/a:b/cat.pt", ("/a:b/cat.pt", None)),
        ("my:cat.safetensors", ("my:cat.safetensors", None)),
        ("cat", ("cat", None)),
        ("cat.pt:", ("cat.pt:", None)),
    ],
)
def test_values_of_the_option(text, parsed):
    assert embedding(text) == parsed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--embedding", "none.pt"], 'there is no embedding "none.pt"; check the path, or download it first'),
        (["--embedding", "wide.bin"], 'the embedding "wide.bin" belongs to another model: its vectors have the shape'),
        (["--embedding", "toy.bin", "--embedding", "gs.pt:<toy>"], 'the token "<toy>" exists already; give each'),
        (["--embedding", "toy.bin:cat"], 'the embedding "toy.bin": the token "cat" is a word of the vocabulary'),
        (["--embedding", "m/model.ckpt"], "is not an embedding: it holds no vectors by token; give the file"),
        (["--ckpt", "toy.bin"], "leave out --config and --ckpt"),
    ],
)
def test_unsuitable_files_raise_user_error(options, message, shared, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(shared)
    command = ["--model", "m", *RUN, *SIZE, "--prompt", "a cat", "--outdir", str(tmp_path / "out"), *options]
    assert txt2img(command) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in error
    assert not (tmp_path / "out").exists()
