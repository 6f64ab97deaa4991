"""Tests of `ldm.pipelines.retrieval` with a tiny CLIP and a small database."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from retrieval_files import neighbours_by_argsort, unit, vectors, write_database
from tiny_models import make_model, retrieval_config, text_config, write_clip

import ldm
from ldm.config.model_info import ModelInfo
from ldm.errors import UserError
from ldm.pipelines import sampling
from ldm.pipelines.retrieval import RetrievalToImage, context_width

ROWS = vectors(40, 10)
OPTIONS = {"steps": 2, "seed": 1, "progress": False, "output_type": "numpy"}


@pytest.fixture(scope="module")
def model():
    return make_model(retrieval_config())


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("retrieval")
    write_clip(folder / "clip")
    write_clip(folder / "narrow", width=6)
    write_database(folder / "database", ROWS)
    return folder


@pytest.fixture
def conditionings(monkeypatch):
    """Return a list that collects the conditional and the unconditional conditioning of each batch."""
    seen, sample = [], sampling.sample_latents

    def spy(model, shape, **options):
        seen.append((options["cond"], options["uncond"]))
        return sample(model, shape, **options)

    monkeypatch.setattr(sampling, "sample_latents", spy)
    return seen


def sample(model, files, prompts, **options):
    options = {"clip_type": str(files / "clip"), **OPTIONS, **options}
    return ldm.retrieval_to_image(model, prompts, **options)


def test_context_is_the_prompt_and_its_neighbours(model, files, conditionings):
    sample(model, files, ["cat", "cat", "dog"], database=str(files / "database"), knn=4)
    ((cond, uncond),) = conditionings
    assert cond.shape == uncond.shape == (3, 5, 10) and not uncond.any()
    assert torch.equal(cond[0], cond[1]) and not torch.equal(cond[0], cond[2])
    indices, _ = neighbours_by_argsort(ROWS, cond[0, :1].numpy(), 4)
    assert np.allclose(cond[0, 1:].numpy(), unit(ROWS[indices[0]].astype(float)), atol=1e-6)


def test_context_without_a_database_is_the_prompt(model, files, conditionings):
    sample(model, files, "cat", scale=1)
    ((cond, uncond),) = conditionings
    assert cond.shape == (1, 1, 10) and uncond is None


def test_cut_prompts_are_one_line_each(model, files, caplog):
    long = "cat " * 75 + "Cat a"
    sample(model, files, [long, "cat", long])
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.endswith('79 tokens (start and end token included), and the model reads 77; cut: "… Cat a"')


def test_neighbours_change_the_image(model, files):
    alone, near, fewer = (
        sample(model, files, "cat", **options)[0]
        for options in ({}, {"database": str(files / "database")}, {"database": str(files / "database"), "knn": 1})
    )
    assert (alone != near).any() and (near != fewer).any()


def test_sizes(model, files):
    assert sample(model, files, "cat", height=24, width=8)[0].shape == (24, 8, 3)
    with pytest.raises(UserError, match="height 18 is not a multiple of 4, as this model needs; nearest: 16 or 20"):
        sample(model, files, "cat", height=18)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip_type": "none/at/all"}, 'there is no CLIP "none/at/all"'),
        ({"clip_type": "{files}/narrow"}, "has embeddings of width 6, and the model needs 10"),
        ({"database": "{files}/none"}, "there is no database"),
    ],
)
def test_missing_or_unsuitable_files_raise_user_error(model, files, options, message):
    options = {name: value.replace("{files}", str(files)) for name, value in options.items()}
    with pytest.raises(UserError, match=message) as raised:
        sample(model, files, "cat", **options)
    assert "\n" not in str(raised.value)


def test_width_is_that_of_the_network():
    assert context_width(ModelInfo("m", retrieval_config(12))) == 12
    with pytest.raises(
        UserError, match='the model "m" is not conditioned on CLIP embeddings; choose a retrieval-augmented'
    ):
        context_width(ModelInfo("m", text_config()))


def test_settings_without_a_database_have_no_neighbours():
    assert not {"database", "knn"} & RetrievalToImage().settings().keys()
    with_database = RetrievalToImage(database="d", knn=3)
    assert with_database.settings()["knn"] == 3
    for pipeline in (with_database, RetrievalToImage()):
        assert RetrievalToImage.from_settings(pipeline.settings()) == pipeline
