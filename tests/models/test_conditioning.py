"""The structure of conditionings."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ldm.errors import UserError
from ldm.models.diffusion import conditioning as c

A, B = torch.zeros(2, 3), torch.ones(2, 3)


class Recorder(nn.Module):
    """Gives back what it is called with."""

    def forward(self, x, t, **kw):
        return x, kw


def wrapper(key):
    return c.DiffusionWrapper({"target": f"{__name__}.Recorder"}, key)


@pytest.fixture(autouse=True)
def recorder(monkeypatch):
    monkeypatch.setattr(c, "instantiate_from_config", lambda config: Recorder())


def test_each_key_hands_the_conditioning_over_in_its_way():
    x, t = torch.randn(2, 1, 4, 4), torch.zeros(2)
    image, words = torch.randn(2, 2, 4, 4), [torch.randn(2, 3, 5), torch.randn(2, 1, 5)]
    assert wrapper(None)(x, t)[1] == {}
    assert torch.equal(wrapper("concat")(x, t, c_concat=[image])[0], torch.cat([x, image], 1))
    assert torch.equal(wrapper("crossattn")(x, t, c_crossattn=words)[1]["context"], torch.cat(words, 1))
    joined, kw = wrapper("hybrid")(x, t, c_concat=[image], c_crossattn=words)
    assert joined.shape[1] == 3
    assert kw["context"].shape == (2, 4, 5)
    assert wrapper("adm")(x, t, c_crossattn=[words[0]])[1]["y"] is words[0]


def test_a_missing_entry_is_named():
    with pytest.raises(ValueError, match='"hybrid" needs the entry "c_crossattn"'):
        wrapper("hybrid")(torch.zeros(1, 1, 2, 2), torch.zeros(1), c_concat=[torch.zeros(1, 1, 2, 2)])


def test_an_unknown_key_is_refused():
    with pytest.raises(UserError, match='did you mean "hybrid"'):
        wrapper("hybird")


@pytest.mark.parametrize(
    ("given", "expected"),
    [(None, {}), (A, {"c_crossattn": [A]}), ([A, B], {"c_crossattn": [A, B]}), ({"c_concat": A}, {"c_concat": [A]})],
)
def test_every_form_becomes_keyword_arguments(given, expected):
    assert c.as_dict(given, "crossattn") == expected
    if given is A:
        assert c.as_dict(given, "concat") == {"c_concat": [A]}


@pytest.mark.parametrize("form", [lambda v: v, lambda v: [v], lambda v: {"c_concat": [v], "c_crossattn": v}])
def test_pairs_and_slices_keep_the_structure(form):
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
def test_a_pair_is_made_once_for_the_same_tensors(form):
    """Also when the structure around them is made anew, as some callers do at every step."""
    pairing, a, b = c.Pairing(), A.clone(), B.clone()
    first = pairing(form(a), form(b))
    assert pairing(form(a), form(b)) is first
    assert list(map(torch.Tensor.tolist, c.tensors(first))) == list(
        map(torch.Tensor.tolist, c.tensors(c.pair(form(A), form(B))))
    )
    assert pairing(form(a), form(B.clone())) is not first


def test_a_pair_of_changed_tensors_is_made_anew():
    pairing, a, b = c.Pairing(), A.clone(), B.clone()
    pairing(a, b)
    b.add_(1)
    assert torch.equal(pairing(a, b), torch.cat([A, B + 1]))
