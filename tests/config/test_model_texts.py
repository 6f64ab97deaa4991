"""Tests of `ldm.config.model_texts`: text files beside the configuration of a model."""

from __future__ import annotations

import pytest

from ldm.config.model_config import read_config
from ldm.config.model_files import find_model
from ldm.config.model_texts import named_texts, with_own_texts

STAGE = {"target": "x.Y", "params": {"vocab": "vocab.txt", "n_layer": 1}}
MODEL = {"target": "a.B", "params": {"class_names": "names.txt", "cond_stage_config": STAGE, "z": 3}}


def test_files_beside_the_configuration_are_absolute(tmp_path):
    (tmp_path / "vocab.txt").touch()
    found = with_own_texts(MODEL, tmp_path)
    assert found["params"]["cond_stage_config"]["params"] == {"vocab": str(tmp_path / "vocab.txt"), "n_layer": 1}
    assert found["params"]["class_names"] == "names.txt" and found["params"]["z"] == 3
    assert STAGE["params"]["vocab"] == "vocab.txt"


@pytest.mark.parametrize("value", ["../names.txt", "sub/../../names.txt", "/names.txt", "imagenet", "gone.txt"])
def test_paths_out_of_the_folder_stay_as_they_are(tmp_path, value):
    (tmp_path / "m" / "sub").mkdir(parents=True)
    (tmp_path / "names.txt").touch()
    model = {"target": "a.B", "params": {"class_names": value}}
    assert with_own_texts(model, tmp_path / "m") == model


@pytest.mark.parametrize(
    "params", [{}, {"class_names": ["a", "b"]}, {"class_names": ""}, {"cond_stage_config": "__is_first_stage__"}]
)
def test_other_values_name_no_file(params):
    assert not list(named_texts({"target": "a.B", "params": params}))


def test_the_bundled_model_reads_its_own_files(tmp_path, monkeypatch, repo_root):
    """The copy of the folder needs neither the current folder nor data/emoji."""
    copy = tmp_path / "copy"
    copy.mkdir()
    folder = repo_root / "models/ldm/emoji64"
    for file in ("config.yaml", "vocab.txt", "class_names.txt"):
        (copy / file).write_bytes((folder / file).read_bytes())
    (copy / "model.safetensors").symlink_to(folder / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    params = read_config(find_model("copy").config)["params"]
    assert params["class_names"] == str(copy / "class_names.txt")
    assert params["cond_stage_config"]["params"]["vocab"] == str(copy / "vocab.txt")


@pytest.mark.parametrize("name", ["vocab.txt", "class_names.txt"])
def test_the_files_of_the_bundled_model_are_those_of_its_data(repo_root, name):
    assert (repo_root / "models/ldm/emoji64" / name).read_bytes() == (repo_root / "data/emoji" / name).read_bytes()
