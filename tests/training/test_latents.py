"""Latents computed once."""

from __future__ import annotations

import pytest
import torch
from tiny_models import randomise, text_config

from ldm.models.diffusion.ddpm import LATENT_KEY
from ldm.training.data import DataModuleFromConfig
from ldm.training.latents import cache_latents
from ldm.util import UserError, instantiate_from_config

NAMES = ["rocket", "fox"]


def module(path=None, variants=1, target="EmojiValidation", **params):
    config = {"target": f"ldm.data.emoji.{target}", "params": {"size": 16, "names": NAMES, **params}}
    cache = {"variants": variants, "path": path}
    return DataModuleFromConfig(batch_size=3, train=config, num_workers=0, latent_cache=cache)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return randomise(instantiate_from_config(text_config()))


def test_moments_are_those_of_the_pictures(model):
    data = module(split="seen")
    data.setup()
    pictures = data.datasets["train"]
    cache_latents(data, model)
    cached = data.datasets["train"]
    assert len(cached) == len(pictures) == 14
    for i in (0, 13):
        image = torch.as_tensor(pictures[i]["image"])[None].movedim(-1, 1)
        moments = model.first_stage_model.encode(image).parameters[0]
        assert torch.allclose(cached[i][LATENT_KEY], moments, atol=2e-3, rtol=2e-3)
        assert cached[i]["caption"] == pictures[i]["caption"]
        assert cached[i]["class_label"] == pictures[i]["class_label"]
        assert "image" not in cached[i]
        assert "mask" not in cached[i]


def test_variants_are_augmented_anew(model):
    data = module(variants=2, target="EmojiTrain")
    cache_latents(data, model)
    cached = data.datasets["train"]
    assert len(cached) == 28
    assert not torch.equal(cached[0][LATENT_KEY], cached[14][LATENT_KEY])
    assert cached[0]["class_label"] == cached[14]["class_label"]


def test_a_file_is_used_again_until_the_first_stage_or_the_data_change(model, tmp_path):
    path = str(tmp_path / "latents.pt")

    def first_moments(**params):
        data = module(path, target="EmojiTrain", **params)
        cache_latents(data, model)
        return data.datasets["train"][0][LATENT_KEY]

    kept = first_moments()
    assert torch.equal(first_moments(), kept)  # random augmentation: only a stored result can be equal
    assert not torch.equal(first_moments(scale=[0.5, 0.5]), kept)
    kept = first_moments()
    with torch.no_grad():
        model.first_stage_model.quant_conv.weight *= 2
    assert not torch.allclose(first_moments(), kept)


def test_a_full_disk_is_told(model, tmp_path, monkeypatch):
    def fail(content, path):
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(UserError, match=r"cannot write .*latents\.pt.*file write failed"):
        cache_latents(module(str(tmp_path / "latents.pt")), model)


def test_only_a_gaussian_first_stage_has_moments(model):
    model.first_stage_model = torch.nn.Identity()
    with pytest.raises(UserError, match="AutoencoderKL"):
        cache_latents(module(), model)
