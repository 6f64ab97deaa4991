"""The command that draws from layouts, on a tiny model."""

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

from ldm.config.instantiate import instantiate_from_config
from ldm.config.model_config import read_config
from ldm.errors import UserError
from ldm.io.grids import draw_boxes
from ldm.io.pixels import to_uint8
from ldm.modules.encoders.layout import LayoutTokens
from ldm.pipelines.loading import skip_init
from ldm.tasks.layout2img import LayoutToImage
from ldm.tasks.layout_files import read_labels, resolve

TASK = LayoutToImage()
NAMES = ["Tortoise", "Dog", "Cat", "Wine glass"]
DOG = {"label": "Dog", "box": [0.25, 0.5, 1.0, 1.0]}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model, layouts, and names of classes."""
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
def draw(load_script, base, tmp_path):
    """Run the command on the tiny model; gives its exit status."""

    def run(*options: object, model="tiny") -> int:
        fixed = ["--model", base / model, "--steps", 2, "--seed", 1, "--outdir", tmp_path / "out"]
        return load_script("layout2img").main([str(each) for each in (*fixed, *options)])

    return run


def test_the_defaults_are_those_of_the_published_figures():
    args = vars(TASK.make_parser().parse_args(["--layout", "x"]))
    expected = {"steps": 200, "eta": 0.0, "scale": 1.0, "n_samples": 1, "sampler": "ddim"}
    assert {key: args[key] for key in expected} == expected


def test_a_picture_is_the_same_at_every_batch_size(base, tmp_path):
    fixed = ["--model", base / "tiny", "--layout", base / "layouts", "--labels", base / "labels.txt"]
    assert_same_at_every_batch_size(TASK, [*fixed, "--steps", 2, "--n_samples", 3, "--eta", 1], tmp_path)


def test_pictures_say_their_boxes_and_are_drawn_again_without_the_files(draw, base, load_script, tmp_path):
    copy = tmp_path / "two.json"
    copy.write_text((base / "layouts/two.json").read_text())
    assert draw("--layout", copy, "--labels", base / "labels.txt", "--scale", 2, "--batch_size", 2) == 0
    copy.unlink()
    with Image.open(samples(tmp_path / "out")[0]) as file:
        inputs = json.loads(file.text["ldm"])["inputs"]
    assert inputs["layout"] == f"{copy} #1"
    assert inputs["boxes"] == [
        {"label": 7, "name": "7", "box": [0, 0, 0.5, 0.5]},
        {"label": 1, "name": "Dog", "box": [0.25, 0.5, 1.0, 1.0]},
    ]
    assert_replays(load_script("replay").main, tmp_path / "out")


def test_the_boxes_stand_beside_the_picture(draw, base, tmp_path):
    assert draw("--layout", base / "layouts/one.json", "--labels", base / "labels.txt") == 0
    sheet = pixels(tmp_path / "out/grid-0000.png")
    assert (sheet[2:18, 2:18] == to_uint8(draw_boxes((16, 16), [DOG["box"]], ["Dog"], 8))).all()
    assert (sheet[2:18, 20:36] == pixels(samples(tmp_path / "out")[0])).all()


def test_the_model_is_told_the_tokens_of_the_boxes(base):
    settings = {"vocabulary": 8192, "tokens": 92, "height": 16, "width": 16}
    loaded = TASK.load({"layout": "x", **resolve({"boxes": [DOG]}, NAMES)}, settings)
    # A grid of 90 × 90 cells; 8191 stands for no box; the window at the end is the whole layout.
    assert loaded.tokens[:3].tolist() == [1, 90 * 44 + 22, 90 * 89 + 89]
    assert loaded.tokens[3:-2].unique().tolist() == [8191] and loaded.tokens[-2:].tolist() == [0, 90 * 89 + 89]


def test_where_a_box_is_changes_the_picture(draw, tmp_path):
    for i, box in enumerate(([0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1])):
        (tmp_path / f"{i}.json").write_text(json.dumps({"boxes": [{"label": 1, "box": box}]}))
        assert draw("--layout", tmp_path / f"{i}.json") == 0
    first, second = (pixels(path) for path in samples(tmp_path / "out"))
    assert (first != second).any()


def test_names_come_from_the_configuration_where_it_has_them(draw, base, tmp_path):
    assert draw("--layout", base / "layouts/one.json", model="named") == 0
    with Image.open(samples(tmp_path / "out")[0]) as file:
        assert json.loads(file.text["ldm"])["inputs"]["boxes"][0]["label"] == 1


def test_labels_are_read_from_lines_and_from_the_list_of_openimages(tmp_path):
    (tmp_path / "a.txt").write_text("Dog\n\nCat\n")
    (tmp_path / "b.csv").write_text('/m/011k07,Tortoise\n/m/1,"Knife, small"\n')
    assert read_labels(tmp_path / "a.txt") == ["Dog", "Cat"]
    assert read_labels(tmp_path / "b.csv") == ["Tortoise", "Knife, small"]


def test_pixels_and_shares_are_the_same_layout():
    in_pixels = {"size": [200, 100], "boxes": [{"label": "Dog", "box": [50, 50, 200, 100]}]}
    assert resolve(in_pixels, NAMES) == resolve({"boxes": [DOG]}, NAMES)


BAD = {
    "right of the layout": ([0.5, 0, 1.2, 1], 'box 1 ("Dog") reaches outside [0, 1]: [0.5, 0, 1.2, 1]'),
    "above the layout": ([0, -0.1, 1, 1], "reaches outside"),
    "pixels without size": ([10, 10, 60, 60], 'for pixels give "size"'),
    "width instead of right": ([0.5, 0.5, 0.2, 0.2], "is empty"),
    "three numbers": ([0, 0, 1], "box 1 must be"),
    "words": (["a", 0, 1, 1], "box 1 must be"),
    "not finite": ([float("nan"), 0, 1, 1], "box 1 must be"),
    "huge": ([0, 0, 1, 10**400], "box 1 must be"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_box_that_is_none_is_named(case):
    box, message = BAD[case]
    with pytest.raises(UserError, match=re.escape(message)):
        resolve({"boxes": [{"label": "Dog", "box": box}]}, NAMES)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ([], "a layout is"),
        ({"boxes": []}, "there is no box"),
        ({"boxes": [DOG], "sizes": [1, 1]}, '"sizes" is not known (did you mean "size"?)'),
        ({"boxes": [DOG], "size": [0, 10]}, '"size" must be'),
        ({"boxes": [DOG, {**DOG, "label": "Dgo"}]}, 'box 2 ("Dgo"): no class is called so (did you mean "Dog"?)'),
        ({"boxes": [{"label": None, "box": [0, 0, 1, 1]}]}, "a class's name, or its number"),
        ({"boxes": [{"box": [0, 0, 1, 1]}]}, "box 1 must be"),
    ],
    ids=str,
)  # fmt: skip
def test_a_layout_that_is_none_is_told(layout, message):
    with pytest.raises(UserError, match=re.escape(message)):
        resolve(layout, NAMES)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no layout file"),
        ("{", "cannot read the layout file"),
        ("[]", "is empty"),
        (json.dumps({"boxes": [DOG]}), "give --labels FILE, or numbers"),
        (json.dumps({"boxes": [{"label": 299, "box": [0, 0, 1, 1]}]}), "classes go from 0 to 298"),
        (json.dumps({"boxes": [{"label": -1, "box": [0, 0, 1, 1]}]}), "classes are counted from 0"),
        (json.dumps({"boxes": 4 * [{"label": 1, "box": [0, 0, 1, 1]}]}), "give at most 3"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(draw, tmp_path, capsys, caplog, content, message):
    path = tmp_path / "layout.json"
    if content is not None:
        path.write_text(content)
    assert draw("--layout", path) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    told = error if "see above" not in error else caplog.records[-1].message
    assert error.startswith("error: ") and message in told and "layout.json" in told
    assert not (tmp_path / "out").exists()


def test_a_bad_layout_does_not_stop_the_others(draw, base, tmp_path, capsys):
    (tmp_path / "bad.json").write_text("{")
    layouts = [base / "layouts/one.json", tmp_path / "bad.json", base / "layouts/two.json"]
    assert draw("--layout", *layouts, "--labels", base / "labels.txt") == 2
    assert "1 of 4 could not be drawn" in capsys.readouterr().err
    assert [path.name for path in samples(tmp_path / "out")] == ["00000.png", "00002.png", "00003.png"]


def test_other_models_are_refused_and_guidance_is_warned_of(draw, base, capsys, caplog):
    assert_one_line(draw("--layout", base / "layouts", model="text"), capsys.readouterr().err, "not from layouts")
    draw("--layout", base / "layouts/one.json", "--labels", base / "labels.txt", "--scale", 2)
    assert "not trained for guidance" in caplog.text


def test_the_published_model_takes_layouts(repo_root):
    """Its shapes, on no device: 92 tokens of 512 channels go into a network of 64 × 64 latents."""
    config = read_config(repo_root / "models/ldm/layout2img-openimages256/config.yaml")
    args = TASK.make_parser().parse_args(["--layout", "x"])
    settings = TASK.settings(args, None, config)
    assert (settings["vocabulary"], settings["tokens"], settings["height"]) == (8192, 92, 256)
    config["params"]["use_ema"] = False
    with torch.device("meta"), skip_init():
        model = instantiate_from_config(config)
    tokens = LayoutTokens(8192).encode([], 92)[None].to("meta")
    told = model.get_learned_conditioning(tokens)
    assert told.shape == (1, 92, 512)
    x = torch.empty(1, 3, 64, 64, device="meta")
    assert model.apply_model(x, torch.zeros(1, dtype=torch.int64, device="meta"), told).shape == x.shape
    assert model.downsampling == 4


def test_the_example_works_as_typed(load_script, base, repo_root, tmp_path, monkeypatch):
    """With a tiny model in the place of the published one, and a short list of labels."""
    monkeypatch.chdir(tmp_path)
    text = "".join(path.read_text() for path in (repo_root / "data/layout_examples").glob("*.json"))
    names = sorted(set(re.findall('"label": "(.*?)"', text)))
    (tmp_path / "class-descriptions-boxable.csv").write_text(
        "".join(f"/m/{n},{name}\n" for n, name in enumerate(names))
    )
    config = layout_config()
    config["params"]["cond_stage_config"]["params"]["max_seq_len"] = 92
    write_model(tmp_path / "tiny", config)
    words = shlex.split(TASK.example)[2:]
    assert load_script("layout2img").main([*words, "--model", "tiny", "--steps", "1"]) == 0
    assert len(samples(tmp_path / "outputs/layout2img-samples")) == 4
    assert np.ptp(pixels(tmp_path / "outputs/layout2img-samples/grid-0000.png")) == 255
