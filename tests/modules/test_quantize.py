"""Tests of the vector quantizer: nearest entries, gradients, losses and remapped indices."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ldm.errors import UserError
from ldm.modules import quantize
from ldm.modules.quantize import VectorQuantizer2


@pytest.fixture
def quantizer(seed) -> VectorQuantizer2:
    quantizer = VectorQuantizer2(20, 4, beta=0.25)
    torch.nn.init.normal_(quantizer.embedding.weight)
    return quantizer


@pytest.fixture
def z(seed) -> torch.Tensor:
    return torch.randn(2, 4, 3, 5)


def brute_force_nearest(quantizer: VectorQuantizer2, z: torch.Tensor) -> torch.Tensor:
    rows = z.permute(0, 2, 3, 1).reshape(-1, 1, z.shape[1])
    return (rows - quantizer.embedding.weight).square().sum(-1).argmin(-1)


def test_every_position_is_replaced_by_its_nearest_entry(quantizer, z):
    z_q, _, (perplexity, encodings, indices) = quantizer(z)
    assert perplexity is None
    assert encodings is None
    assert indices.tolist() == brute_force_nearest(quantizer, z).tolist()
    entries = quantizer.embedding(indices).view(2, 3, 5, 4).permute(0, 3, 1, 2)
    torch.testing.assert_close(z_q, entries)


def test_chunk_size_does_not_change_the_indices(quantizer, z, monkeypatch):
    expected = quantizer(z)[2][2]
    monkeypatch.setattr(quantize, "MAX_DISTANCES", 45)  # two positions per chunk
    assert quantizer(z)[2][2].tolist() == expected.tolist()


def test_entries_are_initialised_within_one_over_n():
    weight = VectorQuantizer2(50, 3, beta=0.25).embedding.weight
    assert weight.abs().max() <= 1 / 50
    assert weight.abs().max() > 0.9 / 50


@pytest.mark.parametrize("legacy", [True, False])
def test_loss_and_gradients(quantizer, z, legacy):
    quantizer.legacy = legacy
    quantizer.beta = 0.1
    z.requires_grad_()
    _, loss, (_, _, indices) = quantizer(z)
    entries = quantizer.embedding.weight[indices].view(2, 3, 5, 4).permute(0, 3, 1, 2).detach()
    torch.testing.assert_close(loss, 1.1 * (entries - z).square().mean())

    loss.backward()
    on_encoder, on_codebook = (1.0, 0.1) if legacy else (0.1, 1.0)
    pull = 2 * (z.detach() - entries) / z.numel()
    torch.testing.assert_close(z.grad, on_encoder * pull)
    expected = torch.zeros_like(quantizer.embedding.weight)
    expected.index_add_(0, indices, -on_codebook * pull.permute(0, 2, 3, 1).reshape(-1, 4))
    torch.testing.assert_close(quantizer.embedding.weight.grad, expected)


def test_gradient_is_straight_through(quantizer, z):
    z.requires_grad_()
    upstream = torch.randn_like(z)
    (quantizer(z)[0] * upstream).sum().backward()
    torch.testing.assert_close(z.grad, upstream)
    assert quantizer.embedding.weight.grad is None


def test_index_shapes(quantizer, z):
    assert quantizer(z)[2][2].shape == (30,)
    quantizer.sane_index_shape = True
    assert quantizer(z)[2][2].shape == (2, 3, 5)


def test_codebook_entries(quantizer, z):
    z_q, _, (_, _, indices) = quantizer(z)
    torch.testing.assert_close(quantizer.get_codebook_entry(indices, shape=(2, 3, 5, 4)), z_q)
    assert quantizer.get_codebook_entry(indices).shape == (30, 4)


def test_memory_format_is_preserved(quantizer, z):
    assert quantizer(z)[0].is_contiguous()
    assert quantizer(z.to(memory_format=torch.channels_last))[0].is_contiguous(memory_format=torch.channels_last)


def test_autocast_selects_the_same_entries(seed):
    quantizer = VectorQuantizer2(512, 3, beta=0.25)
    torch.nn.init.normal_(quantizer.embedding.weight)
    z = torch.randn(1, 3, 16, 16)
    expected = quantizer(z)[2][2]
    with torch.autocast("cpu", torch.bfloat16):
        assert quantizer(z)[2][2].tolist() == expected.tolist()


def test_bfloat16_outputs_are_bfloat16(quantizer, z):
    z_q, loss, _ = quantizer.to(torch.bfloat16)(z.to(torch.bfloat16))
    assert z_q.dtype is loss.dtype is torch.bfloat16


def test_temperature_and_logits_raise_value_error(quantizer, z):
    quantizer(z, temp=1.0)
    for option in ({"temp": 0.5}, {"rescale_logits": True}, {"return_logits": True}):
        with pytest.raises(ValueError, match="temperature"):
            quantizer(z, **option)


@pytest.fixture
def used(tmp_path) -> str:
    path = tmp_path / "used.npy"
    np.save(path, np.array([3, 7, 1]))
    return str(path)


def test_remap_to_used_and_back(used):
    quantizer = VectorQuantizer2(10, 2, beta=0.25, remap=used, unknown_index="extra")
    assert quantizer.re_embed == 4
    indices = torch.tensor([[1, 3], [7, 5]])
    positions = quantizer.remap_to_used(indices)
    assert positions.tolist() == [[2, 0], [1, 3]]
    assert quantizer.unmap_to_all(positions).tolist() == [[1, 3], [7, 3]]


def test_remap_of_unknown_indices_to_a_number(used):
    quantizer = VectorQuantizer2(10, 2, beta=0.25, remap=used, unknown_index=1)
    assert quantizer.re_embed == 3
    assert quantizer.remap_to_used(torch.tensor([0, 1, 9])).tolist() == [1, 2, 1]


def test_random_remap_of_unknown_indices_is_seeded(used):
    quantizer = VectorQuantizer2(10, 2, beta=0.25, remap=used)
    indices = torch.tensor([0] * 50 + [7])
    torch.manual_seed(3)
    positions = quantizer.remap_to_used(indices)
    torch.manual_seed(3)
    assert positions.tolist() == [*torch.randint(0, 3, (50,)).tolist(), 1]


def test_forward_returns_remapped_indices(used, seed):
    quantizer = VectorQuantizer2(10, 2, beta=0.25, remap=used, unknown_index="extra", sane_index_shape=True)
    torch.nn.init.normal_(quantizer.embedding.weight)
    z = quantizer.embedding.weight[[1, 3, 7, 7]].detach().view(1, 2, 2, 2).permute(0, 3, 1, 2)
    z_q, _, (_, _, indices) = quantizer(z)
    assert indices.tolist() == [[[2, 0], [1, 1]]]
    torch.testing.assert_close(quantizer.get_codebook_entry(indices, shape=(1, 2, 2, 2)), z_q)


@pytest.mark.parametrize("content", [[], [10], [-1], [2, 2]])
def test_invalid_remap_indices_raise_user_error(tmp_path, content):
    np.save(tmp_path / "used.npy", np.array(content, dtype=np.int64))
    with pytest.raises(UserError, match=r"used.npy.*between 0 and 9"):
        VectorQuantizer2(10, 2, beta=0.25, remap=tmp_path / "used.npy")


def test_remap_rejects_pickles_and_names_the_file(tmp_path):
    np.save(tmp_path / "used.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match=r"used.npy"):
        VectorQuantizer2(10, 2, beta=0.25, remap=tmp_path / "used.npy")
    with pytest.raises(UserError, match=r"absent.npy"):
        VectorQuantizer2(10, 2, beta=0.25, remap=tmp_path / "absent.npy")


def test_unknown_remap_rule_raises_user_error(used):
    with pytest.raises(UserError, match="unknown_index"):
        VectorQuantizer2(10, 2, beta=0.25, remap=used, unknown_index="first")


def test_taming_names_are_the_same_class():
    from taming.modules.vqvae.quantize import VectorQuantizer
    from taming.modules.vqvae.quantize import VectorQuantizer2 as ReExported

    assert VectorQuantizer is ReExported is VectorQuantizer2
