"""Tests of precision names on CPUs with and without bfloat16 instructions."""

from __future__ import annotations

import logging

import pytest
import torch

from ldm.modules import precision


@pytest.fixture(params=[True, False], ids=["bfloat16", "none"])
def native(request, monkeypatch):
    """Simulate a CPU with or without bfloat16 instructions and return whether it has them."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": request.param})
    return request.param


def test_auto_is_bfloat16_if_the_cpu_supports_it(native):
    assert precision.computes_bfloat16("cpu") is native
    assert precision.choose_precision("auto", "cpu") is (torch.bfloat16 if native else torch.float32)


def test_auto_training_is_mixed_if_the_cpu_supports_bfloat16(native):
    assert precision.choose_training_precision("auto", "cpu") == ("bf16-mixed" if native else "32-true")


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_named_precision_is_unchanged(native, name):
    assert precision.choose_precision(name, "cpu") is getattr(torch, name)


@pytest.mark.parametrize("name", ["32-true", "bf16-mixed", "16-mixed", 32, None])
def test_named_training_precision_is_unchanged(native, name):
    assert precision.choose_training_precision(name, "cpu") == name


def test_emulated_bfloat16_logs_a_warning(native, caplog):
    with caplog.at_level(logging.WARNING):
        precision.choose_precision("bfloat16", "cpu")
        precision.choose_training_precision("bf16-mixed", "cpu")
        precision.choose_precision("float32", "cpu")
    assert len(caplog.records) == (0 if native else 2)


def test_cuda_support_excludes_emulation(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: calls.append(options) or True)
    assert precision.choose_precision("auto", "cuda:0") is torch.bfloat16
    assert calls == [{"including_emulation": False}]
