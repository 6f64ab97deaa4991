"""Tests of the command `convert_checkpoint`."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hostile_files import damaged, hostile
from torch import nn

from ldm.cli.convert_checkpoint import main as convert
from ldm.io.checkpoint import reading
from ldm.io.checkpoint.loading import load_weights
from ldm.io.checkpoint.reading import read_checkpoint, read_state_dict
from ldm.modules.ema import LitEma


class Model(nn.Module):
    """Model with averages, a loss and a table, as diffusion models have them."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.loss = nn.Linear(2, 2)
        self.register_buffer("alphas_cumprod", torch.linspace(1, 1e-9, 7))
        self.model_ema = LitEma(self.model)


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = Model()
    for name, value in model.model_ema.named_buffers():
        if name not in ("decay", "num_updates"):
            value.add_(0.25)
    return {**model.state_dict(), "ddim_alphas": torch.ones(5), "ddim_sigmas": torch.ones(5)}


@pytest.fixture
def checkpoint(tmp_path, weights):
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": weights, "global_step": 42, "optimizer_states": [{"state": {}}]}, path)
    return path


def equal(a, b) -> bool:
    def same(x, y):
        return x.dtype == y.dtype and x.shape == y.shape and x.equal(y)

    return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)


def model_entries(weights) -> dict[str, torch.Tensor]:
    return {name: value for name, value in weights.items() if not name.startswith(("loss.", "ddim_"))}


def test_both_kinds_survive_a_round_trip_bit_for_bit(checkpoint, weights, tmp_path, capsys):
    there, back = tmp_path / "new" / "model.safetensors", tmp_path / "back.ckpt"
    assert convert([str(checkpoint), str(there), "--weights", "both"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "left out 4 entries of losses and samplers: loss.weight, loss.bias, ddim_alphas, ddim_sigmas"
    assert printed[1].endswith("both weights") and str(there) in printed[1]
    assert equal(read_state_dict(there), model_entries(weights))
    assert convert([str(there), str(back), "--weights", "both"]) == 0
    assert equal(read_state_dict(back), model_entries(weights))
    assert torch.load(back, weights_only=True)["global_step"] == 42
    assert back.stat().st_size < 20_000  # each tensor has its own storage, not that of the whole file
    load_weights(Model(), read_state_dict(back))


def test_every_dtype_and_shape_survives_a_round_trip(tmp_path):
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(4, 6, generator=generator)
    weights = {
        "a.b": numbers.t(),
        "a.part": numbers[1:3, ::2],
        "a.none": torch.empty(0, 3),
        "a.one": torch.tensor(2.5, dtype=torch.float64),
        "a.odd": torch.tensor([float("nan"), float("inf"), -0.0]).view(torch.int32),
        **{f"a.{kind}": numbers.to(kind) for kind in (torch.float16, torch.bfloat16, torch.int64, torch.bool)},
    }
    first, second, third = (tmp_path / name for name in ("1.ckpt", "2.safetensors", "3.ckpt"))
    torch.save(weights, first)
    assert convert([str(first), str(second)]) == 0
    assert convert([str(second), str(third)]) == 0
    assert equal(read_state_dict(third), weights)


@pytest.mark.parametrize("kind", ["live", "ema"])
def test_one_kind_is_written_under_the_live_names(checkpoint, weights, tmp_path, kind):
    target = tmp_path / "model.safetensors"
    assert convert([str(checkpoint), str(target), "--weights", kind]) == 0
    read = read_state_dict(target)
    assert not any(name.startswith(("model_ema.", "loss.", "ddim_")) for name in read)
    source = "model.0.weight" if kind == "live" else "model_ema.0weight"
    assert torch.equal(read["model.0.weight"], weights[source])
    assert read["model.1.running_mean"].equal(weights["model.1.running_mean"])


def test_the_metadata_states_the_origin_of_the_weights(checkpoint, tmp_path):
    first, second, third = (tmp_path / name for name in ("1.safetensors", "2.ckpt", "3.safetensors"))
    assert convert([str(checkpoint), str(first), "--weights", "ema"]) == 0
    digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    expected = {"format": "pt", "source_sha256": digest, "weights": "ema", "step": "42"}
    assert read_checkpoint(first)["metadata"] == expected
    assert convert([str(first), str(second)]) == 0
    assert convert([str(second), str(third)]) == 0
    digest = hashlib.sha256(second.read_bytes()).hexdigest()
    assert read_checkpoint(third)["metadata"] == {**expected, "source_sha256": digest}


def test_half_leaves_tables_and_scalars_alone(checkpoint, weights, tmp_path):
    target = tmp_path / "model.safetensors"
    assert convert([str(checkpoint), str(target), "--weights", "both", "--half"]) == 0
    for name, value in read_state_dict(target).items():
        halved = name.startswith(("model.", "model_ema.")) and value.dim() > 0
        assert value.dtype == (torch.float16 if halved else weights[name].dtype), name
        assert torch.equal(value, weights[name].to(value.dtype))
    assert read_checkpoint(target)["metadata"]["dtype"] == "float16"


def test_half_leaves_the_tables_of_an_inner_model_alone(tmp_path):
    """The classifier of noisy latents holds a whole diffusion model; its smallest values are 0 in float16."""
    source, target = tmp_path / "last.ckpt", tmp_path / "model.safetensors"
    tables = {f"diffusion_model.{name}": torch.linspace(1, 1e-9, 7) for name in ("alphas_cumprod", "betas")}
    torch.save({"state_dict": {**tables, "diffusion_model.model.weight": torch.ones(3)}}, source)
    assert convert([str(source), str(target), "--half"]) == 0
    read = read_state_dict(target)
    assert all(torch.equal(read[name], table) for name, table in tables.items())
    assert read["diffusion_model.model.weight"].dtype == torch.float16


def test_the_loss_of_a_first_stage_is_left_out(tmp_path, capsys):
    source, target = tmp_path / "last.ckpt", tmp_path / "model.safetensors"
    names = ("first_stage_model.loss.weight", "first_stage_model.decoder.weight", "lossy.weight")
    torch.save({name: torch.ones(2) for name in names}, source)
    assert convert([str(source), str(target)]) == 0
    assert set(read_state_dict(target)) == set(names[1:])
    assert "left out 1 entries of losses and samplers: first_stage_model.loss.weight" in capsys.readouterr().out


def test_half_keeps_non_finite_values(tmp_path):
    source, target = tmp_path / "last.ckpt", tmp_path / "model.safetensors"
    torch.save({"a.b": torch.tensor([float("nan"), float("-inf"), 1.0])}, source)
    assert convert([str(source), str(target), "--half"]) == 0
    value = read_state_dict(target)["a.b"]
    assert value[0].isnan() and value[1:].tolist() == [float("-inf"), 1.0]


def test_wrong_options_return_2_and_write_nothing(checkpoint, weights, tmp_path, capsys):
    live, taken, large = tmp_path / "live.ckpt", tmp_path / "taken.safetensors", tmp_path / "large.ckpt"
    torch.save({name: value for name, value in weights.items() if not name.startswith("model_ema")}, live)
    torch.save({"a.b": torch.full((3,), 1e6)}, large)
    taken.write_text("precious")
    new = str(tmp_path / "new.safetensors")
    before = sorted(tmp_path.iterdir())
    cases = [
        ([str(checkpoint), new], "choose --weights"),
        ([str(live), new, "--weights", "ema"], "no averaged weights"),
        ([str(live), new, "--weights", "both"], "no averaged weights"),
        ([str(live), str(taken)], "--overwrite"),
        ([str(live), str(live), "--overwrite"], "is the source itself"),
        ([str(live), str(tmp_path / "new.pth")], "end its name in .safetensors or .ckpt"),
        ([str(tmp_path / "gone.ckpt"), new], "there is no checkpoint"),
        ([str(large), new, "--half"], "a.b does not fit into float16; leave out --half"),
        ([str(live), str(taken / "x.ckpt")], "cannot write"),
    ]
    for options, message in cases:
        assert convert(options) == 2
        printed = capsys.readouterr().err
        assert message in printed and printed.startswith("error: ") and len(printed.splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before and taken.read_text() == "precious"
    assert convert([str(live), str(taken), "--overwrite"]) == 0
    assert len(read_state_dict(taken)) == len(model_entries(read_state_dict(live)))


@pytest.mark.parametrize("name", sorted({**hostile(Path("trap")), **damaged()}))
def test_a_file_that_is_not_a_checkpoint_is_one_line(tmp_path, name, capsys):
    files = {**hostile(tmp_path / "trap"), **{key: content for key, (content, _) in damaged().items()}}
    (tmp_path / "source.ckpt").write_bytes(files[name])
    assert convert([str(tmp_path / "source.ckpt"), str(tmp_path / "target.safetensors")]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and len(printed.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["source.ckpt"]


def test_a_full_disk_keeps_the_old_file(checkpoint, tmp_path, monkeypatch, capsys):
    def fail(content, path):
        path.write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    target = tmp_path / "model.ckpt"
    target.write_text("precious")
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(torch, "save", fail)
    assert convert([str(checkpoint), str(target), "--weights", "live", "--overwrite"]) == 2
    assert "cannot write" in capsys.readouterr().err
    assert target.read_text() == "precious" and sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_a_file_that_appears_meanwhile_is_kept(checkpoint, tmp_path, monkeypatch, capsys, suffix):
    read, target = reading.read_state_dict, tmp_path / f"model{suffix}"

    def slow(path):
        target.write_text("of another process")
        return read(path)

    monkeypatch.setattr(reading, "read_state_dict", slow)
    assert convert([str(checkpoint), str(target), "--weights", "live"]) == 2
    assert "File exists" in capsys.readouterr().err and target.read_text() == "of another process"


def test_help_has_an_example_and_imports_nothing_heavy(repo_root):
    script = str(repo_root / "scripts" / "convert_checkpoint.py")
    words = [sys.executable, "-X", "importtime", script, "--help"]
    started = time.monotonic()
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert time.monotonic() - started < 5
    assert "example: python scripts/convert_checkpoint.py last.ckpt model.safetensors" in " ".join(done.stdout.split())
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "ldm.cli.convert_checkpoint" in imported and not {"torch", "numpy", "safetensors"} & imported
