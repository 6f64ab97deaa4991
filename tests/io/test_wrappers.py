"""Checkpoints of wrapped models, and weights under other entries than `state_dict`."""

from __future__ import annotations

import gzip
import json
import logging

import pytest
import torch
from parity_cases import PARITY
from safetensors.torch import save_file
from tiny_models import class_config, make_model, text_config, write_model
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ldm.cli.convert_checkpoint import main as convert
from ldm.cli.export_model import main as export
from ldm.errors import UserError
from ldm.io.checkpoint.loading import load_weights
from ldm.io.checkpoint.reading import read_state_dict
from ldm.io.checkpoint.wrappers import unwrapped
from ldm.models.autoencoder import AutoencoderKL
from ldm.modules.ema import LitEma
from ldm.pipelines.loading import load_first_stage, load_model


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 3)
        self.second = nn.Sequential(nn.Linear(3, 2))


class Holder(nn.Module):
    def __init__(self, name: str, inner: nn.Module) -> None:
        super().__init__()
        self.add_module(name, inner)


def compiled(model: nn.Module) -> nn.Module:
    """Return a module with the names of `torch.compile(model)`, whose import takes seconds."""
    return Holder("_orig_mod", model)


WRAPPED = {
    "parallel": nn.DataParallel,
    "compiled": compiled,
    "averaged": AveragedModel,
    "compiled, then parallel": lambda model: nn.DataParallel(compiled(model)),
    "parallel, then compiled": lambda model: compiled(nn.DataParallel(model)),
    "parallel twice": lambda model: nn.DataParallel(nn.DataParallel(model)),
}


@pytest.fixture
def model() -> Small:
    torch.manual_seed(0)
    return Small()


def written(path, content):
    torch.save(content, path)
    return path


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def lines(caplog, part: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if part in record.getMessage()]


# -- wrappers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", WRAPPED)
def test_names_of_a_wrapped_model_are_its_own(tmp_path, model, caplog, kind):
    weights = WRAPPED[kind](model).state_dict()
    assert "first.weight" not in weights, "the file has other names"
    path = written(tmp_path / "x.ckpt", {"state_dict": weights})
    with caplog.at_level(logging.INFO):
        found = read_state_dict(path)
    found.pop("n_averaged", None)
    assert equal(found, model.state_dict())
    (line,) = lines(caplog, "wrapped model")
    assert f'"{path}"' in line and line.endswith("first.weight as first.weight") and "\n" not in line


@pytest.mark.slow
def test_compiled_models_have_these_names(model):
    assert torch.compile(model).state_dict().keys() == compiled(model).state_dict().keys()


@pytest.mark.parametrize("wrap", [nn.DataParallel, compiled], ids=["parallel", "compiled"])
def test_parts_of_a_model_may_be_wrapped(model, wrap):
    expected = Holder("model", Holder("inner", model)).state_dict()
    for wrapped in (
        Holder("model", wrap(Holder("inner", model))),
        Holder("model", Holder("inner", wrap(model))),
        wrap(Holder("model", wrap(Holder("inner", wrap(model))))),
    ):
        assert list(unwrapped(wrapped.state_dict()).values()) == list(expected)


def test_module_with_siblings_and_parameters_of_this_name_keep_their_names(model):
    names = [*Holder("module", model).state_dict(), "other.weight", "layer.module"]
    assert unwrapped(names) == {name: name for name in names}
    assert unwrapped(["module.a", "module.b.module"]) == {"module.a": "a", "module.b.module": "b.module"}


def test_names_that_would_become_equal_stay(tmp_path):
    names = ["_orig_mod.a.weight", "a.weight"]
    assert unwrapped(names) == {name: name for name in names}


def test_model_with_wrapper_names_of_its_own_loads(tmp_path, model):
    """Its files are read without these names, and its weights loaded under them, also if the file never had them."""
    for make in (lambda inner: Holder("module", inner), compiled):
        target = make(Small())
        for weights in (make(model).state_dict(), model.state_dict()):
            assert not load_weights(target, written(tmp_path / "x.ckpt", weights)).missing
            assert equal(target.state_dict(), make(model).state_dict())
        with pytest.raises(UserError, match=r"lacks .*second\.0\.weight"):
            load_weights(target, {name: value for name, value in weights.items() if "second" not in name})


def test_published_names_have_no_parts_of_wrappers():
    with gzip.open(PARITY / "state_dicts.json.gz") as file:
        published = json.load(file)["models"]
    for names in published.values():
        assert unwrapped(names) == {name: name for name in names}
        for prefix in ("module._orig_mod.", "net.", "model."):
            assert unwrapped(prefix + name for name in names) == {prefix + name: name for name in names}


@pytest.mark.parametrize("where", ["", "model", "model.diffusion_model"])
@pytest.mark.parametrize("wrap", [nn.DataParallel, compiled], ids=["parallel", "compiled"])
def test_averages_of_a_wrapped_model_replace_its_weights(tmp_path, where, wrap):
    """The averages of a wrapped network have its names without dots, such as `model_ema.diffusion_model_orig_mod…`."""
    trained = write_model(tmp_path / "plain", text_config(use_ema=True)).requires_grad_(True)
    trained.model_ema = LitEma(trained.model)
    if where:
        parent = trained.get_submodule(where.rpartition(".")[0])
        setattr(parent, where.rpartition(".")[2], wrap(trained.get_submodule(where)))
        trained.model_ema = LitEma(trained.model)
    for average in list(trained.model_ema.buffers())[2:]:  # after the decay and the count
        average.add_(1)
    path = written(tmp_path / "wrapped.ckpt", {"state_dict": (trained if where else wrap(trained)).state_dict()})
    loaded = load_model(tmp_path / "plain/config.yaml", path)
    live = list(trained.model.parameters())
    assert len(live) > 50
    assert all(torch.equal(a, b + 1) for a, b in zip(loaded.model.parameters(), live, strict=True))


def test_model_inside_another_class_loads(tmp_path, caplog):
    """Such as a LightningModule of one's own, whose weights begin with `net.`."""
    caplog.set_level(logging.WARNING, logger="ldm")
    write_model(tmp_path / "plain", text_config())
    files = tmp_path / "plain/config.yaml", tmp_path / "plain/model.ckpt"
    weights = {f"net.{name}": value for name, value in read_state_dict(files[1]).items()}
    path = written(tmp_path / "wrapped.ckpt", {"state_dict": weights})
    assert equal(load_model(files[0], path).state_dict(), load_model(*files).state_dict())
    assert equal(load_first_stage(files[0], path).state_dict(), load_first_stage(*files).state_dict())
    assert not lines(caplog, "names")


def test_prefix_of_other_models_is_named(tmp_path, model):
    path = written(tmp_path / "x.ckpt", {f"net.{name}": value for name, value in model.state_dict().items()})
    with pytest.raises(UserError, match=r'names the weights of Small with the prefix "net\."; save them without it'):
        load_weights(Small(), path)
    both = {f"{prefix}.{name}": value for prefix in ("ema", "net.a") for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match=r'with the prefix "ema\." or "net\.a\."'):
        load_weights(Small(), both)
    del both["ema.second.0.bias"], both["net.a.first.bias"]
    with pytest.raises(UserError, match=r"belongs to another model: it lacks 100\.0%"):
        load_weights(Small(), both)


def test_first_stages_and_parts_of_models_start_from_wrapped_checkpoints(tmp_path):
    trained = make_model(text_config())
    stage = trained.first_stage_model
    params = text_config()["params"]["first_stage_config"]["params"]
    for content in (nn.DataParallel(stage), compiled(nn.DataParallel(trained))):
        path = written(tmp_path / "x.ckpt", {"model_state_dict": content.state_dict()})
        started = AutoencoderKL(**params, ckpt_path=path)
        assert equal(started.state_dict(), stage.state_dict())
    ignoring = AutoencoderKL(**params)
    before = ignoring.decoder.conv_out.weight.clone()
    ignoring.init_from_ckpt(path, ignore_keys=["decoder.conv_out"])
    assert torch.equal(ignoring.decoder.conv_out.weight, before)
    assert torch.equal(ignoring.encoder.conv_in.weight, stage.encoder.conv_in.weight)
    fresh = make_model(text_config(ckpt_path=str(path)))
    fresh.init_from_ckpt(str(path))
    assert equal(fresh.state_dict(), trained.state_dict())
    network = make_model(class_config())
    network.init_from_ckpt(str(path), only_model=True)
    assert equal(network.model.state_dict(), trained.model.state_dict())


def test_commands_write_the_names_of_the_model(tmp_path, capsys):
    write_model(tmp_path / "plain", text_config())
    weights = nn.DataParallel(make_model(text_config())).state_dict()
    path = written(tmp_path / "wrapped.ckpt", {"model": weights, "optimizer": {"state": {}}})
    assert convert([str(path), str(tmp_path / "x.safetensors")]) == 0
    assert read_state_dict(tmp_path / "x.safetensors").keys() == {name.removeprefix("module.") for name in weights}
    config = str(tmp_path / "plain/config.yaml")
    assert export(["--ckpt", str(path), "--config", config, "--outdir", str(tmp_path / "out")]) == 0
    load_model(tmp_path / "out/config.yaml", tmp_path / "out/model.safetensors")


# -- entries ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", ["model", "model_state_dict", "module", "net", "params", "weights", "ema"])
def test_weights_may_be_in_another_entry(tmp_path, model, caplog, entry):
    rest = {"epoch": 3, "step": torch.tensor(5), "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}}
    path = written(tmp_path / "x.ckpt", {**rest, entry: model.state_dict()})
    with caplog.at_level(logging.INFO):
        assert equal(read_state_dict(path), model.state_dict())
    assert lines(caplog, "reading") == [f'reading the weights of "{path}" from its entry "{entry}"']


@pytest.mark.parametrize(
    ("wrap", "entry"),
    [
        (lambda weights: {"model": {"state_dict": weights, "args": {"lr": 1}}}, "model.state_dict"),
        (lambda weights: {"state_dict": {"model": weights}}, "state_dict.model"),
        (lambda weights: {"state_dict": {}, "model": weights}, "model"),
    ],
)
def test_weights_may_be_in_entries_of_entries(tmp_path, model, caplog, wrap, entry):
    with caplog.at_level(logging.INFO):
        assert equal(read_state_dict(written(tmp_path / "x.ckpt", wrap(model.state_dict()))), model.state_dict())
    assert len(lines(caplog, f'from its entry "{entry}"')) == 1


def test_state_dict_is_chosen_before_other_entries(tmp_path, model, caplog):
    others = {"ema": {"a": torch.ones(1)}, "model": {"b": torch.ones(1)}}
    path = written(tmp_path / "x.ckpt", {**others, "state_dict": model.state_dict()})
    with caplog.at_level(logging.INFO):
        assert equal(read_state_dict(path), model.state_dict())
    assert not caplog.records


def test_several_sets_of_weights_are_named(tmp_path, model):
    path = written(tmp_path / "x.ckpt", {"model": model.state_dict(), "ema": {"a": torch.ones(1)}, "epoch": 3})
    with pytest.raises(UserError, match='contains several sets of weights, "model", "ema"; save one of them alone'):
        read_state_dict(path)


def test_other_entries_are_not_taken_for_weights(tmp_path):
    path = written(tmp_path / "x.ckpt", {"optimizer": {"a": torch.ones(1)}, "model": {"lr": 1}})
    with pytest.raises(UserError, match=r"contains no weights \(it contains: optimizer, model\)"):
        read_state_dict(path)


def test_tensors_beside_an_empty_state_dict_are_not_weights(tmp_path):
    path = written(tmp_path / "x.ckpt", {"state_dict": {}, "step": torch.tensor(3)})
    with pytest.raises(UserError, match=r"contains no weights \(it contains: state_dict, step\)"):
        read_state_dict(path)


def test_entries_that_hold_themselves_end(tmp_path):
    endless: dict = {}
    endless["model"] = endless
    with pytest.raises(UserError, match="contains no weights"):
        read_state_dict(written(tmp_path / "x.ckpt", endless))


def test_weights_can_be_read_as_written(tmp_path, model):
    """Neither other names nor other entries suit a run that is resumed."""
    weights = nn.DataParallel(model).state_dict()
    path = written(tmp_path / "x.ckpt", {"state_dict": weights})
    for content in ({"state_dict": weights}, {"state_dict": weights, "model": model.state_dict()}, weights):
        assert equal(read_state_dict(written(path, content), as_written=True), weights)
    for content in ({"model": weights}, {"state_dict": {}, "model": weights}, {"state_dict": {"model": weights}}):
        with pytest.raises(UserError, match="contains no weights"):
            read_state_dict(written(path, content), as_written=True)
    with pytest.raises(UserError, match="contains no weights"):
        read_state_dict(written(path, {"state_dict": 3, "w": torch.ones(1)}), as_written=True)


def test_safetensors_files_of_wrapped_models_are_read(tmp_path, model):
    save_file(nn.DataParallel(model).state_dict(), tmp_path / "x.safetensors")
    assert equal(read_state_dict(tmp_path / "x.safetensors"), model.state_dict())
