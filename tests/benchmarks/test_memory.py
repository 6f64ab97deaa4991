"""Tests of the memory count against sums by hand and real tensors."""

from __future__ import annotations

import json

import pytest
import torch
from omegaconf import OmegaConf
from tiny_models import text_config
from tiny_stable_diffusion import stable_diffusion_config
from torch import nn

from benchmarks.memory import count, main
from ldm.modules.live_bytes import LiveBytes

FLOAT = 4


def test_live_storages_are_added_up():
    memory = LiveBytes()
    with memory.watching():
        a = torch.zeros(100)
        view, b = a[10:20], a + 1
        assert (memory.live, memory.peak) == (200 * FLOAT, 200 * FLOAT)
        del a
        assert memory.live == 200 * FLOAT, "the view holds the storage"
        del view
        assert memory.live == 100 * FLOAT
        b.add_(1)  # in place
    assert (memory.live, memory.peak) == (100 * FLOAT, 200 * FLOAT)
    with memory.watching():
        assert memory.peak == 100 * FLOAT, "a phase starts with the live bytes"


@torch.no_grad()
def test_a_chain_of_layers_holds_two_results_at_once():
    """x lives throughout; the input of each layer is freed once its result exists."""
    layers, x, memory = nn.Sequential(*(nn.Linear(64, 64) for _ in range(5))), torch.zeros(8, 64), LiveBytes()
    for tensor in (*layers.parameters(), x):
        memory.add(tensor)
    held = (5 * (64 * 64 + 64) + 8 * 64) * FLOAT
    assert memory.live == held
    with memory.watching():
        y = layers(x)
    assert memory.peak == held + 2 * 8 * 64 * FLOAT and memory.live == held + y.numel() * FLOAT


def test_fake_tensors_count_as_real_ones():
    """The same convolutions and attention, on real and on fake tensors."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    def peak() -> int:
        memory = LiveBytes()
        layer = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 3, 1))
        for tensor in layer.parameters():
            memory.add(tensor)
        with torch.no_grad(), memory.watching():
            x = layer(torch.zeros(2, 3, 16, 16))
            q = x.reshape(2, 1, 48, 16)
            nn.functional.scaled_dot_product_attention(q, q, q)
        return memory.peak

    real = peak()
    with FakeTensorMode():
        assert peak() == real


def test_weights_take_their_number_times_the_size_of_the_dtype():
    counted = count(text_config(), 16, 16, 1, torch.bfloat16)
    halves = count(text_config(), 16, 16, 1, torch.float32)
    weights = counted["weights"]
    assert 1.8 < halves["weights"] / weights <= 2
    assert weights < min(counted[phase] for phase in ("text encoder", "guided step", "decoder"))


def test_table_and_file_agree(tmp_path, capsys):
    OmegaConf.save(OmegaConf.create({"model": text_config()}), tmp_path / "tiny.yaml")
    words = ["--config", tmp_path / "tiny.yaml", "--H", 16, "--W", 32, "--json", tmp_path / "out.json"]
    assert main([str(word) for word in words]) == 0
    peaks = json.loads((tmp_path / "out.json").read_text())["bytes"]
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [row.split("|")[1].strip() for row in rows] == list(peaks)
    assert main(["--config", str(tmp_path / "tiny.yaml"), "--H", "17"]) == 2


def test_text_encoder_of_stable_diffusion_is_counted():
    counted = count(stable_diffusion_config(1), 16, 16, 1, torch.bfloat16)
    assert counted["weights"] < counted["text encoder"] < 1.2 * counted["weights"]


@pytest.mark.slow
@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_stable_diffusion_1_samples_512_x_512_in_4_gb(repo_root, precision):
    from ldm.config.model_config import read_config

    peaks = count(read_config(repo_root / "configs/stable-diffusion/v1-inference.yaml"), 512, 512, 1, precision)
    assert 2.1e9 < peaks["weights"] < 2.2e9 and max(peaks.values()) < 4e9


@pytest.mark.slow
def test_the_published_model_samples_512_x_1024_in_8_gb(repo_root):
    from ldm.config.model_config import read_config

    config = read_config(repo_root / "configs/latent-diffusion/txt2img-1p4B-eval.yaml")
    peaks = count(config, 512, 1024, 1, torch.bfloat16)
    assert 3.0e9 < peaks["weights"] < 3.1e9 and max(peaks.values()) < 5e9
