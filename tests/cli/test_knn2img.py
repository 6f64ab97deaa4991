"""Tests of the command `knn2img` with a tiny model, a tiny CLIP and a small database."""

from __future__ import annotations

import json
import shlex
import shutil

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from retrieval_files import neighbours_by_argsort, unit, vectors, write_database
from task_checks import pixels, run_without_torch
from tiny_models import text_config, write_clip, write_model

from ldm.cli import replay
from ldm.cli.knn2img import Knn2Img, main
from ldm.cli.options import sampler_settings
from ldm.cli.replay import find_task
from ldm.config.instantiate import instantiate_from_config
from ldm.config.model_config import read_config
from ldm.config.model_info import ModelInfo
from ldm.errors import UserError
from ldm.modules.encoders import clip
from ldm.pipelines import sampling
from ldm.pipelines.loading import for_inference
from ldm.pipelines.retrieval import context_width

TASK = Knn2Img()
CONFIG = "configs/retrieval-augmented-diffusion/768x768.yaml"
CHECKPOINT = "models/rdm/rdm768x768/model.ckpt"
DATABASES = "data/rdm/retrieval_databases"
WIDTH = 10  # of the CLIP, the database and the model
ROWS = vectors(40, WIDTH)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder with the files of the published command in their places, and with files that do not fit."""
    pytest.importorskip("transformers")
    base = tmp_path_factory.mktemp("rdm")
    config = text_config(cond_stage_config={"target": "torch.nn.Identity"}, cond_stage_key="nix")
    config["params"]["unet_config"]["params"]["context_dim"] = WIDTH
    config["params"]["cond_stage_trainable"] = False
    write_model((base / CHECKPOINT).parent, config)
    (base / CONFIG).parent.mkdir(parents=True)
    (base / CHECKPOINT).with_name("config.yaml").rename(base / CONFIG)
    write_model(base / "text")
    write_clip(base / "clip")
    write_clip(base / "narrow", width=6)
    write_database(base / DATABASES / "artbench-surrealism", ROWS)
    write_database(base / "other", vectors(7, WIDTH, seed=5))
    write_database(base / "wide", vectors(7, 12))
    return base


@pytest.fixture
def knn2img(place, monkeypatch, tmp_path):
    """Return a function that runs the command in that folder and returns its exit status."""
    monkeypatch.chdir(place)
    monkeypatch.setitem(clip.HUB_NAMES, "ViT-L/14", "clip")
    fixed = ["--ddim_steps", "2", "--seed", "1", "--prompt", "cat", "--outdir", str(tmp_path / "out")]

    def run(*options: object, fixed=fixed) -> int:
        if "--from-file" in options:
            fixed = [each for each in fixed if each not in ("--prompt", "cat")]
        return main([*fixed, *map(str, options)])

    return run


@pytest.fixture
def conditionings(monkeypatch):
    """Return a list that collects the conditional and the unconditional conditioning of each batch."""
    seen = []
    sample = sampling.sample_latents

    def spy(model, shape, **options):
        seen.append((options["cond"], options["uncond"]))
        return sample(model, shape, **options)

    monkeypatch.setattr(sampling, "sample_latents", spy)
    return seen


def files(folder) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def images(folder) -> list[np.ndarray]:
    return [pixels(path) for path in sorted((folder / "samples").iterdir())]


def texts(folder) -> list[dict[str, str]]:
    return [Image.open(path).text for path in sorted((folder / "samples").iterdir())]


def embedded(place, prompt: str) -> np.ndarray:
    """Return the embedding (1, D) of a prompt by the model of transformers, as a unit vector."""
    import transformers

    model = transformers.CLIPModel.from_pretrained(place / "clip").eval()
    tokens = transformers.CLIPTokenizer.from_pretrained(place / "clip")(
        [prompt], padding="max_length", max_length=77, return_tensors="pt"
    )
    with torch.no_grad():
        features = model.get_text_features(**tokens)
    features = features if isinstance(features, torch.Tensor) else features.pooler_output
    return unit(features.double().numpy())


def test_published_options_keep_their_defaults():
    parsed = TASK.make_parser().parse_args([])
    args = {**vars(parsed), **sampler_settings(parsed)}
    published = {"skip_grid": False, "steps": 50, "n_repeat": 1, "sampler": "ddim", "eta": 0.0, "n_iter": 1}
    published |= {"n_samples": 3, "n_rows": 0, "scale": 5.0, "from_file": None, "clip_type": "ViT-L/14"}
    published |= {"database": "artbench-surrealism", "use_neighbors": False, "knn": 10}
    assert {key: args[key] for key in published} == published
    assert {"prompt", "outdir", "plms", "H", "W", "config", "ckpt"} <= {*args, "plms"}
    assert TASK.make_parser().parse_args(["--plms"]).sampler == "plms"


def test_default_files_are_those_of_the_published_model(place, monkeypatch, tmp_path):
    monkeypatch.chdir(place)
    parse = TASK.make_parser().parse_args
    found = TASK.choose_model(parse([]))
    assert (str(found.config), str(found.checkpoint), found.name) == (CONFIG, CHECKPOINT, "rdm768x768")
    assert TASK.choose_model(parse(["--model", "models/rdm/rdm768x768"])) == found
    assert str(TASK.choose_model(parse(["--config", "text/config.yaml"])).config) == "text/config.yaml"
    assert str(TASK.choose_model(parse(["--ckpt", "text/model.ckpt"])).config) == "text/config.yaml"
    shutil.copy(CHECKPOINT, tmp_path / "model.ckpt")
    assert str(TASK.choose_model(parse(["--ckpt", str(tmp_path / "model.ckpt")])).config) == CONFIG


def test_samples_and_a_grid_are_written(knn2img, tmp_path):
    for options in ((), ("--use_neighbors", "--n_rows", 1, "--n_iter", 2, "--n_samples", 1)):
        assert knn2img(*options) == 0
    grids = ["grid-0000.png", "grid-0001.png"]
    assert files(tmp_path / "out") == [*grids, *(f"samples/{i:05}.png" for i in range(5))]
    assert pixels(tmp_path / "out" / grids[0]).shape == (16 + 4, 3 * 18 + 2, 3)
    assert pixels(tmp_path / "out" / grids[1]).shape == (2 * 18 + 2, 16 + 4, 3)


def test_prompts_of_a_file_are_repeated_line_by_line(knn2img, tmp_path):
    (tmp_path / "prompts.txt").write_text("cat\n\ndog\n")
    options = ("--n_repeat", 2, "--n_iter", 2, "--n_samples", 3, "--skip_grid", "--use_neighbors")
    assert knn2img("--from-file", tmp_path / "prompts.txt", *options) == 0
    found = texts(tmp_path / "out")
    assert [each["prompt"] for each in found] == 2 * ["cat", "cat", "dog", "dog"]
    batches = [json.loads(each["ldm"])["place"]["batch"] for each in found]
    assert batches == [3, 3, 3, 3, 3, 3, 2, 2]
    assert len({each["neighbours"] for each in found}) == 2


def test_context_is_the_prompt_and_its_neighbours(knn2img, place, conditionings, tmp_path):
    assert knn2img("--use_neighbors", "--knn", 4, "--n_samples", 2) == 0
    ((context, unconditional),) = conditionings
    prompt = embedded(place, "cat")
    indices, _ = neighbours_by_argsort(ROWS, prompt, 4)
    expected = np.concatenate([prompt, unit(ROWS[indices[0]].astype(float))])
    assert context.shape == (2, 5, WIDTH)
    assert np.allclose(context.numpy(), expected[None], atol=1e-6)
    assert unconditional.shape == (2, 5, WIDTH) and not unconditional.any()
    assert json.loads(texts(tmp_path / "out")[0]["ldm"])["inputs"]["neighbours"] == indices[0].tolist()


def test_context_without_neighbours_is_the_prompt(knn2img, place, conditionings, tmp_path):
    assert knn2img("--n_samples", 1, "--scale", 1) == 0
    ((context, unconditional),) = conditionings
    assert np.allclose(context.numpy(), embedded(place, "cat")[None], atol=1e-6) and unconditional is None
    assert not {"neighbours", "database", "knn"} & texts(tmp_path / "out")[0].keys()


def test_cut_prompt_logs_one_line(knn2img, caplog):
    """CLIP reads 77 tokens; the prompt is encoded once for all images."""
    assert knn2img("--prompt", f"{'cat ' * 75}Cat a", "--n_samples", 2, "--n_iter", 2) == 0
    (line,) = [record.getMessage() for record in caplog.records if "tokens" in record.getMessage()]
    assert line.endswith('79 tokens (start and end token included), and the model reads 77; cut: "… Cat a"')


def test_neighbours_and_their_database_change_the_image(knn2img, tmp_path):
    for options in ((), ("--use_neighbors",), ("--use_neighbors", "--database", "other")):
        assert knn2img("--n_samples", 1, *options) == 0
    alone, near, other = images(tmp_path / "out")
    assert (alone != near).any() and (near != other).any() and (alone != other).any()
    assert len(json.loads(texts(tmp_path / "out")[2]["neighbours"])) == 7, "all vectors of the database"


@pytest.mark.parametrize("options", [("--ddim_eta", 1), ("--plms",)], ids=str)
def test_image_does_not_depend_on_the_batch_size(knn2img, tmp_path, options):
    (tmp_path / "prompts.txt").write_text("cat\na\nb\nc\ndog\ne\nf\ng\n")
    runs = []
    for size in (1, 3, 8):
        run = ("--from-file", tmp_path / "prompts.txt", "--batch_size", size, "--use_neighbors", *options)
        assert knn2img(*run, "--skip_grid", "--outdir", tmp_path / str(size)) == 0
        runs.append(images(tmp_path / str(size)))
    for one, three, eight in zip(*runs, strict=True):
        assert np.abs(one - three).max() <= 1 and np.abs(one - eight).max() <= 1


def test_replay_is_identical(knn2img, tmp_path, monkeypatch, capsys):
    (tmp_path / "prompts.txt").write_text("cat\ndog\n")
    assert knn2img("--from-file", tmp_path / "prompts.txt", "--use_neighbors", "--knn", 3) == 0
    assert knn2img("--n_samples", 1, "--clip_type", "./clip") == 0
    opened = []
    load = clip.load_clip
    monkeypatch.setattr(clip, "load_clip", lambda name: opened.append(name) or load(name))
    find_task.cache_clear()
    paths = [str(path) for path in sorted((tmp_path / "out" / "samples").iterdir())]
    capsys.readouterr()
    assert replay.main(paths) == 0
    assert capsys.readouterr().out.splitlines() == [f"{path}: identical" for path in paths]
    assert opened == ["clip", "clip"], "once for images with the same settings"


def test_replay_from_another_folder_finds_the_database_and_the_clip(knn2img, place, tmp_path, monkeypatch, capsys):
    options = ["--clip_type", "./clip", "--use_neighbors", "--database", "other", "--n_samples", 1]
    assert knn2img(*options, "--outdir", "results") == 0
    monkeypatch.chdir(tmp_path)
    find_task.cache_clear()
    path = place / "results/samples/00000.png"
    capsys.readouterr()
    assert replay.main([str(path)]) == 0
    assert capsys.readouterr().out == f"{path}: identical\n"


def test_replay_refuses_a_changed_database(knn2img, tmp_path, capsys):
    write_database(tmp_path / "mine", vectors(9, WIDTH))
    assert knn2img("--use_neighbors", "--database", tmp_path / "mine", "--n_samples", 1) == 0
    write_database(tmp_path / "mine", vectors(9, WIDTH, seed=3))
    find_task.cache_clear()
    assert replay.main([str(tmp_path / "out/samples/00000.png")]) == 2
    assert 'the neighbours of "cat" in the database' in capsys.readouterr().err


BAD = {
    "unknown database": (["--use_neighbors", "--database", "artbench-surealism"], 'did you mean "artbench-surrealism"'),
    "absent database": (["--use_neighbors", "--database", "openimages"], "openimages-database"),
    "empty database": (["--use_neighbors", "--database", "clip"], "contains no NPZ files"),
    "database of another CLIP": (
        ["--use_neighbors", "--database", "wide"],
        "has vectors of width 12, the queries have width 10",
    ),
    "absent CLIP": (["--clip_type", "./none"], 'there is no CLIP "./none"'),
    "misspelt CLIP": (["--clip_type", "ViT-L14"], 'did you mean "ViT-L/14"'),
    "folder without a CLIP": (["--clip_type", "text"], "text"),
    "CLIP of another width": (["--clip_type", "narrow"], "has embeddings of width 6, and the model needs 10"),
    "another kind of model": (["--model", "text"], "is not conditioned on CLIP embeddings"),
    "checkpoint of another model": (["--ckpt", "text/model.ckpt", "--config", CONFIG], "belongs to another model"),
    "absent checkpoint": (["--ckpt", "none.ckpt"], 'no checkpoint "none.ckpt"'),
    "odd height": (["--H", "18"], "nearest: 16 or 20"),
    "too many steps": (["--ddim_steps", "101"], "100 or fewer"),
    "noisy plms": (["--plms", "--ddim_eta", "0.5"], 'sampler "plms" is deterministic; eta must be 0, got 0.5'),
    "broken characters": (["--prompt", "\udce4"], "--prompt is not valid text"),
    "no prompt file": (["--from-file", "none.txt"], "no prompt file"),
}
BAD_OPTIONS = {
    "too many neighbours": (["--knn", "21"], "21 is too many; models were trained with 20 at most"),
    "no neighbours": (["--knn", "0"], "0 is not between 1"),
    "negative rows": (["--n_rows", "-1"], "-1 is not between 0"),
    "two prompts": (["--prompt", "a", "--from-file", "b"], "not allowed with"),
}


@pytest.mark.parametrize("case", BAD)
def test_error_is_one_line_and_writes_nothing(knn2img, tmp_path, capsys, case):
    options, message = BAD[case]
    assert knn2img(*options) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("error: ") and message in error[-1]
    assert "Traceback" not in "".join(error) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_invalid_option_is_one_line(capsys, case):
    options, message = BAD_OPTIONS[case]
    with pytest.raises(SystemExit) as exit:
        TASK.make_parser().parse_args(options)
    error = capsys.readouterr().err.strip()
    assert exit.value.code == 2 and error.startswith("error: ") and message in error and "\n" not in error


@pytest.mark.parametrize("options", [["--knn", "5"], ["--database", "other"], ["--n_repeat", "2"]], ids=str)
def test_options_without_effect_log_a_warning(knn2img, caplog, options):
    assert knn2img("--n_samples", 1, *options) == 0
    assert options[0] in caplog.text


def test_missing_database_is_an_error_before_torch_is_imported(place):
    status, error = run_without_torch("knn2img", "--use_neighbors", "--database", "none", cwd=place)
    assert status == 2 and 'there is no database "none"' in error


def test_error_without_weights_names_the_download_command(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("ldm.config.assets.ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["--outdir", "out"]) == 2
    error = capsys.readouterr().err.strip()
    assert "run ldm download_weights rdm768x768" in error and "\n" not in error


def test_error_without_transformers_names_the_extra(knn2img, hide_package, capsys):
    hide_package("transformers")
    assert knn2img() == 2
    assert 'install it with pip install -e ".[clip]"' in capsys.readouterr().err


def test_example_works_as_typed(knn2img, place):
    options = shlex.split(TASK.arguments)
    try:
        assert knn2img(*options, fixed=[]) == 0
        out = place / "outputs/knn2img-samples"
        assert files(out) == ["grid-0000.png", *(f"samples/{i:05}.png" for i in range(3))]
    finally:
        shutil.rmtree(place / "outputs", ignore_errors=True)


def test_published_model_takes_the_context(repo_root):
    config = read_config(repo_root / CONFIG)
    info, parse = ModelInfo("rdm768x768", config), TASK.make_parser().parse_args
    assert context_width(info) == 768
    pipeline = TASK.pipeline(parse(["--W", "896"]), info)
    pipeline.check(info)
    assert (pipeline.height, pipeline.width) == (768, 896)
    with pytest.raises(UserError, match="--H 800 is not a multiple of 128, as this model needs; nearest: 768 or 896"):
        TASK.pipeline(parse(["--H", "800"]), info)
    with torch.device("meta"):
        model = instantiate_from_config(for_inference(config)).eval()
        z, t, c = torch.empty(2, 16, 48, 56), torch.zeros(2, dtype=torch.long), torch.empty(2, 11, 768)
        with torch.no_grad():
            assert model.apply_model(z, t, c).shape == z.shape
            assert model.decode_first_stage(z).shape == (2, 3, 768, 896)


def test_tiny_model_is_conditioned_as_the_published_one(place, repo_root):
    tiny, published = (OmegaConf.load(base / CONFIG).model.params for base in (place, repo_root))
    for key in ("cond_stage_key", "conditioning_key", "cond_stage_config"):
        assert tiny[key] == published[key]
