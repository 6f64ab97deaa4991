"""Tests of the structure of conditionings."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ldm.errors import UserError
from ldm.models.diffusion import conditioning as c

A, B = torch.zeros(2, 3), torch.ones(2, 3)


class Recorder(nn.Module):
    """Network that returns its arguments."""

    def forward(self, x, t, **kw):
        return x, kw


def wrapper(key):
    return c.DiffusionWrapper({"target": f"{__name__}.Recorder"}, key)


@pytest.fixture(autouse=True)
def recorder(monkeypatch):
    monkeypatch.setattr(c, "instantiate_from_config", lambda config: Recorder())


def test_wrapper_passes_conditioning_for_each_key():
    x, t = torch.randn(2, 1, 4, 4), torch.zeros(2)
    image, words = torch.randn(2, 2, 4, 4), [torch.randn(2, 3, 5), torch.randn(2, 1, 5)]
    assert wrapper(None)(x, t)[1] == {}
    assert torch.equal(wrapper("concat")(x, t, c_concat=[image])[0], torch.cat([x, image], 1))
    assert torch.equal(wrapper("crossattn")(x, t, c_crossattn=words)[1]["context"], torch.cat(words, 1))
    joined, kw = wrapper("hybrid")(x, t, c_concat=[image], c_crossattn=words)
    assert joined.shape[1] == 3
    assert kw["context"].shape == (2, 4, 5)
    assert wrapper("adm")(x, t, c_crossattn=[words[0]])[1]["y"] is words[0]


def test_missing_conditioning_raises_value_error():
    with pytest.raises(ValueError, match='"hybrid" needs the entry "c_crossattn"'):
        wrapper("hybrid")(torch.zeros(1, 1, 2, 2), torch.zeros(1), c_concat=[torch.zeros(1, 1, 2, 2)])


def test_unknown_conditioning_key_raises_user_error():
    with pytest.raises(UserError, match='did you mean "hybrid"'):
        wrapper("hybird")


@pytest.mark.parametrize(
    ("cond", "expected"),
    [(None, {}), (A, {"c_crossattn": [A]}), ([A, B], {"c_crossattn": [A, B]}), ({"c_concat": A}, {"c_concat": [A]})],
)
def test_as_dict_converts_every_form(cond, expected):
    assert c.as_dict(cond, "crossattn") == expected
    if cond is A:
        assert c.as_dict(cond, "concat") == {"c_concat": [A]}


@pytest.mark.parametrize("form", [lambda v: v, lambda v: [v], lambda v: {"c_concat": [v], "c_crossattn": v}])
def test_pair_and_slice_batch_keep_the_structure(form):
    def first(cond):
        while not isinstance(cond, torch.Tensor):
            cond = next(iter(cond.values())) if isinstance(cond, dict) else cond[0]
        return cond

    assert torch.equal(first(c.pair(form(A), form(B))), torch.cat([A, B]))
    assert first(c.slice_batch(form(B), 1)).shape == (1, 3)
    assert c.batch_size_of(form(A)) == 2
    assert c.slice_batch(None, 1) is None
    assert c.batch_size_of(None) is None


@pytest.mark.parametrize("form", [lambda v: v, lambda v: [v], lambda v: {"c_concat": [v], "c_crossattn": v}])
def test_pairing_is_cached_for_the_same_tensors(form):
    """The containers of the tensors may be new, as some callers create them at every step."""
    pairing, a, b = c.Pairing(), A.clone(), B.clone()
    first = pairing(form(a), form(b))
    assert pairing(form(a), form(b)) is first
    assert list(map(torch.Tensor.tolist, c.tensors(first))) == list(
        map(torch.Tensor.tolist, c.tensors(c.pair(form(A), form(B))))
    )
    assert pairing(form(a), form(B.clone())) is not first


def test_pairing_is_recomputed_for_modified_tensors():
    pairing, a, b = c.Pairing(), A.clone(), B.clone()
    pairing(a, b)
    b.add_(1)
    assert torch.equal(pairing(a, b), torch.cat([A, B + 1]))
