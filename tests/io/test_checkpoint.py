"""Checkpoints: read, load and write weights."""

from __future__ import annotations

import json
import logging
import resource
import sys
from collections import OrderedDict
from types import ModuleType

import numpy as np
import pytest
import torch
from hostile_files import in_zip, numpy_scalar, tensor, text
from safetensors.torch import load_file
from safetensors.torch import save_file as save
from torch import nn

from ldm.errors import UserError
from ldm.io.checkpoint.loading import load_weights, without_ema
from ldm.io.checkpoint.reading import read_checkpoint, read_state_dict, training_step
from ldm.io.checkpoint.writing import save_checkpoint, save_safetensors
from ldm.models.diffusion.ddpm import DDPM
from ldm.modules.ema import LitEma


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 3)
        self.second = nn.Linear(3, 2)
        self.register_buffer("table", torch.arange(3.0))


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
def test_the_content_decides_the_format(tmp_path, model, form, name):
    path, weights = tmp_path / name, model.state_dict()
    if form == "safetensors":
        save(weights, path)
    elif form == "lightning":
        written(path, {"state_dict": weights, "epoch": 3, "global_step": 7, "callbacks": {"a": {"best": None}}})
    else:
        written(path, weights, _use_new_zipfile_serialization=form == "bare")
    assert equal(read_state_dict(path), weights)


def test_entries_beside_the_weights_are_read(tmp_path, model):
    path = written(tmp_path / "last.ckpt", {"state_dict": model.state_dict(), "global_step": 7})
    assert read_checkpoint(path)["global_step"] == 7
    save(model.state_dict(), tmp_path / "m", {"step": "9"})
    assert read_checkpoint(tmp_path / "m")["metadata"] == {"step": "9"}


@pytest.mark.parametrize("where", ["missing.ckpt", "."])
def test_a_path_that_is_not_a_file_raises_user_error(tmp_path, where):
    with pytest.raises(UserError, match="checkpoint"):
        read_checkpoint(tmp_path / where)


@pytest.mark.parametrize("content", [[1, 2], 3, {}, {"epoch": 3}, {"state_dict": [1]}, {"state_dict": {"a": 1}}])
def test_a_file_without_weights_raises_user_error(tmp_path, content):
    with pytest.raises(UserError, match="weights"):
        read_state_dict(written(tmp_path / "x.ckpt", content))


@pytest.mark.parametrize("new", [True, False])
def test_checkpoints_of_lightning_1_load_without_lightning(tmp_path, model, monkeypatch, new):
    """Published files have classes as keys of `callbacks`; reading neither imports nor calls them."""
    names = "pytorch_lightning.callbacks.retired", "pytorch_lightning.utilities.parsing"
    calls = []

    class Checkpoint:
        def __setstate__(self, state):
            calls.append(state)

    class AttributeDict(dict):
        pass

    content = {
        "epoch": 3,
        "global_step": 7,
        "pytorch-lightning_version": "1.4.2",
        "state_dict": OrderedDict(model.state_dict()),
        "callbacks": {Checkpoint: {"best_model_score": torch.tensor(0.5)}},
        "hook": Checkpoint(),
        "hyper_parameters": AttributeDict(lr=1e-4, nested=AttributeDict(steps=10)),
        "optimizer_states": [{"state": {0: {"step": 5, "exp_avg": torch.ones(2)}}, "param_groups": []}],
    }
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pytorch_lightning", ModuleType("pytorch_lightning"))
        for name, kind in zip(names, (Checkpoint, AttributeDict), strict=True):
            kind.__module__, kind.__qualname__ = name, kind.__name__
            module = ModuleType(name)
            setattr(module, kind.__name__, kind)
            patch.setitem(sys.modules, name, module)
        path = written(tmp_path / "published.ckpt", content, _use_new_zipfile_serialization=new)
    assert equal(read_state_dict(path), model.state_dict())
    checkpoint = read_checkpoint(path)
    assert list(checkpoint["callbacks"].values()) == [{"best_model_score": 0.5}]
    assert checkpoint["hyper_parameters"] == {"lr": 1e-4, "nested": {"steps": 10}}
    assert not calls
    assert names[0] not in sys.modules
    assert not [g for g in torch.serialization.get_safe_globals() if isinstance(g, tuple)], (
        "the replacements are still registered"
    )


def test_numpy_scalars_are_read_as_python_numbers(tmp_path, model):
    """Published checkpoints contain NumPy scalars of learning-rate schedules."""
    rates = [np.float64(1.5e-4), np.float32(0.25), np.int64(-3), np.bool_(True), np.dtype(">f8").type(2.5)]
    path = written(tmp_path / "x.ckpt", {"state_dict": model.state_dict(), "lr_schedulers": [{"_last_lr": rates}]})
    read = read_checkpoint(path)["lr_schedulers"][0]["_last_lr"]
    assert read == [1.5e-4, 0.25, -3, True, 2.5]
    assert [type(number) for number in read] == [float, float, int, bool, float]


def test_entries_that_are_not_tensors_are_dropped_and_logged(tmp_path, model, caplog):
    content = {"state_dict": {**model.state_dict(), "note": "x", 3: torch.ones(1), "step\n": 7}}
    path = written(tmp_path / "x.ckpt", content)
    with caplog.at_level(logging.WARNING):
        assert equal(read_state_dict(path), model.state_dict())
    assert "3 names not tensors" in caplog.text and "note, <int>, step?" in caplog.text


def test_a_hand_made_archive_is_read(tmp_path):
    """The functions that build hostile archives also build valid ones."""
    path = tmp_path / "x.ckpt"
    path.write_bytes(in_zip(tensor(3), **{"data/0": np.array([1, 2, 3], "<f4").tobytes()}))
    assert read_state_dict(path)["w"].tolist() == [1, 2, 3]
    path.write_bytes(in_zip(b"\x80\x02}" + text("x") + numpy_scalar("f8", "\0" * 6 + "\xf0\x3f")[2:-1] + b"s."))
    assert read_checkpoint(path) == {"x": 1.0}


def test_weights_are_copied_and_converted(tmp_path, model):
    half = {name: value.half() for name, value in model.state_dict().items()}
    fresh = Small()
    report = load_weights(fresh, written(tmp_path / "half.ckpt", {"state_dict": half}))
    assert not report.missing and not report.unexpected
    assert all(value.dtype == torch.float32 for value in fresh.state_dict().values())
    assert equal(fresh.state_dict(), {name: value.float() for name, value in half.items()})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_table_of_the_configuration_replaces_its_rounded_copy(dtype):
    schedule = {"linear_start": 0.00085, "linear_end": 0.012}
    config = {"target": "torch.nn.Identity"}
    model, other = (DDPM(config, timesteps=10, conditioning_key=None, **each) for each in (schedule, {}))
    half = {name: value.to(dtype) for name, value in model.state_dict().items()}
    exact = {name: getattr(model, name).clone() for name in model.computed_buffers}
    load_weights(model, half)
    assert all(torch.equal(getattr(model, name), table) for name, table in exact.items())
    assert not torch.equal(half["alphas_cumprod"].float(), exact["alphas_cumprod"])
    load_weights(other, half)
    assert torch.equal(other.alphas_cumprod, half["alphas_cumprod"].float()), "the schedule of the file is another one"


def test_mismatched_names_are_logged(model, caplog):
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


def test_the_loss_of_a_first_stage_is_ignored(caplog):
    """No warning is logged, whether the file or the model has the loss."""
    first_stage = nn.ModuleDict({"decoder": nn.Linear(2, 2), "loss": nn.Linear(9, 9)})
    full, bare = (
        nn.ModuleDict({"first_stage_model": nn.ModuleDict(each)})
        for each in (first_stage, {"decoder": nn.Linear(2, 2)})
    )
    with caplog.at_level(logging.WARNING):
        load_weights(bare, full.state_dict())
        load_weights(full, bare.state_dict())
    assert not caplog.records


def test_weights_of_a_loss_load_if_the_model_has_them():
    module = nn.ModuleDict({"loss": nn.Linear(2, 2)})
    weights = {"loss.weight": torch.full((2, 2), 5.0), "loss.bias": torch.zeros(2)}
    load_weights(module, weights)
    assert (module["loss"].weight == 5).all()


@pytest.mark.parametrize("given", [(), (1,), (1, 1)], ids=str)
@pytest.mark.parametrize("own", [(), (1,), (1, 1)], ids=str)
def test_a_scalar_fits_with_any_number_of_dimensions(own, given):
    module = nn.ParameterDict({"scale": torch.zeros(own)})
    load_weights(module, {"scale": torch.full(given, 3.0)})
    assert torch.equal(module["scale"], torch.full(own, 3.0))


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
def test_a_checkpoint_of_another_model_changes_nothing(model, change, match):
    fresh = Small()
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    weights = dict(model.state_dict())
    change(weights)
    with pytest.raises(UserError, match=f"belongs to another model.*{match}"):
        load_weights(fresh, weights)
    assert equal(fresh.state_dict(), before)


@pytest.mark.parametrize(("lacking", "accepted"), [("two", True), ("three", False)])
def test_a_thousandth_of_the_parameters_may_be_missing(lacking, accepted, caplog):
    """The number of values counts, not of names: 2 of 2005 may be missing, 3 may not."""
    sizes = {"many": 2000, "two": 2, "three": 3}

    def make():
        return nn.ParameterDict({name: nn.Parameter(torch.zeros(size)) for name, size in sizes.items()})

    weights = {name: torch.ones(size) for name, size in sizes.items() if name != lacking}
    module = make()
    if accepted:
        report = load_weights(module, weights)
        assert report.missing == (lacking,) and lacking in caplog.text and module["many"].sum() == 2000
    else:
        with pytest.raises(UserError, match=r"lacks 0\.1%.*three"):
            load_weights(module, weights)
        assert module["many"].sum() == 0


def test_moving_averages_replace_the_live_weights():
    """The names are those of `LitEma`, for a model that averages a part and one that averages everything."""
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


def test_saved_weights_are_read_back_with_metadata(tmp_path, model):
    model.shared = model.first  # two names for the same memory
    path = tmp_path / "new" / "model.safetensors"
    save_safetensors(model, path, {"step": 3})
    assert equal(load_file(path), model.state_dict())
    assert read_checkpoint(path)["metadata"] == {"format": "pt", "step": "3"}
    assert json.dumps(sorted(entry.name for entry in path.parent.iterdir())) == '["model.safetensors"]'


def test_a_failed_save_keeps_the_old_file(tmp_path, model, monkeypatch):
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


@pytest.mark.parametrize("save", [save_checkpoint, save_safetensors])
def test_error_states_why_a_file_could_not_be_written(tmp_path, save):
    """torch reports only a position in the file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(UserError, match=r'^cannot write ".*model": File too large; choose'):
            save({"weight": torch.zeros(1_000_000)}, tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "step"),
    [
        ({"state_dict": {}, "global_step": 1234}, 1234),
        ({"state_dict": {}}, 0),
        ({"state_dict": {}, "global_step": "x"}, 0),
        ({"state_dict": {}, "global_step": -1}, 0),
        ({"global_step": torch.ones(3), "metadata": torch.ones(3)}, 0),
    ],
)
def test_the_training_step_of_a_checkpoint(tmp_path, content, step):
    assert training_step(written(tmp_path / "model.ckpt", content)) == step


@pytest.mark.parametrize(("noted", "step"), [({"step": 8038}, 8038), ({"step": "unknown"}, 0), ({}, 0)])
def test_the_training_step_of_an_exported_model(tmp_path, model, noted, step):
    save_safetensors(model, tmp_path / "model.safetensors", noted)
    assert training_step(tmp_path / "model.safetensors") == step


def test_saved_files_have_the_default_permissions(model, tmp_path):
    (tmp_path / "other").touch()
    save_safetensors(model, tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode
