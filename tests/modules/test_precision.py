"""Tests of precision names on CPUs with and without bfloat16 instructions, and of values that leave their range."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from ldm.errors import UserError
from ldm.modules import precision
from ldm.modules.packing import has_packed_weights, packed_weights
from ldm.modules.precision import check_range, finite_items, retry_in_float32


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


# -- values out of range ---------------------------------------------------------------------------------------


class Amplifier(nn.Module):
    """Module that multiplies images by 4096 and divides them again; from 16 on they overflow in float16.

    With `lost`, the values are infinite in half precision instead, as where bfloat16 overflows.
    """

    def __init__(self, dtype: torch.dtype = torch.float16, lost: bool = False) -> None:
        super().__init__()
        self.up, self.down = nn.Conv2d(1, 1, 1, bias=False), nn.Conv2d(1, 1, 1, bias=False)
        nn.init.constant_(self.up.weight, 4096.0)
        nn.init.constant_(self.down.weight, 1 / 4096)
        self.register_buffer("scale", torch.ones(()))  # its dtype is that of the weights, which may be packed
        self.lost = lost
        self.to(dtype).requires_grad_(False)

    def forward(self, x):
        h = self.up(x.to(self.scale.dtype))
        if self.lost and h.dtype != torch.float32:
            h = torch.where(h > 40000, torch.inf, h)
        return self.down(h)


def overflows(caplog) -> list[str]:
    return [record.message for record in caplog.records if "overflow" in record.message]


X = torch.tensor([0.25, 100.0, 1000.0]).view(3, 1, 1, 1)


def test_finite_items():
    x = torch.zeros(4, 2, 3)
    x[1, 0, 2], x[2, 1, 1], x[3, 0, 0] = torch.nan, torch.inf, -torch.inf
    assert finite_items(x).tolist() == [True, False, False, False]


def test_items_that_overflow_are_computed_again_in_float32(caplog):
    module = Amplifier()
    weights = {name: (value, value.data_ptr(), value.clone()) for name, value in module.named_parameters()}
    assert finite_items(module(X)).tolist() == [True, False, False]
    for _ in range(2):
        result = retry_in_float32(module, module, X)
        assert result.dtype == torch.float16 and result.flatten().tolist() == [0.25, 100.0, 1000.0]
    assert overflows(caplog) == [
        "the first stage overflows in float16; images that overflow are computed again in float32"
    ]
    for name, value in module.named_parameters():
        assert value is weights[name][0] and value.data_ptr() == weights[name][1]
        assert value.dtype == torch.float16 and torch.equal(value, weights[name][2])


def test_results_beyond_the_range_of_the_dtype_are_clamped_to_it():
    module = Amplifier()
    nn.init.constant_(module.down.weight, 1.0)
    assert retry_in_float32(module, module, X).flatten().tolist() == [1024.0, 65504.0, 65504.0]


def test_items_that_are_not_finite_in_float32_stay_so(caplog):
    module = Amplifier()
    module.down.weight.fill_(torch.nan)
    assert retry_in_float32(module, module, X).isnan().all()
    calls = []
    retry_in_float32(module, lambda x: calls.append(len(x)) or x * torch.nan, torch.full((2, 1, 1, 1), torch.nan))
    assert calls == [2], "an input that is not finite is no overflow"


def test_nothing_is_repeated_in_float32_precision(caplog):
    calls, module = [], Amplifier(torch.float32)
    retry_in_float32(module, lambda x: calls.append(1) or x * torch.inf, X)
    assert calls == [1] and not overflows(caplog)


def test_results_with_gradients_are_returned_as_they_are():
    module = Amplifier().requires_grad_(True)
    result = retry_in_float32(module, module, X)
    assert result.requires_grad and finite_items(result).tolist() == [True, False, False]


def test_overflow_under_autocast_is_repeated_in_float32(caplog):
    module = Amplifier(torch.float32)
    with torch.autocast("cpu", torch.float16):
        assert not module(X).isfinite().all()
        assert retry_in_float32(module, module, X).flatten().tolist() == [0.25, 100.0, 1000.0]
        assert torch.is_autocast_enabled("cpu")
    assert len(overflows(caplog)) == 1


def test_error_in_float32_restores_the_weights():
    module, calls = Amplifier(), []

    def failing(x):
        calls.append(x.dtype)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return module(x)

    with pytest.raises(RuntimeError, match="out of memory"):
        retry_in_float32(module, failing, X)
    assert all(value.dtype == torch.float16 for value in module.parameters())


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bfloat16 on this CPU")
@pytest.mark.parametrize("keep_originals", [True, False])
def test_packed_weights_stay_packed(keep_originals):
    module = Amplifier(torch.bfloat16, lost=True)
    with packed_weights(module, keep_originals=keep_originals):
        half = module(X)
        packed = [module.up.weight, module.down.weight]
        assert finite_items(half).tolist() == [True, False, False] and packed[0].layout == torch._mkldnn
        assert retry_in_float32(module, module, X).flatten().tolist() == [0.25, 100.0, 1000.0]
        assert has_packed_weights(module) and [module.up.weight, module.down.weight] == packed
        assert torch.equal(module(X), half)
    assert module.up.weight.dtype == torch.bfloat16 and float(module.up.weight) == 4096


@pytest.mark.parametrize(
    ("value", "dtype", "fits"),
    [
        (65504.0, torch.float16, True),
        (65519.0, torch.float16, True),  # rounds to 65504
        (65520.0, torch.float16, False),
        (-1e5, torch.float16, False),
        (1e5, torch.bfloat16, True),
        (1e5, torch.float32, True),
        (3.4e38, torch.bfloat16, False),
        (torch.inf, torch.float16, True),  # it has not become infinite by the conversion
    ],
)
def test_weights_must_fit_into_the_precision(value, dtype, fits):
    module = nn.Linear(2, 2)
    with torch.no_grad():
        module.weight[1, 0] = value
    if fits:
        return check_range(module, dtype)
    with pytest.raises(UserError, match=r'the weight "weight" has a value of .*, too large for .*; use the precision'):
        check_range(module, dtype)
