"""Reading and writing weights."""

from __future__ import annotations

import json
import logging
import pickle
import struct
import sys
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from safetensors.torch import save_file as save
from torch import nn

from ldm.checkpoint import (
    load_weights,
    read_checkpoint,
    read_state_dict,
    save_safetensors,
    without_ema,
)
from ldm.modules.ema import LitEma
from ldm.util import UserError


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 3)
        self.second = nn.Linear(3, 2)
        self.register_buffer("table", torch.arange(3.0))


class Payload:
    """Unpickling this would create a file."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture
def model() -> Small:
    torch.manual_seed(0)
    return Small()


def written(path, content, **options):
    torch.save(content, path, **options)
    return path


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", ["model.ckpt", "model.safetensors", "weights"])
@pytest.mark.parametrize("form", ["lightning", "bare", "old", "safetensors"])
def test_the_content_decides_how_a_file_is_read(tmp_path, model, form, name):
    path, weights = tmp_path / name, model.state_dict()
    if form == "safetensors":
        save(weights, path)
    elif form == "lightning":
        written(path, {"state_dict": weights, "epoch": 3, "global_step": 7, "callbacks": {"a": {"best": None}}})
    else:
        written(path, weights, _use_new_zipfile_serialization=form == "bare")
    assert equal(read_state_dict(path), weights)


def test_everything_beside_the_weights_is_there(tmp_path, model):
    path = written(tmp_path / "last.ckpt", {"state_dict": model.state_dict(), "global_step": 7})
    assert read_checkpoint(path)["global_step"] == 7
    save(model.state_dict(), tmp_path / "m", {"step": "9"})
    assert read_checkpoint(tmp_path / "m")["metadata"] == {"step": "9"}


def damaged(tmp_path, model, kind):
    path = tmp_path / "bad"
    whole = written(tmp_path / "whole", {"state_dict": model.state_dict()}).read_bytes()
    old = written(tmp_path / "old", model.state_dict(), _use_new_zipfile_serialization=False).read_bytes()
    save(model.state_dict(), tmp_path / "safe")
    safe = (tmp_path / "safe").read_bytes()
    content = {
        "empty": b"",
        "text": b"hello, this is no checkpoint at all",
        "web page": b"\n<!DOCTYPE html><html><body>404</body></html>",
        "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "zip cut in half": whole[: len(whole) // 2],
        "zip cut at its end": whole[:-30],
        "old cut": old[: len(old) // 2],
        "safetensors cut in its header": safe[:40],
        "safetensors cut in its data": safe[:-8],
        "safetensors with a foreign header": struct.pack("<Q", 2) + b"{]",
        "safetensors with a list": struct.pack("<Q", 8) + b'{"a":[1]}'[:8],
        "other zip": None,
    }[kind]
    if content is None:
        import zipfile

        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("readme.txt", "hello")
    else:
        path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "kind",
    [
        "empty",
        "text",
        "web page",
        "lfs",
        "zip cut in half",
        "zip cut at its end",
        "old cut",
        "safetensors cut in its header",
        "safetensors cut in its data",
        "safetensors with a foreign header",
        "safetensors with a list",
        "other zip",
    ],
)
def test_a_damaged_file_is_told_in_one_line(tmp_path, model, kind):
    path = damaged(tmp_path, model, kind)
    with pytest.raises(UserError) as error:
        read_state_dict(path)
    message = str(error.value)
    assert str(path) in message and "\n" not in message and ";" in message


@pytest.mark.parametrize("where", ["missing.ckpt", "."])
def test_a_path_that_is_no_file_is_told(tmp_path, where):
    with pytest.raises(UserError, match="checkpoint"):
        read_checkpoint(tmp_path / where)


@pytest.mark.parametrize("content", [[1, 2], 3, {}, {"epoch": 3}, {"state_dict": [1]}, {"state_dict": {"a": 1}}])
def test_a_file_without_weights_is_told(tmp_path, content):
    with pytest.raises(UserError, match="weights"):
        read_state_dict(written(tmp_path / "x.ckpt", content))


@pytest.mark.parametrize("new", [True, False])
def test_no_code_runs_out_of_a_pickle(tmp_path, model, new):
    trap = tmp_path / "trap"
    content = {"state_dict": model.state_dict(), "callbacks": Payload(trap)}
    path = written(tmp_path / "evil.ckpt", content, _use_new_zipfile_serialization=new)
    with pytest.raises(UserError, match=r"refused.*open.*could run code"):
        read_checkpoint(path)
    assert not trap.exists()


def test_checkpoints_of_lightning_1_load_without_lightning(tmp_path, model, monkeypatch):
    """Published files have classes among the keys of `callbacks`; opening one neither imports nor calls them."""
    name = "pytorch_lightning.callbacks.retired"
    retired = ModuleType(name)
    calls = []

    class Checkpoint:
        def __setstate__(self, state):
            calls.append(state)

    Checkpoint.__module__, Checkpoint.__qualname__ = name, "Checkpoint"
    retired.Checkpoint = Checkpoint
    content = {"state_dict": model.state_dict(), "callbacks": {Checkpoint: {"best": 0.5}}, "hook": Checkpoint()}
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, name, retired)
        path = written(tmp_path / "published.ckpt", content)
    assert equal(read_state_dict(path), model.state_dict())
    assert list(read_checkpoint(path)["callbacks"].values()) == [{"best": 0.5}]
    assert not calls
    assert name not in sys.modules
    assert not [g for g in torch.serialization.get_safe_globals() if isinstance(g, tuple)], "the stand-ins stayed"


def test_no_code_runs_out_of_a_plain_pickle(tmp_path):
    trap, path = tmp_path / "trap", tmp_path / "evil.ckpt"
    path.write_bytes(pickle.dumps({"state_dict": Payload(trap)}, protocol=4))
    with pytest.raises(UserError):
        read_checkpoint(path)
    assert not trap.exists()


def test_weights_are_copied_and_converted(tmp_path, model):
    half = {name: value.half() for name, value in model.state_dict().items()}
    fresh = Small()
    report = load_weights(fresh, written(tmp_path / "half.ckpt", {"state_dict": half}))
    assert not report.missing and not report.unexpected
    assert all(value.dtype == torch.float32 for value in fresh.state_dict().values())
    assert equal(fresh.state_dict(), {name: value.float() for name, value in half.items()})


def test_mismatches_are_logged_by_name(model, caplog):
    weights = {
        **model.state_dict(),
        "extra.weight": torch.ones(1),
        "ddim_alphas": torch.ones(2),
        "loss.d": torch.ones(1),
    }
    del weights["table"]
    with caplog.at_level(logging.WARNING):
        report = load_weights(Small(), weights)
    assert report.missing == ("table",) and report.unexpected == ("extra.weight",)
    assert "table" in caplog.text and "extra.weight" in caplog.text
    assert "ddim_" not in caplog.text and "loss." not in caplog.text


def test_stray_names_load_where_the_model_has_them():
    module = nn.ModuleDict({"loss": nn.Linear(2, 2)})
    weights = {"loss.weight": torch.full((2, 2), 5.0), "loss.bias": torch.zeros(2)}
    load_weights(module, weights)
    assert (module["loss"].weight == 5).all()


def test_ignored_names_keep_their_values(model):
    fresh = Small()
    before = fresh.second.weight.clone()
    report = load_weights(fresh, model.state_dict(), ignore_keys=["second"])
    assert torch.equal(fresh.second.weight, before) and torch.equal(fresh.first.weight, model.first.weight)
    assert set(report.missing) == {"second.weight", "second.bias"}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda w: w.update({"first.weight": torch.ones(3, 5)}), r"first\.weight: \(3, 5\), expected \(3, 4\)"),
        (lambda w: w.pop("second.weight"), r"lacks 26\.1%.*second\.weight"),
        (lambda w: [w.pop(name) for name in list(w)], "lacks 100.0%"),
    ],
)
def test_a_foreign_checkpoint_changes_nothing(model, change, match):
    fresh = Small()
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    weights = dict(model.state_dict())
    change(weights)
    with pytest.raises(UserError, match=f"foreign checkpoint.*{match}"):
        load_weights(fresh, weights)
    assert equal(fresh.state_dict(), before)


def test_averages_replace_the_live_weights():
    """With the names that `LitEma` gives, for a model that averages a part of itself and one that averages all."""
    part = nn.Module()
    part.model = Small()
    part.model_ema = LitEma(part.model)
    whole = Small()
    whole.model_ema = LitEma(whole)
    for module, prefix in ((part, "model."), (whole, "")):
        for name, buffer in module.model_ema.named_buffers():
            if name not in ("decay", "num_updates"):
                buffer.fill_(7.0)
        weights = without_ema(module.state_dict())
        assert not any(name.startswith("model_ema.") for name in weights)
        assert (weights[f"{prefix}first.weight"] == 7).all() and weights[f"{prefix}table"][1] == 1
        live = without_ema(module.state_dict(), use_average=False)
        assert not (live[f"{prefix}first.weight"] == 7).any() and live.keys() == weights.keys()


def test_saved_weights_come_back_with_their_metadata(tmp_path, model):
    model.shared = model.first  # two names, one memory
    path = tmp_path / "new" / "model.safetensors"
    save_safetensors(model, path, {"step": 3})
    assert equal(load_file(path), model.state_dict())
    assert read_checkpoint(path)["metadata"] == {"format": "pt", "step": "3"}
    assert json.dumps(sorted(entry.name for entry in path.parent.iterdir())) == '["model.safetensors"]'


def test_a_failed_save_leaves_the_old_file(tmp_path, model, monkeypatch):
    path = tmp_path / "model.safetensors"
    save_safetensors(model, path)
    before = path.read_bytes()

    def fail(tensors, filename, metadata):
        filename.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(UserError, match="No space left"):
        save_safetensors(model, path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
