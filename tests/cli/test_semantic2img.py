"""Tests of the command `semantic2img` with a tiny model."""

from __future__ import annotations

import shlex

import numpy as np
import pytest
import torch
from PIL import Image
from task_checks import assert_one_line, assert_replays, assert_same_at_every_batch_size, pixels, samples
from tiny_models import map_config, text_config, write_model

from ldm.cli import replay
from ldm.cli.semantic2img import Semantic2Img, main
from ldm.config.instantiate import instantiate_from_config
from ldm.config.model_config import read_config
from ldm.config.model_info import ModelInfo
from ldm.errors import UserError
from ldm.io.pixels import pad_to_multiple
from ldm.pipelines.generation import Item, generate
from ldm.pipelines.loading import load_model, skip_init
from ldm.pipelines.semantic import label_colours

TASK = Semantic2Img()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Return a folder with a model of eight labels, another model, and label maps."""
    base = tmp_path_factory.mktemp("semantic2img")
    write_model(base / "tiny", map_config(8))
    write_model(base / "text", text_config())
    (base / "maps").mkdir()
    random = np.random.default_rng(0)
    for name, size in {"a": (16, 16), "b": (10, 23), "c": (16, 16)}.items():
        Image.fromarray(random.integers(0, 8, size, np.uint8)).save(base / f"maps/{name}.png")
    return base


@pytest.fixture
def sample(base, tmp_path):
    """Return a function that runs the command with a tiny model and returns its exit status."""

    def run(*options: object, model="tiny") -> int:
        fixed = ["--model", base / model, "--steps", 2, "--seed", 1, "--outdir", tmp_path / "out"]
        return main([str(each) for each in (*fixed, *options)])

    return run


def test_image_does_not_depend_on_the_batch_size(base, tmp_path):
    fixed = ["--model", base / "tiny", "--map", base / "maps", "--steps", 2, "--n_samples", 3, "--eta", 1]
    assert_same_at_every_batch_size(TASK, fixed, tmp_path)


def test_images_have_the_size_of_their_maps_and_replay(sample, base, tmp_path):
    assert sample("--map", base / "maps", "--batch_size", 2) == 0
    assert [pixels(path).shape for path in samples(tmp_path / "out")] == [(16, 16, 3), (10, 23, 3), (16, 16, 3)]
    assert_replays(replay.main, tmp_path / "out")


def test_grid_shows_the_map_in_colours_beside_the_image(sample, base, tmp_path):
    assert sample("--map", base / "maps/a.png") == 0
    grid = pixels(tmp_path / "out/grid-0000.png")
    assert (grid[2:18, 2:18] == label_colours(8, None)[pixels(base / "maps/a.png")]).all()
    assert (grid[2:18, 20:36] == pixels(samples(tmp_path / "out")[0])).all()


@pytest.mark.parametrize(
    ("options", "size"), [(("--H", 20), (20, 46)), (("--W", 12), (5, 12)), (("--H", 9, "--W", 30), (9, 30))]
)
def test_size_options_set_the_image_size(sample, base, tmp_path, options, size):
    assert sample("--map", base / "maps/b.png", *options) == 0
    assert pixels(samples(tmp_path / "out")[0]).shape == (*size, 3)


def test_network_runs_on_the_whole_of_a_large_map(base, monkeypatch):
    """Each step is one call, with latents as large as the map needs and the map beside them."""
    model = load_model(base / "tiny/config.yaml", base / "tiny/model.ckpt")
    info = ModelInfo("tiny", read_config(base / "tiny/config.yaml"))
    pipeline = TASK.pipeline(
        TASK.make_parser().parse_args(["--map", "x", "--steps", "2", "--H", "50", "--W", "101"]), info
    )
    request = TASK.read({"map": str(base / "maps/a.png")}, pipeline)
    shapes, conds = [], []
    predict = model.apply_model
    monkeypatch.setattr(
        model, "apply_model", lambda x, t, c: (shapes.append(tuple(x.shape)), conds.append(c), predict(x, t, c))[-1]
    )
    (sampled,) = generate(pipeline, model, [Item(0, 1, request)], count=1, progress=False)
    assert sampled.pixels.shape == (50, 101, 3) and shapes == 2 * [(1, 3, 26, 52)]
    # The conditioning is linear in the map: the mean of each 2 × 2 block, multiplied by the learned matrix.
    padded = pad_to_multiple(request, info.size.multiple)
    one_hot = np.eye(8)[padded].reshape(26, 2, 52, 2, 8).mean(axis=(1, 3))
    weight = model.cond_stage_model.channel_mapper.weight[:, :, 0, 0].numpy()
    assert np.allclose(conds[0][0].permute(1, 2, 0).numpy(), one_hot @ weight.T, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no palette"),
        ("", "is empty"),
        ("sky 3", 'no valid colour and label in "sky 3"'),
        ("#87ceeb", "is damaged"),
        ("#87ceeb sky", "is damaged"),
        ("#87ceeb -1", "no valid colour and label"),
        ("#87ceeb 1\n#87CEEB 2", "assigns two labels to #87CEEB"),
    ],
)
def test_invalid_palette_is_one_line(sample, base, tmp_path, capsys, text, message):
    if text is not None:
        (tmp_path / "p.txt").write_text(text)
    status = sample("--map", base / "maps/a.png", "--palette", tmp_path / "p.txt")
    assert_one_line(status, capsys.readouterr().err, message)


def test_the_palette_of_the_model_is_the_default(sample, base, tmp_path):
    """A model folder with its palette reads colour images in every place."""
    config = map_config(8)
    config["params"]["palette"] = "palette.txt"
    write_model(base / "coloured", config)
    colours = [f"#0000{label:02x}" for label in range(8)]
    text = "".join(f"{colour} {7 - label} name\n" for label, colour in enumerate(colours))
    (base / "coloured/palette.txt").write_text(text)
    labels = pixels(base / "maps/a.png")
    save(tmp_path / "coloured.png", np.stack([0 * labels, 0 * labels, 7 - labels], axis=-1).astype(np.uint8))
    assert sample("--map", tmp_path / "coloured.png", "--skip_grid", model="coloured") == 0
    coloured, plain = samples(tmp_path / "out")[0], tmp_path / "plain"
    assert sample("--map", base / "maps/a.png", "--skip_grid", "--outdir", plain) == 0
    assert (pixels(coloured) == pixels(samples(plain)[0])).all()


def save(path, array):
    Image.fromarray(array).save(path)


BAD = {
    "no map": (lambda path: None, "there is no label map"),
    "no image": (lambda path: path.write_text("x"), "cannot read the label map"),
    "too many labels": (
        lambda path: save(path, np.array([[3, 255]], np.uint8)), "has the label 255; this model has 8, from 0 to 7"
    ),
    "colours without a palette": (
        lambda path: save(path, np.zeros((4, 4, 3), np.uint8)), "give the label of each colour with --palette"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_invalid_map_is_one_line_and_does_not_stop_the_others(sample, base, tmp_path, capsys, caplog, case):
    make, message = BAD[case]
    make(tmp_path / "bad.png")
    assert sample("--map", tmp_path / "bad.png", base / "maps/a.png") == 2
    assert message in caplog.text and "1 of 2 failed" in capsys.readouterr().err
    assert len(samples(tmp_path / "out")) == 1


def test_other_models_are_an_error(sample, base, capsys):
    status = sample("--map", base / "maps/a.png", model="text")
    assert_one_line(status, capsys.readouterr().err, 'is conditioned on "caption", not on label maps')


def test_default_model_is_the_larger_published_one(base, tmp_path, monkeypatch):
    monkeypatch.setattr("ldm.config.assets.ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="run ldm download_weights semantic_synthesis512"):
        TASK.choose_model(TASK.make_parser().parse_args(["--map", "x"]))
    for name in ("semantic_synthesis256", "semantic_synthesis512"):
        folder = tmp_path / "models/ldm" / name
        folder.mkdir(parents=True)
        for file in ("config.yaml", "model.ckpt"):
            (folder / file).write_bytes((base / "tiny" / file).read_bytes())
        assert TASK.choose_model(TASK.make_parser().parse_args(["--map", "x"])).name == name


@pytest.mark.parametrize("name", ["semantic_synthesis256", "semantic_synthesis512"])
def test_published_models_take_maps_of_512_x_1024(repo_root, name):
    """The shapes are checked on the meta device."""
    config = read_config(repo_root / f"models/ldm/{name}/config.yaml")
    info = ModelInfo(name, config)
    pipeline = TASK.pipeline(TASK.make_parser().parse_args(["--map", "x"]), info)
    pipeline.check(info)
    assert (pipeline.labels, info.size.multiple) == (182, 16)
    config["params"]["use_ema"] = False
    with torch.device("meta"), skip_init():
        model = instantiate_from_config(config)
    cond = model.get_learned_conditioning(torch.empty(1, 182, 512, 1024, device="meta"))
    assert cond.shape == (1, 3, 128, 256)
    x = torch.empty(1, 3, 128, 256, device="meta")
    assert model.apply_model(x, torch.zeros(1, dtype=torch.int64, device="meta"), cond).shape == x.shape


def test_example_works_as_typed(repo_root, tmp_path, monkeypatch):
    """A tiny model replaces the published one, at a smaller size."""
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "tiny", map_config(182))
    words = [*shlex.split(TASK.arguments), "--model", "tiny", "--steps", "1"]
    assert main([*words, "--H", "64"]) == 0
    assert pixels(samples(tmp_path / "outputs/semantic2img-samples")[0]).shape == (64, 128, 3)
    assert pixels(repo_root / "data/semantic_examples/lake.png").shape == (512, 1024)
