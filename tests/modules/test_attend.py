"""Tests of `attend` against the formula of softmax attention."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from ldm.modules import attend as attend_module
from ldm.modules.attend import SMALL, attend


def tensors(n: int, m: int, dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    """Return q, k and v with gradients."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, 3, n, 16), (2, 3, m, 16), (2, 3, m, 16))
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Evaluate the formula in float64."""
    q, k, v = (each.double() for each in (q, k, v))
    return torch.einsum("bhnm,bhmd->bhnd", (torch.einsum("bhnd,bhmd->bhnm", q, k) / 4).softmax(-1), v)


@pytest.mark.parametrize(("n", "m"), [(16, 16), (64, 8), (80, 80)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_results_and_gradients_match_the_formula(n, m, dtype, tolerance):
    inputs = tensors(n, m, dtype)
    exact_inputs = [each.detach().double().requires_grad_() for each in inputs]
    weight = torch.randn(2, 3, n, 16, generator=torch.Generator().manual_seed(1))
    out, expected = attend(*inputs), exact(*exact_inputs)
    assert out.dtype == dtype
    assert torch.allclose(out.double(), expected, atol=tolerance)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    for a, b in zip(inputs, exact_inputs, strict=True):
        assert (a.grad.double() - b.grad).norm() < tolerance * b.grad.norm()


@pytest.mark.parametrize(
    ("tokens", "dtype", "grad", "options", "explicit"),
    [
        (64, torch.bfloat16, True, {}, True),
        (64, torch.bfloat16, False, {}, False),
        (64, torch.float32, True, {}, False),
        (int(SMALL**0.5) + 1, torch.bfloat16, True, {}, False),
        (64, torch.bfloat16, True, {"is_causal": True}, False),
        (64, torch.bfloat16, True, {"dropout_p": 0.5}, False),
    ],
)
def test_only_small_maps_in_bfloat16_training_use_the_explicit_formula(
    monkeypatch, tokens, dtype, grad, options, explicit
):
    calls = []

    def record(*args, **kwargs):
        calls.append(kwargs)
        return scaled_dot_product_attention(*args, **kwargs)

    monkeypatch.setattr(attend_module, "scaled_dot_product_attention", record)
    q, k, v = tensors(tokens, tokens, dtype)
    with torch.set_grad_enabled(grad):
        attend(q, k, v, **options)
    assert len(calls) == (0 if explicit else 1)


def test_masked_keys_are_ignored_in_training():
    q, k, v = tensors(4, 4, torch.bfloat16)
    mask = torch.tensor([True, True, False, False])[None, None, None]
    expected = attend(q, k[:, :, :2], v[:, :, :2])
    assert torch.allclose(attend(q, k, v, attn_mask=mask).float(), expected.float(), atol=2e-2)


def test_large_products_are_computed_in_float32():
    """Check the error for large products; products in bfloat16 would have several times this error."""
    q, k, v = ((4 * each).detach().requires_grad_() for each in tensors(64, 64, torch.bfloat16))
    assert (attend(q, k, v).double() - exact(q, k, v)).abs().mean() < 6e-3


# -- large maps ------------------------------------------------------------------------------------------------


def large_tensors(spread: float = 1.0, n: int = 2100, m: int = 2300, width: int = 24) -> list[torch.Tensor]:
    """Return q, k and v in bfloat16; the scores of a query have this standard deviation, around a value of its own."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, count, 16, generator=generator) * spread**0.5 for count in (n, m))
    common = torch.randn(1, 2, 1, 16, generator=generator)
    return [each.bfloat16() for each in (q, k + 3 * common, torch.randn(1, 2, m, width, generator=generator))]


def error(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("spread", [0.5, 2.0, 6.0, 20.0])
@torch.no_grad()
def test_large_maps_are_exact_to_a_rounding_step(monkeypatch, spread):
    """A step of bfloat16 is 2⁻⁸ of a value."""
    monkeypatch.setattr(attend_module, "scaled_dot_product_attention", None)
    q, k, v = large_tensors(spread)
    result, expected = attend(q, k, v), exact(q, k, v)
    assert result.dtype == torch.bfloat16 and result.shape == expected.shape
    assert error(result, expected) < 1.25 * 2**-8


@torch.no_grad()
def test_items_of_large_maps_do_not_depend_on_their_batch():
    q, k, v = (torch.cat([each, each.flip(-2)]) for each in large_tensors())
    together = attend(q, k, v)
    assert torch.equal(together[1:], attend(q[1:], k[1:], v[1:]))
    assert torch.equal(together[:, 1:], attend(q[:, 1:], k[:, 1:], v[:, 1:]))


@torch.no_grad()
def test_scores_far_above_their_estimate_are_exact(monkeypatch):
    """Keys that no estimate sees have scores of hundreds; the values of both are averaged."""
    monkeypatch.setattr(attend_module, "scaled_dot_product_attention", None)
    q, k, v = large_tensors()
    k[..., [1, 3], :] = 50 * q[:, :, :1].sign()
    result, expected = attend(q, k, v), exact(q, k, v)
    assert error(result[:, :, 0], v[:, :, [1, 3]].double().mean(2)) < 2**-8
    assert error(result, expected) < 1.25 * 2**-8


@pytest.mark.parametrize(
    ("change", "options"),
    [
        (lambda x: x.float(), {}),
        (lambda x: x.half(), {}),
        (lambda x: x[:, :, :2047], {}),
        (lambda x: x.requires_grad_(), {}),
        (lambda x: x, {"is_causal": True}),
    ],
    ids=["float32", "float16", "smaller", "gradients", "causal"],
)
def test_other_large_maps_use_torch(monkeypatch, change, options):
    monkeypatch.setattr(attend_module, "attend_in_rows", None)
    q, k, v = (change(each) for each in large_tensors())
    assert torch.equal(attend(q, k, v, **options), scaled_dot_product_attention(q, k, v, **options))
