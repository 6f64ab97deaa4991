"""Tests of `ldm.pipelines.embeddings`: files of textual inversions added to a model."""

from __future__ import annotations

import logging
import re

import pytest
import torch
from tiny_models import make_model, text_config, write_model
from tiny_stable_diffusion import v1_config, v2_config

import ldm
from ldm.errors import UserError
from ldm.pipelines.embeddings import add_embedding


@pytest.mark.parametrize("config", [v1_config, v2_config])
def test_load_adds_embeddings(config, tmp_path, caplog):
    write_model(tmp_path / "m", config(tmp_path))
    vectors = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    torch.save({"<toy>": vectors}, tmp_path / "toy.bin")
    torch.save({"string_to_param": {"*": vectors.flip(1)}}, tmp_path / "gs.pt")
    with caplog.at_level(logging.INFO):
        model = ldm.load(tmp_path / "m", embeddings=[tmp_path / "toy.bin", (tmp_path / "gs.pt", "<b>")])
    assert f'added the embedding "{tmp_path / "toy.bin"}": "<toy>" (2 vectors)' in caplog.text
    words = model.cond_stage_model.embedding_manager
    assert words.tokens == ["<toy>", "<b>"] and torch.equal(words.table(), torch.cat([vectors, vectors.flip(1)]))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    images = ldm.text_to_image(model, ["a <toy>"], steps=2, seed=1, progress=False)
    others = ldm.text_to_image(model, ["a <b>"], steps=2, seed=1, progress=False)
    assert images[0].tobytes() != others[0].tobytes()
    half = ldm.load(tmp_path / "m", embeddings=[tmp_path / "toy.bin"], precision="bfloat16")
    assert half.cond_stage_model.embedding_manager.table().dtype == torch.bfloat16


def test_a_refused_file_leaves_the_model_unchanged(tmp_path):
    model = make_model(v1_config(tmp_path))
    torch.save({"string_to_param": {"<a>": torch.zeros(1, 16), "<b>": torch.zeros(1, 20)}}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="belongs to another model"):
        add_embedding(model, tmp_path / "x.pt")
    assert model.cond_stage_model.embedding_manager is None
    with pytest.raises(UserError, match=re.escape('has 2 tokens; leave out the token "<c>"')):
        add_embedding(model, tmp_path / "x.pt", "<c>")


def test_a_model_with_another_text_encoder_raises_user_error(tmp_path):
    torch.save({"<a>": torch.zeros(1, 32)}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="needs a model with a text encoder of Stable Diffusion; leave it out"):
        add_embedding(make_model(text_config()), tmp_path / "x.pt")
