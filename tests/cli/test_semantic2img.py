"""The command that draws from maps of labels, on a tiny model."""

from __future__ import annotations

import json
import shlex

import numpy as np
import pytest
import torch
from PIL import Image
from task_checks import assert_one_line, assert_replays, assert_same_at_every_batch_size, pixels, samples
from tiny_models import map_config, text_config, write_model
from tqdm import tqdm

from ldm.config.instantiate import instantiate_from_config
from ldm.config.model_config import read_config
from ldm.config.model_files import ModelFiles
from ldm.errors import UserError
from ldm.pipelines.loading import load_model, skip_init
from ldm.tasks.label_maps import read_label_map, read_palette, resize_nearest
from ldm.tasks.run import Picture, draw_batch
from ldm.tasks.semantic2img import SemanticToImage, colours_of_labels

TASK = SemanticToImage()
COLOURS = {"#87ceeb": 3, "#102030": 5}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model of eight labels, and maps of them."""
    base = tmp_path_factory.mktemp("semantic2img")
    write_model(base / "tiny", map_config(8))
    write_model(base / "text", text_config())
    (base / "maps").mkdir()
    random = np.random.default_rng(0)
    for name, size in {"a": (16, 16), "b": (10, 23), "c": (16, 16)}.items():
        Image.fromarray(random.integers(0, 8, size, np.uint8)).save(base / f"maps/{name}.png")
    return base


@pytest.fixture
def draw(load_script, base, tmp_path):
    """Run the command on the tiny model; gives its exit status."""

    def run(*options: object, model="tiny") -> int:
        fixed = ["--model", base / model, "--steps", 2, "--seed", 1, "--outdir", tmp_path / "out"]
        return load_script("semantic2img").main([str(each) for each in (*fixed, *options)])

    return run


def test_a_picture_is_the_same_at_every_batch_size(base, tmp_path):
    fixed = ["--model", base / "tiny", "--map", base / "maps", "--steps", 2, "--n_samples", 3, "--eta", 1]
    assert_same_at_every_batch_size(TASK, fixed, tmp_path)


def test_pictures_have_the_size_of_their_maps_and_are_drawn_again(draw, base, load_script, tmp_path):
    assert draw("--map", base / "maps", "--batch_size", 2) == 0
    assert [pixels(path).shape for path in samples(tmp_path / "out")] == [(16, 16, 3), (10, 23, 3), (16, 16, 3)]
    assert_replays(load_script("replay").main, tmp_path / "out")


def test_the_map_stands_in_colours_beside_the_picture(draw, base, tmp_path):
    assert draw("--map", base / "maps/a.png") == 0
    sheet = pixels(tmp_path / "out/grid-0000.png")
    assert (sheet[2:18, 2:18] == colours_of_labels(8, None)[pixels(base / "maps/a.png")]).all()
    assert (sheet[2:18, 20:36] == pixels(samples(tmp_path / "out")[0])).all()


@pytest.mark.parametrize(
    ("options", "size"), [(("--H", 20), (20, 46)), (("--W", 12), (5, 12)), (("--H", 9, "--W", 30), (9, 30))]
)
def test_other_sizes_can_be_asked_for(draw, base, tmp_path, options, size):
    assert draw("--map", base / "maps/b.png", *options) == 0
    assert pixels(samples(tmp_path / "out")[0]).shape == (*size, 3)


def test_the_network_runs_over_the_whole_of_a_large_map(base, monkeypatch):
    """One call a step, with latents as large as the map needs and the map beside them."""
    model = load_model(base / "tiny/config.yaml", base / "tiny/model.ckpt")
    config = read_config(base / "tiny/config.yaml")
    args = TASK.make_parser().parse_args(["--map", "x", "--steps", "2", "--H", "50", "--W", "101"])
    settings = TASK.settings(args, ModelFiles("tiny", "", ""), config)
    loaded = TASK.load({"map": str(base / "maps/a.png")}, settings)
    shapes, told = [], []
    predict = model.apply_model
    monkeypatch.setattr(
        model, "apply_model", lambda x, t, c: (shapes.append(tuple(x.shape)), told.append(c), predict(x, t, c))[-1]
    )
    (image,) = draw_batch(TASK, model, [Picture(0, 1, {}, loaded)], settings, tqdm(disable=True))
    assert image.shape == (50, 101, 3) and shapes == 2 * [(1, 3, 26, 52)]
    # The conditioning is linear in the map: the mean of each 2 × 2 block, mapped by the learned matrix.
    one_hot = np.eye(8)[loaded.padded].reshape(26, 2, 52, 2, 8).mean(axis=(1, 3))
    weight = model.cond_stage_model.channel_mapper.weight[:, :, 0, 0].numpy()
    assert np.allclose(told[0][0].permute(1, 2, 0).numpy(), one_hot @ weight.T, atol=1e-5)


def test_labels_are_resized_to_what_lies_under_them():
    labels = np.arange(12).reshape(3, 4)
    assert (resize_nearest(labels, 6, 8) == np.kron(labels, np.ones((2, 2), int))).all()
    assert (resize_nearest(labels, 3, 4) == labels).all()
    image = Image.fromarray(labels.astype(np.uint8))
    for height, width in ((1, 1), (2, 3), (7, 5), (30, 17)):
        expected = np.asarray(image.resize((width, height), Image.Resampling.NEAREST))
        assert (resize_nearest(labels, height, width) == expected).all()


@pytest.mark.parametrize("mode", ["L", "P", "I;16", "I", "1"])
def test_every_picture_of_numbers_holds_labels(tmp_path, mode):
    labels = np.array([[0, 1], [1, 0]]) * (1 if mode == "1" else 5)
    if mode == "P":
        image = Image.fromarray(labels.astype(np.uint8))
        image.putpalette(bytes(range(256)) * 3)
    else:
        dtype = {"L": np.uint8, "I;16": np.uint16, "I": np.int32, "1": bool}[mode]
        image = Image.fromarray(labels.astype(dtype))
    path = tmp_path / ("x.tiff" if mode == "I" else "x.png")  # which PNG has no room for
    image.save(path)
    assert read_label_map(path).tolist() == labels.tolist()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_map_is_turned_as_its_camera_noted(tmp_path, orientation):
    labels = np.arange(6).reshape(2, 3)
    turned = {1: labels, 2: labels[:, ::-1], 3: labels[::-1, ::-1], 4: labels[::-1], 5: labels.T}
    turned |= {6: np.rot90(labels, -1), 7: labels[::-1, ::-1].T, 8: np.rot90(labels)}
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(labels.astype(np.uint8)).save(tmp_path / "x.png", exif=exif)
    assert read_label_map(tmp_path / "x.png").tolist() == turned[orientation].tolist()


def test_transparency_beside_numbers_does_not_count(tmp_path):
    values = np.stack([np.arange(6).reshape(2, 3), np.full((2, 3), 7)], axis=-1).astype(np.uint8)
    Image.fromarray(values, "LA").save(tmp_path / "x.png")
    assert read_label_map(tmp_path / "x.png").tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("name", "text"),
    [("p.txt", "#87CEEB 3 sky\n\n#102030 5 dark water\n"), ("p.json", json.dumps({"#87ceeb": 3, "#102030": 5}))],
)
def test_colours_are_looked_up(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    palette = read_palette(tmp_path / name)
    assert palette == COLOURS
    colours = np.array([[[0x87, 0xCE, 0xEB], [0x10, 0x20, 0x30]]], np.uint8)
    indices = Image.fromarray(np.array([[1, 0]], np.uint8))
    indices.putpalette([*colours[0, 1], *colours[0, 0]])
    for image in (Image.fromarray(colours), Image.fromarray(colours).convert("RGBA"), indices):
        image.save(tmp_path / "x.png")
        assert read_label_map(tmp_path / "x.png", palette).tolist() == [[3, 5]]
    assert (colours_of_labels(8, palette)[[3, 5]] == colours[0]).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no palette"),
        ("", "is empty"),
        ("sky 3", 'no colour and label in "sky 3"'),
        ("#87ceeb", "is damaged"),
        ("#87ceeb sky", "is damaged"),
        ("#87ceeb -1", "no colour and label"),
        ("#87ceeb 1\n#87CEEB 2", "two labels"),
    ],
)
def test_a_palette_that_is_none_is_one_line(draw, base, tmp_path, capsys, text, message):
    if text is not None:
        (tmp_path / "p.txt").write_text(text)
    status = draw("--map", base / "maps/a.png", "--palette", tmp_path / "p.txt")
    assert_one_line(status, capsys.readouterr().err, message)


@pytest.mark.parametrize("content", ["[1]", "{", '{"#87ceeb": "3"}', '{"#87ceeb": true}'])
def test_a_damaged_json_palette_is_told(tmp_path, content):
    (tmp_path / "p.json").write_text(content)
    with pytest.raises(UserError, match="palette"):
        read_palette(tmp_path / "p.json")


def save(path, array):
    Image.fromarray(array).save(path)


BAD = {
    "no map": (lambda path: None, "there is no map"),
    "no picture": (lambda path: path.write_text("x"), "cannot read the map"),
    "too many labels": (
        lambda path: save(path, np.array([[3, 255]], np.uint8)), "has the label 255; this model has 8, from 0 to 7"
    ),
    "colours without a palette": (lambda path: save(path, np.zeros((4, 4, 3), np.uint8)), "say with --palette"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_map_is_one_line_and_does_not_stop_the_others(draw, base, tmp_path, capsys, caplog, case):
    make, message = BAD[case]
    make(tmp_path / "bad.png")
    assert draw("--map", tmp_path / "bad.png", base / "maps/a.png") == 2
    assert message in caplog.text and "1 of 2 could not be drawn" in capsys.readouterr().err
    assert len(samples(tmp_path / "out")) == 1


def test_a_colour_without_a_label_is_named(tmp_path):
    image = np.zeros((4, 4, 3), np.uint8)
    image[0, 0] = 255
    save(tmp_path / "x.png", image)
    with pytest.raises(UserError, match="most of all #000000 in 15 pixels"):
        read_label_map(tmp_path / "x.png", {"#ffffff": 1})


def test_other_models_are_refused(draw, base, capsys):
    status = draw("--map", base / "maps/a.png", model="text")
    assert_one_line(status, capsys.readouterr().err, 'draws from "caption", not from maps')


def test_of_the_published_models_the_larger_one_is_taken(base, tmp_path, monkeypatch):
    monkeypatch.setattr("ldm.config.assets.ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"run python scripts/download_weights\.py semantic_synthesis512"):
        TASK.choose_model(TASK.make_parser().parse_args(["--map", "x"]))
    for name in ("semantic_synthesis256", "semantic_synthesis512"):
        folder = tmp_path / "models/ldm" / name
        folder.mkdir(parents=True)
        for file in ("config.yaml", "model.ckpt"):
            (folder / file).write_bytes((base / "tiny" / file).read_bytes())
        assert TASK.choose_model(TASK.make_parser().parse_args(["--map", "x"])).name == name


@pytest.mark.parametrize("name", ["semantic_synthesis256", "semantic_synthesis512"])
def test_the_published_models_take_maps_of_512_x_1024(repo_root, name):
    """Their shapes, on no device."""
    config = read_config(repo_root / f"models/ldm/{name}/config.yaml")
    settings = TASK.settings(TASK.make_parser().parse_args(["--map", "x"]), ModelFiles(name, "", ""), config)
    assert (settings["labels"], settings["multiple"]) == (182, 16)
    config["params"]["use_ema"] = False
    with torch.device("meta"), skip_init():
        model = instantiate_from_config(config)
    told = model.get_learned_conditioning(torch.empty(1, 182, 512, 1024, device="meta"))
    assert told.shape == (1, 3, 128, 256)
    x = torch.empty(1, 3, 128, 256, device="meta")
    assert model.apply_model(x, torch.zeros(1, dtype=torch.int64, device="meta"), told).shape == x.shape


def test_the_example_works_as_typed(load_script, repo_root, tmp_path, monkeypatch):
    """With a tiny model in the place of the published one, and smaller."""
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "tiny", map_config(182))
    words = [*shlex.split(TASK.example)[2:], "--model", "tiny", "--steps", "1"]
    assert load_script("semantic2img").main([*words, "--H", "64"]) == 0
    assert pixels(samples(tmp_path / "outputs/semantic2img-samples")[0]).shape == (64, 128, 3)
    assert pixels(repo_root / "data/semantic_examples/lake.png").shape == (512, 1024)


def test_both_examples_are_maps_of_known_labels(repo_root):
    folder = repo_root / "data/semantic_examples"
    palette = read_palette(folder / "colours.txt")
    for name in ("lake", "coast"):
        assert set(np.unique(read_label_map(folder / f"{name}.png", palette))) <= set(palette.values())
    assert (read_label_map(folder / "lake.png", palette) == read_label_map(folder / "lake.png")).all()
