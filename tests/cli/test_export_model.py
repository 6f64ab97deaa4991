"""Tests of the command `export_model`."""

from __future__ import annotations

import hashlib
import shutil

import pytest
import torch
from omegaconf import OmegaConf
from tiny_models import VOCAB, inpainting_config, randomise, text_config

from ldm.cli.export_model import main as export
from ldm.config.instantiate import instantiate_from_config
from ldm.config.model_info import ModelInfo
from ldm.errors import UserError
from ldm.io.checkpoint import reading
from ldm.io.checkpoint.reading import read_checkpoint, read_state_dict
from ldm.pipelines.class_names import read_class_names
from ldm.pipelines.loading import load_model
from ldm.pipelines.model_texts import collect_texts
from ldm.pipelines.text import text_to_image


@pytest.fixture
def run(tmp_path):
    """Return the folder of a training run whose averages differ from its live weights, and the model."""
    config = text_config(use_ema=True)
    config["params"]["first_stage_config"]["params"]["ckpt_path"] = None
    model = randomise(instantiate_from_config(config))
    with torch.no_grad():
        for name, buffer in model.model_ema.named_buffers():
            if buffer.is_floating_point() and name != "decay":
                buffer.add_(0.25)
    folder = tmp_path / "logs" / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "configs").mkdir()
    project = {"model": {"base_learning_rate": 1e-4, **config}, "data": {"target": "gone.Data"}}
    OmegaConf.save(OmegaConf.create(project), folder / "configs" / "2024-project.yaml")
    checkpoint = {"state_dict": model.state_dict(), "global_step": 42, "optimizer_states": [{"state": {}}]}
    torch.save(checkpoint, folder / "checkpoints" / "last.ckpt")
    return folder, model


def test_decoder_replaces_that_of_the_first_stage(run, tmp_path, capsys):
    folder, model = run
    ckpt, stage = folder / "checkpoints" / "last.ckpt", tmp_path / "stage.ckpt"
    first_stage = {name: value.clone() for name, value in model.first_stage_model.state_dict().items()}
    first_stage["decoder.conv_out.bias"] += 1
    torch.save({"state_dict": first_stage}, stage)
    options = ["--ckpt", str(ckpt), "--dtype", "float32", "--decoder", str(stage)]
    assert export([*options, "--outdir", str(tmp_path / "a")]) == 0
    weights = read_state_dict(tmp_path / "a" / "model.safetensors")
    name = "first_stage_model.decoder.conv_out.bias"
    assert torch.equal(weights[name], model.state_dict()[name] + 1)
    first_stage["encoder.conv_in.bias"] += 1
    torch.save({"state_dict": first_stage}, stage)
    assert export([*options, "--outdir", str(tmp_path / "b")]) == 2
    assert "another encoder" in capsys.readouterr().err and not (tmp_path / "b").exists()


def test_decoder_of_an_exported_model_is_replaced(run, tmp_path):
    folder, model = run
    first = tmp_path / "first"
    assert export(["--ckpt", str(folder / "checkpoints" / "last.ckpt"), "--outdir", str(first)]) == 0
    exported = first / "model.safetensors"
    stage = {name: value.clone() for name, value in model.first_stage_model.state_dict().items()}
    stage = {name: value.half().float() + name.startswith("decoder.conv_out") for name, value in stage.items()}
    torch.save({"state_dict": stage}, tmp_path / "stage.ckpt")
    options = ["--ckpt", str(exported), "--config", str(first / "config.yaml"), "--outdir", str(tmp_path / "second")]
    assert export([*options, "--decoder", str(tmp_path / "stage.ckpt")]) == 0
    before, after = (read_checkpoint(folder / "model.safetensors") for folder in (first, tmp_path / "second"))
    changed = {
        name for name, value in before["state_dict"].items() if not torch.equal(value, after["state_dict"][name])
    }
    assert changed == {"first_stage_model.decoder.conv_out.weight", "first_stage_model.decoder.conv_out.bias"}
    assert {key: after["metadata"][key] for key in ("step", "weights")} == {"step": "42", "weights": "ema"}


@pytest.mark.parametrize("ema", [None, "--ema", "--no-ema"])
def test_the_chosen_weights_are_written(run, tmp_path, ema, capsys):
    folder, model = run
    ckpt, out = folder / "checkpoints" / "last.ckpt", tmp_path / "models" / "mine"
    options = ["--ckpt", str(ckpt), "--outdir", str(out), "--dtype", "float32", *([ema] if ema else [])]
    assert export(options) == 0
    assert sorted(path.name for path in out.iterdir()) == ["config.yaml", "model.safetensors", "vocab.txt"]
    assert "MB" in capsys.readouterr().out

    weights = read_state_dict(out / "model.safetensors")
    assert not any(name.startswith(("model_ema.", "loss.")) for name in weights)
    name = "model.diffusion_model.out.2.weight"
    expected = name if ema == "--no-ema" else "model_ema.diffusion_modelout2weight"
    assert torch.equal(weights[name], model.state_dict()[expected])
    metadata = read_checkpoint(out / "model.safetensors")["metadata"]
    assert metadata["weights"] == ("live" if ema == "--no-ema" else "ema") and metadata["step"] == "42"
    assert metadata["source_sha256"] == hashlib.sha256(ckpt.read_bytes()).hexdigest()


def test_the_exported_configuration_is_complete(run, tmp_path):
    folder, _ = run
    assert export(["--ckpt", str(folder / "checkpoints" / "last.ckpt"), "--outdir", str(tmp_path / "m")]) == 0
    config = OmegaConf.load(tmp_path / "m" / "config.yaml")
    assert list(config) == ["model"] and config.model.params.use_ema is False
    assert "ckpt_path" not in config.model.params.first_stage_config.params


def test_exported_model_samples_as_the_averages(run, tmp_path):
    folder, model = run
    out = tmp_path / "m"
    assert export(["--ckpt", str(folder / "checkpoints" / "last.ckpt"), "--outdir", str(out)]) == 0
    weights = read_state_dict(out / "model.safetensors")
    assert weights["model.diffusion_model.out.2.weight"].dtype == torch.float16
    assert weights["alphas_cumprod"].dtype == torch.float32
    exported = load_model(out / "config.yaml", out / "model.safetensors")
    noise = torch.randn(1, 3, 8, 8)
    options = {"steps": 3, "latents": noise, "output_type": "pt", "progress": False}
    sampled = text_to_image(exported, "fox", **options)
    with model.eval().ema_scope():
        expected = text_to_image(model, "fox", **options)
    assert torch.allclose(sampled[0], expected[0], atol=0.05)


def test_wrong_inputs_are_one_line(run, tmp_path, capsys):
    folder, model = run
    ckpt, out = str(folder / "checkpoints" / "last.ckpt"), tmp_path / "m"
    out.mkdir()
    (out / "model.safetensors").write_text("precious")
    live = {name: value for name, value in model.state_dict().items() if not name.startswith("model_ema.")}
    torch.save({"state_dict": live}, folder / "checkpoints" / "live.ckpt")
    large = {**live, "model.diffusion_model.out.2.bias": torch.full((3,), 1e6)}
    torch.save({"state_dict": large}, folder / "checkpoints" / "large.ckpt")
    torch.save({"state_dict": {"x": torch.ones(1)}}, folder / "checkpoints" / "foreign.ckpt")
    torch.save({"state_dict": live}, tmp_path / "alone.ckpt")
    checkpoints, new = folder / "checkpoints", str(tmp_path / "new")
    cases = [
        (["--ckpt", ckpt, "--outdir", str(out)], "--overwrite"),
        (["--ckpt", "gone.ckpt", "--outdir", new], "no checkpoint"),
        (["--ckpt", str(tmp_path / "alone.ckpt"), "--outdir", new], "--config"),
        (["--ckpt", str(checkpoints / "live.ckpt"), "--outdir", new, "--ema"], "no averaged weights"),
        (["--ckpt", str(checkpoints / "large.ckpt"), "--outdir", new], "bfloat16"),
        (["--ckpt", str(checkpoints / "foreign.ckpt"), "--outdir", new], "belongs to another model"),
    ]
    for options, message in cases:
        assert export(options) == 2
        assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert (out / "model.safetensors").read_text() == "precious" and not (tmp_path / "new").exists()
    assert export([*cases[0][0], "--overwrite"]) == 0


@pytest.mark.parametrize("name", ["config.yaml", "model.safetensors"])
def test_model_that_appears_meanwhile_is_kept(run, tmp_path, monkeypatch, capsys, name):
    folder, _ = run
    read, out = reading.read_state_dict, tmp_path / "m"

    def slow(path):
        out.mkdir()
        (out / name).write_text("of another process")
        return read(path)

    monkeypatch.setattr(reading, "read_state_dict", slow)
    assert export(["--ckpt", str(folder / "checkpoints" / "last.ckpt"), "--outdir", str(out)]) == 2
    assert "File exists" in capsys.readouterr().err and (out / name).read_text() == "of another process"


def test_first_stage_can_be_shared(tmp_path, capsys, monkeypatch):
    """The exported folder holds the network alone; loading it adds the first stage of the other model."""
    monkeypatch.chdir(tmp_path)
    model = randomise(instantiate_from_config(inpainting_config()), seed=1)
    other = randomise(instantiate_from_config(text_config()), seed=2)
    other.first_stage_model.load_state_dict(model.first_stage_model.state_dict())
    (tmp_path / "shared").mkdir()
    torch.save({"state_dict": other.state_dict()}, "shared/model.ckpt")
    torch.save({"state_dict": model.state_dict()}, "last.ckpt")
    OmegaConf.save(OmegaConf.create({"model": inpainting_config()}), "config.yaml")
    options = ["--ckpt", "last.ckpt", "--config", "config.yaml", "--shared-first-stage", "shared/model.ckpt"]
    assert export([*options, "--dtype", "float32", "--outdir", "mine"]) == 0
    weights = read_state_dict("mine/model.safetensors")
    assert weights and not [name for name in weights if name.startswith(("first_stage_model.", "cond_stage_model."))]
    loaded = load_model("mine/config.yaml", "mine/model.safetensors")
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    with torch.no_grad():
        other.first_stage_model.encoder.conv_in.bias += 1
    torch.save({"state_dict": other.state_dict()}, "shared/model.ckpt")
    assert export([*options, "--outdir", "other"]) == 2
    assert "another encoder" in capsys.readouterr().err and not (tmp_path / "other").exists()
    (tmp_path / "shared/model.ckpt").unlink()
    with pytest.raises(UserError, match=r"shared.model\.ckpt"):
        load_model("mine/config.yaml", "mine/model.safetensors")


# -- text files of the model ----------------------------------------------------------------------------------------


def test_vocabulary_and_class_names_are_in_the_folder(run, tmp_path, monkeypatch, capsys):
    """A copy of the folder works in another place, after the original files have gone."""
    folder, _ = run
    (tmp_path / "texts").mkdir()
    vocabulary, names = tmp_path / "texts" / "words.txt", tmp_path / "texts" / "names.txt"
    vocabulary.write_bytes(VOCAB.read_bytes())
    names.write_text("fox\ntree\toak\n", encoding="utf-8")
    file = folder / "configs" / "2024-project.yaml"
    project = OmegaConf.load(file)
    project.model.params.class_names = "texts/names.txt"
    project.model.params.cond_stage_config.params.vocab = "texts/words.txt"
    OmegaConf.save(project, file)
    monkeypatch.chdir(tmp_path)
    assert export(["--ckpt", "logs/r*/checkpoints/last.ckpt", "--outdir", "made"]) == 0
    printed = capsys.readouterr().out
    assert "made/class_names.txt: copied from texts/names.txt" in printed
    assert "made/vocab.txt: copied from texts/words.txt" in printed
    config = OmegaConf.load("made/config.yaml").model.params
    assert (config.class_names, config.cond_stage_config.params.vocab) == ("class_names.txt", "vocab.txt")
    shutil.rmtree(tmp_path / "texts")
    shutil.move("made", tmp_path / "elsewhere" / "mine")
    monkeypatch.chdir(tmp_path / "logs")
    model = load_model(tmp_path / "elsewhere/mine/config.yaml", tmp_path / "elsewhere/mine/model.safetensors")
    assert model.cond_stage_model.tknz_fn("fox")[0, 1].item() == VOCAB.read_text(encoding="utf-8").split("\n").index(
        "fox"
    )
    assert read_class_names(ModelInfo.of(model).params["class_names"]) == [("fox",), ("tree", "oak")]


def test_an_exported_model_is_exported_again(run, tmp_path):
    folder, _ = run
    assert export(["--ckpt", str(folder / "checkpoints" / "last.ckpt"), "--outdir", str(tmp_path / "first")]) == 0
    first, second = tmp_path / "first", tmp_path / "second"
    options = ["--ckpt", str(first / "model.safetensors"), "--config", str(first / "config.yaml")]
    assert export([*options, "--outdir", str(second)]) == 0
    assert (second / "vocab.txt").read_bytes() == (first / "vocab.txt").read_bytes() == VOCAB.read_bytes()


def export_with(run, tmp_path, **params):
    folder, _ = run
    file = folder / "configs" / "2024-project.yaml"
    project = OmegaConf.load(file)
    OmegaConf.update(project, "model.params", params)
    OmegaConf.save(project, file)
    return export(["--ckpt", str(folder / "checkpoints" / "last.ckpt"), "--outdir", str(tmp_path / "m")])


def test_other_files_are_never_copied_into_the_folder(run, tmp_path, capsys):
    (tmp_path / "key.bin").write_bytes(b"\0secret")
    with (tmp_path / "large.txt").open("wb") as file:
        file.truncate(17 << 20)
    cases = {"key.bin": "NUL", "large.txt": "too large", "gone.txt": "there is no"}
    for name, message in cases.items():
        assert export_with(run, tmp_path, class_names=str(tmp_path / name)) == 2
        error = capsys.readouterr().err.strip()
        assert message in error and "\n" not in error and not (tmp_path / "m").exists()


def test_class_names_of_another_model_are_refused(tmp_path):
    (tmp_path / "names.txt").write_text("a\nb\nc\n", encoding="utf-8")
    stage = {"target": "ldm.modules.encoders.modules.ClassEmbedder", "params": {"embed_dim": 8, "n_classes": 3}}
    model = {"target": "a.B", "params": {"class_names": str(tmp_path / "names.txt"), "cond_stage_config": stage}}
    config, (text,) = collect_texts(model)
    assert config["params"]["class_names"] == text.name == "class_names.txt" and text.text == "a\nb\nc\n"
    stage["params"]["n_classes"] = 4
    assert len(collect_texts(model)[1]) == 1  # the last label is the null class
    stage["params"]["n_classes"] = 7
    with pytest.raises(UserError, match="has 3 names, the model 7 classes"):
        collect_texts(model)


def test_the_palette_is_copied(tmp_path):
    for name, text in (("palette.txt", "#87ceeb 3 sky\n"), ("palette.json", '{"#87ceeb": 3}')):
        (tmp_path / f"my_{name}").write_text(text, encoding="utf-8")
        model = {"target": "a.B", "params": {"palette": str(tmp_path / f"my_{name}")}}
        config, (found,) = collect_texts(model)
        assert config["params"]["palette"] == found.name == name and found.text == text
    (tmp_path / "other.txt").write_text("a private text")
    with pytest.raises(UserError, match="palette"):
        collect_texts({"target": "a.B", "params": {"palette": str(tmp_path / "other.txt")}})


def test_names_that_are_no_files_stay(tmp_path):
    stage = {"target": "x.Y", "params": {"vocab": "bert-base-uncased"}}
    model = {"target": "a.B", "params": {"class_names": "imagenet", "cond_stage_config": stage}}
    assert collect_texts(model) == (model, [])
    listed = {"target": "a.B", "params": {"class_names": ["fox"], "cond_stage_config": "__is_unconditional__"}}
    assert collect_texts(listed) == (listed, [])


def test_text_file_with_other_content_is_kept(run, tmp_path, capsys):
    folder, _ = run
    out = tmp_path / "m"
    out.mkdir()
    (out / "vocab.txt").write_text("precious")
    options = ["--ckpt", str(folder / "checkpoints" / "last.ckpt"), "--outdir", str(out)]
    assert export(options) == 2
    assert "exists with other content" in capsys.readouterr().err
    assert (out / "vocab.txt").read_text() == "precious" and not (out / "model.safetensors").exists()
    assert export([*options, "--overwrite"]) == 0
    assert (out / "vocab.txt").read_bytes() == VOCAB.read_bytes()
