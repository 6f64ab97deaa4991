"""Tests of `ldm.config.model_files`: finding the files of models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ldm.config.model_files import available_models, find_model, named_model
from ldm.errors import UserError


def write(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()


def test_models_are_found_by_name_folder_and_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mine, folder = tmp_path / "models" / "ldm" / "mine", tmp_path / "elsewhere"
    for each in (mine, folder):
        write(each, "config.yaml", "model.ckpt")
    assert named_model("mine").checkpoint.name == "model.ckpt" and named_model("mine").name == "mine"
    (mine / "model.safetensors").touch()
    assert named_model("mine").checkpoint.name == "model.safetensors"
    assert named_model(str(folder)).config == folder / "config.yaml"
    assert find_model(ckpt=str(folder / "model.ckpt")).config == folder / "config.yaml"
    assert find_model() is None


def test_hidden_folders_are_no_models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("mine", ".mine", ".ipynb_checkpoints"):
        write(tmp_path / "models" / "ldm" / name, "config.yaml", "model.ckpt")
    found = available_models()
    assert "mine" in found and not any(name.startswith(".") for name in found)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"name": "mime"}, 'no model "mime".*did you mean "mine".*available:.*mine'),
        ({"name": "hollow"}, "contains no weights"),
        ({"name": "bare"}, r"contains no config\.yaml"),
        ({"name": "mine", "ckpt": "x"}, "leave out"),
        ({"config": "x.yaml"}, "needs --ckpt"),
        ({"ckpt": "x.ckpt"}, "no checkpoint"),
        ({"ckpt": "models/ldm/bare/model.ckpt"}, "--config"),
        ({"ckpt": "models/ldm/bare/model.ckpt", "config": "x.yaml"}, "no configuration"),
    ],
)
def test_missing_model_raises_user_error(tmp_path, monkeypatch, options, match):
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "hollow", "bare"):
        (tmp_path / "models" / "ldm" / name).mkdir(parents=True)
    for name in ("mine", "bare"):
        torch.save({"state_dict": {"weight": torch.ones(1)}}, tmp_path / "models" / "ldm" / name / "model.ckpt")
    with pytest.raises(UserError, match=match):
        find_model(**options)


def test_the_newest_run_that_matches_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("2025-01-02_ldm", "2025-01-10_ldm", "2025-03-01_first"):
        run = tmp_path / "runs" / name
        write(run / "checkpoints", "last.ckpt")
        write(run / "configs", f"{name[:10]}T00-00-00-project.yaml")
    write(tmp_path / "runs" / "2025-02-01_ldm" / "configs", "2025-project.yaml")  # has no checkpoint
    found = named_model("runs/*_ldm")
    assert found.name == "2025-01-10_ldm"
    assert found.checkpoint == Path("runs/2025-01-10_ldm/checkpoints/last.ckpt")
    with pytest.raises(UserError, match=r'"runs/\*_other" matches no folder of a model with weights'):
        named_model("runs/*_other")
    write(tmp_path / "runs" / "a*", "model.ckpt", "config.yaml")
    assert named_model("runs/a*").name == "a*"
