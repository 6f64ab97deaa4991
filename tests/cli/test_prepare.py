"""Tests of the command `prepare`: from a folder of odd photographs to samples, by the commands that it prints."""

from __future__ import annotations

import csv
import shlex
from pathlib import Path

import pytest
import yaml
from odd_photographs import COPIES, COUNT, DAMAGED, SHAPES, write_odd_photographs
from omegaconf import OmegaConf
from PIL import Image

from ldm.cli.main import main as ldm
from ldm.cli.prepare import main as prepare
from ldm.config.instantiate import instantiate_from_config
from ldm.config.model_config import ImageSize, read_config

TINY = ("--size", "32", "--quick", "--max-steps", "3", "--gpu-memory", "0")
QUIET = ("--enable_progress_bar", "false", "--enable_model_summary", "false", "data.params.num_workers=0")
FEW = {"txt2img": ("--ddim_steps", "2"), "class2img": ("--steps", "2", "--n_samples", "1")}
FEW |= {"sample_diffusion": ("-c", "2"), "inpaint": ("--steps", "2"), "superres": ("--steps", "2")}
TASKS = ("text", "class", "unconditional", "inpainting", "superres")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    return write_odd_photographs(tmp_path_factory.mktemp("my own") / "photo graphs")


@pytest.fixture
def here(tmp_path, monkeypatch, photographs):
    """Return a new current folder with a link to the photographs."""
    monkeypatch.chdir(tmp_path)
    Path("photos").symlink_to(photographs)
    return tmp_path


def commands(printed):
    """Return the words of the printed commands."""
    return [shlex.split(line) for line in printed.splitlines() if line.startswith("  ldm ")]


def rows(table):
    with Path(table).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def read(file):
    return yaml.safe_load(Path(file).read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_three_commands_lead_from_a_folder_to_samples(here, monkeypatch, capsys, task):
    assert ldm(["prepare", "photos", "--task", task, *TINY]) == 0
    first_stage, model, samples = commands(capsys.readouterr().out)
    for words in (first_stage, model):
        assert words[:2] == ["ldm", "train"]
        assert ldm([*words[1:], *QUIET]) == 0
    assert "ldm.data.unreadable" not in capsys.readouterr().err  # the damaged file is in no list
    assert ldm([*samples[1:], *FEW[samples[1]]]) == 0
    images = [path for path in Path(f"prepared/photo graphs-{task}/samples").rglob("*.png") if "grid" not in path.name]
    assert images and Image.open(images[-1]).size == (32, 32)


@pytest.mark.slow
def test_a_first_stage_is_fine_tuned_or_used_as_it_is(here, repo_root, capsys):
    bundled = ("--first-stage", str(repo_root / "models/ldm/emoji64"))
    assert ldm(["prepare", "photos", "--task", "unconditional", *TINY, *bundled]) == 0
    first_stage, model, _ = commands(capsys.readouterr().out)
    assert ldm([*first_stage[1:], *QUIET]) == 0 and ldm([*model[1:], *QUIET]) == 0
    kept = ("--keep-first-stage", "--outdir", "kept", "--max-steps", "1")
    assert ldm(["prepare", "photos", "--task", "superres", *TINY, *bundled, *kept]) == 0
    model, _ = commands(capsys.readouterr().out)
    assert ldm([*model[1:], *QUIET]) == 0
    params = read("kept/ldm.yaml")["model"]["params"]
    assert params["first_stage_config"]["params"]["ckpt_path"] == str(
        repo_root / "models/ldm/emoji64/model.safetensors"
    )


@pytest.mark.slow
def test_a_trained_model_is_exported_and_works_elsewhere(here, monkeypatch, capsys):
    assert ldm(["prepare", "photos", "--task", "class", *TINY, "--outdir", "out"]) == 0
    first_stage, model, _ = commands(capsys.readouterr().out)
    assert ldm([*first_stage[1:], *QUIET]) == 0 and ldm([*model[1:], *QUIET]) == 0
    assert ldm(["export_model", "--ckpt", "out/runs/*_ldm/checkpoints/last.ckpt", "--outdir", "away/mine"]) == 0
    assert sorted(path.name for path in Path("away/mine").iterdir()) == [
        "class_names.txt", "config.yaml", "model.safetensors"
    ]  # fmt: skip
    Path("out").rename("hidden")
    monkeypatch.chdir("away")
    assert ldm(["class2img", "--model", "mine", "--classes", "triangle", "--outdir", "made", *FEW["class2img"]]) == 0
    assert len(list(Path("made/samples").glob("*.png"))) == 1


# -- lists and configurations ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_lists_and_configurations_are_complete(here, capsys, task):
    assert prepare(["photos", "--task", task, *TINY, "--outdir", "out", "--val-fraction", "0.2"]) == 0
    printed = capsys.readouterr().out
    train, validation = rows("out/train.csv"), rows("out/validation.csv")
    files = [row["path"] for row in (*train, *validation)]
    assert len(files) == len(set(files)) == COUNT - 1 and DAMAGED not in files and f": {DAMAGED}\n" in printed
    assert len(validation) == 13
    assert len({*COPIES} & {row["path"] for row in validation}) in (0, 2)
    for name in ("first_stage", "ldm"):
        config = OmegaConf.to_container(OmegaConf.load(f"out/{name}.yaml"))
        for side, count in (("train", len(train)), ("validation", 13)):
            dataset = instantiate_from_config(config["data"]["params"][side])
            assert len(dataset) == count and dataset[0]["image"].shape == (32, 32, 3)
        assert config["lightning"]["trainer"]["max_steps"] == 3
    assert ImageSize.of(read_config("out/ldm.yaml")).height == 32


def test_captions_and_the_vocabulary_are_in_the_configuration(here, capsys):
    assert prepare(["photos", "--task", "text", *TINY, "--outdir", "out"]) == 0
    assert all(row["caption"].startswith("A ") and row["caption"].endswith(".") for row in rows("out/train.csv"))
    config = read_config("out/ldm.yaml")["params"]
    stage = config["cond_stage_config"]["params"]
    tokens = Path("out/vocab.txt").read_text(encoding="utf-8").split("\n")[:-1]
    assert stage["vocab"] == str(here / "out" / "vocab.txt") and stage["vocab_size"] == len(tokens)
    assert {"circle", "square", "ground", "yellow"} <= set(tokens)
    assert stage["max_seq_len"] == 16 and config["cond_dropout"] == 0.1
    encoder = instantiate_from_config(config["cond_stage_config"])
    assert encoder(["a red circle"]).shape == (1, 16, config["unet_config"]["params"]["context_dim"])


def test_classes_are_in_the_configuration(here):
    assert prepare(["photos", "--task", "class", *TINY, "--outdir", "out"]) == 0
    assert Path("out/class_names.txt").read_text(encoding="utf-8").split() == sorted(SHAPES)
    params = read("out/ldm.yaml")["model"]["params"]
    assert params["class_names"] == "class_names.txt"
    assert params["cond_stage_config"]["params"]["n_classes"] == len(SHAPES) + 1
    assert {row["label"] for row in rows("out/train.csv")} == set(SHAPES)
    config = read("out/ldm.yaml")["data"]["params"]["train"]
    labels = {
        item["human_label"]: item["class_label"] for item in map(instantiate_from_config(config).entries, range(9))
    }
    assert labels == {name: sorted(SHAPES).index(name) for name in labels}


def test_the_same_folder_gives_the_same_files(here):
    for out in ("a", "b"):
        assert prepare(["photos", "--task", "text", *TINY, "--outdir", out]) == 0
    for name in ("train.csv", "validation.csv", "vocab.txt"):
        assert Path("a", name).read_bytes() == Path("b", name).read_bytes()


def test_captions_and_labels_come_from_a_table(here, capsys):
    table = "path,text,kind\n" + "".join(f"circle/photo {i:02}.{s},words {i},{7 * (i % 2)}\n" for i, s in CIRCLES)
    Path("table.csv").write_text(table, encoding="utf-8")
    options = ["photos", "--table", "table.csv", *TINY]
    assert prepare([*options, "--task", "text", "--outdir", "text"]) == 0
    assert 'captions: 4 from the column "text", 2 to 2 words' in capsys.readouterr().out
    assert {row["caption"] for side in ("train", "validation") for row in rows(f"text/{side}.csv")} == {
        f"words {number}" for number, _ in CIRCLES
    }
    assert prepare([*options, "--task", "class", "--labels", "kind", "--outdir", "class"]) == 0
    assert Path("class/class_names.txt").read_text(encoding="utf-8") == "class 0\nclass 7\n"
    assert prepare([*options, "--task", "text", "--captions", "name", "--outdir", "name"]) == 0
    assert {row["caption"] for row in rows("name/train.csv")} == {"photo"}


CIRCLES = ((0, "jpg"), (3, "webp"), (9, "jpg"), (12, "png"))


def test_without_a_validation_set_there_is_no_validation(here, capsys):
    assert prepare(["photos", "--task", "unconditional", *TINY, "--outdir", "out", "--val-fraction", "0"]) == 0
    config = read("out/ldm.yaml")
    assert "validation" not in config["data"]["params"] and "monitor" not in config["model"]["params"]
    assert not Path("out/validation.csv").exists() and "validation" not in capsys.readouterr().out


def test_inputs_of_restoration_are_written(here):
    assert prepare(["photos", "--task", "inpainting", *TINY, "--outdir", "a"]) == 0
    masks = sorted(Path("a/examples").glob("*_mask.png"))
    assert masks and all(sorted(Image.open(mask).convert("L").getcolors())[-1][1] in (0, 255) for mask in masks)
    assert prepare(["photos", "--task", "superres", *TINY, "--outdir", "b"]) == 0
    assert {Image.open(path).size for path in Path("b/examples").glob("*.png")} == {(8, 8)}


def test_the_size_follows_from_the_images_and_the_memory(here, capsys):
    assert prepare(["photos", "--task", "unconditional", "--outdir", "cpu", "--gpu-memory", "0"]) == 0
    assert prepare(["photos", "--task", "unconditional", "--outdir", "gpu", "--gpu-memory", "24"]) == 0
    assert "a GPU with 24 GB" in capsys.readouterr().out
    cpu, gpu = (read(f"{name}/first_stage.yaml") for name in ("cpu", "gpu"))
    assert cpu["data"]["params"]["train"]["params"]["size"] == gpu["data"]["params"]["train"]["params"]["size"] == 32
    loss = [config["model"]["params"]["lossconfig"]["params"]["perceptual_weight"] for config in (cpu, gpu)]
    assert loss == [0.0, 1.0]


# -- inspection and mistakes ----------------------------------------------------------------------------------------


def test_inspection_writes_nothing(here, capsys):
    assert prepare(["photos", "--task", "text", "--inspect"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("63 images: ") and "exact copies: 1 image" in printed
    assert "captions: 63 from text files, 9 to 9 words, median 9\nvocabulary: " in printed
    assert prepare(["photos", "--task", "class", "--inspect"]) == 0
    assert "classes: 3 from the names of folders, with 20 to 22 images" in capsys.readouterr().out
    assert [path.name for path in here.iterdir()] == ["photos"]


def test_inspection_names_words_that_a_vocabulary_lacks(here, repo_root, capsys):
    known = str(repo_root / "data/emoji/vocab.txt")
    assert prepare(["photos", "--task", "text", "--inspect", "--vocab", known]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "20 % of the words are read in pieces, such as: number, 11, 12, 13, 14"


def test_inspection_names_files_that_are_no_images(here, capsys):
    assert prepare(["photos", "--task", "unconditional", "--inspect"]) == 0
    assert "\n1 file is neither an image nor a caption: notes.md\n" in capsys.readouterr().out


def test_printed_commands_accept_names_and_captions_that_begin_with_a_dash(here, capsys):
    for name in ("-dogs", "cats"):
        plain_images(f"mine/{name}", 3)
        for number in range(3):
            Path(f"mine/{name}/{number}.txt").write_text("-odd")
    assert ldm(["prepare", "mine", "--task", "class", *TINY]) == 0
    assert commands(capsys.readouterr().out)[-1][-3:] == ["--classes", "0", "cats"]
    assert ldm(["prepare", "mine", "--task", "text", *TINY]) == 0
    assert "--prompt=-odd" in commands(capsys.readouterr().out)[-1]


def test_an_existing_folder_is_kept_without_force(here, capsys):
    Path("out/runs/old").mkdir(parents=True)
    Path("out/train.csv").write_text("precious")
    options = ["photos", "--task", "unconditional", *TINY, "--outdir", "out"]
    assert prepare(options) == 2
    assert capsys.readouterr() == (
        "",
        'error: --outdir "out" exists; name another folder, or replace its files with --force\n',
    )
    assert Path("out/train.csv").read_text() == "precious"
    assert prepare([*options, "--force"]) == 0
    assert Path("out/train.csv").read_text(encoding="utf-8").startswith("path\n") and Path("out/runs/old").is_dir()


def plain_images(folder, count, side=48):
    Path(folder).mkdir(parents=True)
    for number in range(count):
        Image.new("RGB", (side, side + 5), (number * 20, 0, 0)).save(f"{folder}/{number}.png")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["gone"], 'there is no folder "gone"'),
        (["empty"], 'the folder "empty" contains no image'),
        (["plain", "--task", "text"], "all 3 images have no caption beside them; write each into a .txt file"),
        (["plain/one", "--task", "class"], "are in no folder of a class"),
        (
            ["plain", "--task", "class"],
            'all 3 images are of one class, "one"; move the images of each class to a folder',
        ),
        (["plain", "--size", "64"], "all 3 images are smaller than 64 pixels; give --size 48, or larger images"),
        (["small"], "all 2 images are smaller than 32 pixels; give --size 16, or larger images"),
        (["single"], "has 1 usable image, and at least 2 are needed"),
        (["damaged"], "none of 1 images can be read (the first: cannot read the image"),
        (["photos", "--size", "50"], "--size 50 is not a multiple of 8, as this model needs; nearest: 48 or 56"),
        (["photos", "--outdir", "photos/out"], "lies inside the folder of the images"),
        (["photos", "--outdir", "out*"], "has characters that a configuration cannot hold"),
        (["photos", "--captions", "txt"], "--captions belongs to --task text"),
        (["photos", "--keep-first-stage"], "--keep-first-stage needs --first-stage"),
        (["photos", "--first-stage", "emoji46"], 'there is no model "emoji46"'),
        (["photos", "--table", "gone.csv"], "gone.csv"),
        (
            ["photos", "--task", "text", "--captions", "title"],
            '--captions title: there is no table with the column "title"; give --table, or --captions txt or name',
        ),
        (
            ["photos", "--task", "class", "--labels", "kind"],
            '--labels kind: there is no table with the column "kind"; give --table, or --labels folder',
        ),
        (["photos", "--task", "text", "--vocab", "gone.txt"], "vocabulary gone.txt does not exist"),
        (["photos", "--task", "superres", "--degradation", "bsr"], 'there is no degradation "bsr"'),
    ],
)
def test_mistakes_are_one_line_and_write_no_configuration(here, capsys, options, message):
    Path("empty").mkdir()
    plain_images("plain/one", 3)
    plain_images("small", 2, 20)
    plain_images("single", 1)
    Path("damaged").mkdir()
    Path("damaged/a.png").write_bytes(b"no image")
    task = [] if "--task" in options else ["--task", "unconditional"]
    out = [] if "--outdir" in options else ["--outdir", "out"]
    assert prepare([*options, *task, *out]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]
    assert not list(Path().glob("out*/*.yaml"))
