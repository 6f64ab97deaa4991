"""Tests of the command `layout2img` with a tiny model."""

from __future__ import annotations

import json
import re
import shlex

import numpy as np
import pytest
import torch
from PIL import Image
from task_checks import assert_one_line, assert_replays, assert_same_at_every_batch_size, pixels, samples
from tiny_models import layout_config, text_config, write_model

from ldm.cli import replay
from ldm.cli.layout2img import Layout2Img, main
from ldm.cli.options import sampler_settings
from ldm.config.instantiate import instantiate_from_config
from ldm.config.model_config import read_config
from ldm.config.model_info import ModelInfo
from ldm.io.grids import draw_boxes
from ldm.io.layouts import resolve
from ldm.io.pixels import to_uint8
from ldm.modules.encoders.layout import LayoutTokens
from ldm.pipelines.layout import as_layout, layout_tokens, layout_vocabulary
from ldm.pipelines.loading import skip_init

TASK = Layout2Img()
NAMES = ["Tortoise", "Dog", "Cat", "Wine glass"]
DOG = {"label": "Dog", "box": [0.25, 0.5, 1.0, 1.0]}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Return a folder with models, layouts and class names."""
    base = tmp_path_factory.mktemp("layout2img")
    write_model(base / "tiny", layout_config())
    write_model(base / "named", {**layout_config(), "target": "ldm.models.diffusion.ddpm.Layout2ImgDiffusion"})
    config = (base / "named/config.yaml").read_text()
    (base / "named/config.yaml").write_text(config + "    class_names: [Cat, Dog]\n")
    write_model(base / "text", text_config())
    (base / "labels.txt").write_text("\n".join(NAMES))
    (base / "layouts").mkdir()
    (base / "layouts/one.json").write_text(json.dumps({"boxes": [DOG]}))
    two = [{"boxes": [{"label": 7, "box": [0, 0, 0.5, 0.5]}, DOG]}, {"boxes": [{"label": "cat", "box": [0, 0, 1, 1]}]}]
    (base / "layouts/two.json").write_text(json.dumps(two))
    return base


@pytest.fixture
def sample(base, tmp_path):
    """Return a function that runs the command with a tiny model and returns its exit status."""

    def run(*options: object, model="tiny") -> int:
        fixed = ["--model", base / model, "--steps", 2, "--seed", 1, "--outdir", tmp_path / "out"]
        return main([str(each) for each in (*fixed, *options)])

    return run


def test_defaults_are_those_of_the_published_figures():
    parsed = TASK.make_parser().parse_args(["--layout", "x"])
    args = {**vars(parsed), **sampler_settings(parsed)}
    expected = {"steps": 200, "eta": 0.0, "scale": 1.0, "n_samples": 1, "sampler": "ddim"}
    assert {key: args[key] for key in expected} == expected


def test_image_does_not_depend_on_the_batch_size(base, tmp_path):
    fixed = ["--model", base / "tiny", "--layout", base / "layouts", "--labels", base / "labels.txt"]
    assert_same_at_every_batch_size(TASK, [*fixed, "--steps", 2, "--n_samples", 3, "--eta", 1], tmp_path)


def test_images_contain_their_boxes_and_replay_without_the_files(sample, base, tmp_path):
    copy = tmp_path / "two.json"
    copy.write_text((base / "layouts/two.json").read_text())
    assert sample("--layout", copy, "--labels", base / "labels.txt", "--scale", 2, "--batch_size", 2) == 0
    copy.unlink()
    with Image.open(samples(tmp_path / "out")[0]) as file:
        inputs = json.loads(file.text["ldm"])["inputs"]
    assert inputs["layout"] == f"{copy} #1"
    assert inputs["boxes"] == [
        {"label": 7, "name": "7", "box": [0, 0, 0.5, 0.5]},
        {"label": 1, "name": "Dog", "box": [0.25, 0.5, 1.0, 1.0]},
    ]
    assert_replays(replay.main, tmp_path / "out")


def test_grid_shows_the_boxes_beside_the_image(sample, base, tmp_path):
    assert sample("--layout", base / "layouts/one.json", "--labels", base / "labels.txt") == 0
    grid = pixels(tmp_path / "out/grid-0000.png")
    assert (grid[2:18, 2:18] == to_uint8(draw_boxes((16, 16), [DOG["box"]], ["Dog"], 8))).all()
    assert (grid[2:18, 20:36] == pixels(samples(tmp_path / "out")[0])).all()


def test_boxes_become_tokens():
    inputs = {"layout": "x", **resolve({"boxes": [DOG]}, NAMES)}
    layout = TASK.read(inputs, None)
    assert layout == as_layout({"boxes": [DOG]}, NAMES)
    tokens = layout_tokens(layout, 8192, 92)
    # The grid has 90 × 90 cells; 8191 means no box; the window at the end is the whole layout.
    assert tokens[:3].tolist() == [1, 90 * 44 + 22, 90 * 89 + 89]
    assert tokens[3:-2].unique().tolist() == [8191] and tokens[-2:].tolist() == [0, 90 * 89 + 89]


def test_position_of_a_box_changes_the_image(sample, tmp_path):
    for i, box in enumerate(([0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1])):
        (tmp_path / f"{i}.json").write_text(json.dumps({"boxes": [{"label": 1, "box": box}]}))
        assert sample("--layout", tmp_path / f"{i}.json") == 0
    first, second = (pixels(path) for path in samples(tmp_path / "out"))
    assert (first != second).any()


def test_class_names_default_to_those_of_the_configuration(sample, base, tmp_path):
    assert sample("--layout", base / "layouts/one.json", model="named") == 0
    with Image.open(samples(tmp_path / "out")[0]) as file:
        assert json.loads(file.text["ldm"])["inputs"]["boxes"][0]["label"] == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no layout file"),
        ("{", "cannot read the layout file"),
        ("[]", "is empty"),
        (json.dumps({"boxes": [DOG]}), "give them (--labels FILE), or numbers"),
        (json.dumps({"boxes": [{"label": 299, "box": [0, 0, 1, 1]}]}), "classes go from 0 to 298"),
        (json.dumps({"boxes": [{"label": -1, "box": [0, 0, 1, 1]}]}), "class numbers start at 0"),
        (json.dumps({"boxes": 4 * [{"label": 1, "box": [0, 0, 1, 1]}]}), "give at most 3"),
    ],
)
def test_error_is_one_line_and_writes_nothing(sample, tmp_path, capsys, content, message):
    path = tmp_path / "layout.json"
    if content is not None:
        path.write_text(content)
    assert sample("--layout", path) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "see above" not in error, "the error precedes the model"
    assert error.startswith("error: ") and message in error and "layout.json" in error
    assert not (tmp_path / "out").exists()


def test_invalid_layout_does_not_stop_the_others(sample, base, tmp_path, capsys):
    (tmp_path / "bad.json").write_text("{")
    layouts = [base / "layouts/one.json", tmp_path / "bad.json", base / "layouts/two.json"]
    assert sample("--layout", *layouts, "--labels", base / "labels.txt") == 2
    assert "1 of 4 failed" in capsys.readouterr().err
    assert [path.name for path in samples(tmp_path / "out")] == ["00000.png", "00002.png", "00003.png"]


def test_other_models_are_an_error_and_guidance_logs_a_warning(sample, base, capsys, caplog):
    assert_one_line(
        sample("--layout", base / "layouts", model="text"),
        capsys.readouterr().err,
        'the model "text" is conditioned on "caption", not on layouts',
    )
    sample("--layout", base / "layouts/one.json", "--labels", base / "labels.txt", "--scale", 2)
    assert "not trained for guidance" in caplog.text


def test_published_model_takes_layouts(repo_root):
    """The shapes are checked on the meta device: 92 tokens of 512 channels, and latents of 64 × 64."""
    config = read_config(repo_root / "models/ldm/layout2img-openimages256/config.yaml")
    args = TASK.make_parser().parse_args(["--layout", "x"])
    info = ModelInfo("layout2img-openimages256", config)
    TASK.pipeline(args, info).check(info)
    assert (*layout_vocabulary(info), info.size.height) == (8192, 92, 256)
    config["params"]["use_ema"] = False
    with torch.device("meta"), skip_init():
        model = instantiate_from_config(config)
    tokens = LayoutTokens(8192).encode([], 92)[None].to("meta")
    cond = model.get_learned_conditioning(tokens)
    assert cond.shape == (1, 92, 512)
    x = torch.empty(1, 3, 64, 64, device="meta")
    assert model.apply_model(x, torch.zeros(1, dtype=torch.int64, device="meta"), cond).shape == x.shape
    assert model.downsampling == 4


def test_example_works_as_typed(repo_root, tmp_path, monkeypatch):
    """A tiny model replaces the published one, and a short list of class names that of OpenImages."""
    monkeypatch.chdir(tmp_path)
    text = "".join(path.read_text() for path in (repo_root / "data/layout_examples").glob("*.json"))
    names = sorted(set(re.findall('"label": "(.*?)"', text)))
    (tmp_path / "class-descriptions-boxable.csv").write_text(
        "".join(f"/m/{n},{name}\n" for n, name in enumerate(names))
    )
    config = layout_config()
    config["params"]["cond_stage_config"]["params"]["max_seq_len"] = 92
    write_model(tmp_path / "tiny", config)
    words = shlex.split(TASK.arguments)
    assert main([*words, "--model", "tiny", "--steps", "1"]) == 0
    assert len(samples(tmp_path / "outputs/layout2img-samples")) == 4
    assert np.ptp(pixels(tmp_path / "outputs/layout2img-samples/grid-0000.png")) == 255
