"""Cache of latents."""

from __future__ import annotations

import pytest
import torch
from tiny_models import inpainting_config, randomise, superresolution_config, text_config

from ldm.config.instantiate import instantiate_from_config
from ldm.errors import UserError
from ldm.models.diffusion.ddpm import LATENT_KEY
from ldm.training.data import DataModuleFromConfig
from ldm.training.latents import cache_latents

NAMES = ["rocket", "fox"]


def module(path=None, variants=1, target="EmojiValidation", **params):
    config = {"target": f"ldm.data.emoji.{target}", "params": {"size": 16, "names": NAMES, **params}}
    cache = {"variants": variants, "path": path}
    return DataModuleFromConfig(batch_size=3, train=config, num_workers=0, latent_cache=cache)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return randomise(instantiate_from_config(text_config()))


def test_cached_moments_match_encoded_images(model):
    data = module(split="seen")
    data.setup()
    images = data.datasets["train"]
    cache_latents(data, model)
    cached = data.datasets["train"]
    assert len(cached) == len(images) == 14
    for i in (0, 13):
        image = torch.as_tensor(images[i]["image"])[None].movedim(-1, 1)
        moments = model.first_stage_model.encode(image).parameters[0]
        assert torch.allclose(cached[i][LATENT_KEY], moments, atol=2e-3, rtol=2e-3)
        assert cached[i]["caption"] == images[i]["caption"]
        assert cached[i]["class_label"] == images[i]["class_label"]
        assert "image" not in cached[i]
        assert "mask" not in cached[i]


def test_variants_have_different_augmentation(model):
    data = module(variants=2, target="EmojiTrain")
    cache_latents(data, model)
    cached = data.datasets["train"]
    assert len(cached) == 28
    assert not torch.equal(cached[0][LATENT_KEY], cached[14][LATENT_KEY])
    assert cached[0]["class_label"] == cached[14]["class_label"]


def test_file_is_reused_until_first_stage_or_data_change(model, tmp_path):
    path = str(tmp_path / "latents.pt")

    def first_moments(**params):
        data = module(path, target="EmojiTrain", **params)
        cache_latents(data, model)
        return data.datasets["train"][0][LATENT_KEY]

    stored = first_moments()
    assert torch.equal(first_moments(), stored)  # with random augmentation only a stored result is equal
    assert not torch.equal(first_moments(scale=[0.5, 0.5]), stored)
    stored = first_moments()
    with torch.no_grad():
        model.first_stage_model.quant_conv.weight *= 2
    assert not torch.allclose(first_moments(), stored)


def test_full_disk_raises_user_error(model, tmp_path, monkeypatch):
    def fail(content, path):
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(UserError, match=r"cannot write .*latents\.pt.*file write failed"):
        cache_latents(module(str(tmp_path / "latents.pt")), model)


def test_first_stage_without_moments_raises_user_error(model):
    model.first_stage_model = torch.nn.Identity()
    with pytest.raises(UserError, match="AutoencoderKL"):
        cache_latents(module(), model)


class Layouts(torch.utils.data.Dataset):
    """Data set of images with a row of tokens and a map each, without text."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        image = torch.rand(16, 16, 3, generator=generator)
        return {"image": image, "coordinates_bbox": torch.arange(5) + index, "segmentation": image[..., 0]}


@pytest.fixture
def layouts(monkeypatch):
    """Return a function that builds a data module of `Layouts`."""

    def build(path=None):
        data = module(path)
        monkeypatch.setattr(data, "setup", lambda: data.datasets.update(train=Layouts()))
        return data

    return build


def test_rows_of_integers_are_cached(model, layouts, tmp_path):
    """They are cached in memory and in a file; a file of an older version without them is computed again."""
    model.cond_stage_key = "coordinates_bbox"
    path = tmp_path / "latents.pt"
    for _ in range(2):
        data = layouts(str(path))
        cache_latents(data, model)
        batch = next(iter(torch.utils.data.DataLoader(data.datasets["train"], batch_size=4)))
        assert batch.keys() == {"coordinates_bbox", LATENT_KEY}
        assert torch.equal(batch["coordinates_bbox"], torch.arange(5) + torch.arange(4)[:, None])
    torch.save({**torch.load(path, weights_only=True), "fields": {}}, path)
    data = layouts(str(path))
    cache_latents(data, model)
    assert torch.equal(data.datasets["train"][3]["coordinates_bbox"], torch.arange(5) + 3)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("segmentation", 'latent_cache cannot contain "segmentation", the model\'s cond_stage_key'),
        ("image", 'latent_cache cannot contain "image"'),
        ("caption", 'the dataset returns no "caption"'),
    ],
)
def test_uncached_conditioning_raises_user_error_before_encoding(key, message, model, layouts):
    model.cond_stage_key = key
    model.first_stage_model.encode = None
    with pytest.raises(UserError, match=message):
        cache_latents(layouts(), model)
    model.model.conditioning_key = None
    with pytest.raises(TypeError, match="not callable"):
        cache_latents(layouts(), model)


@pytest.mark.parametrize(
    ("config", "wrapper", "params"),
    [
        (inpainting_config(), "inpainting.MaskedPictures", {"fixed": True}),
        (superresolution_config(), "superresolution.SmallerPictures", {"downscale_f": 2}),
    ],
    ids=["inpainting", "superresolution"],
)
def test_image_conditioning_is_cached(config, wrapper, params, tmp_path):
    """A cached batch has the same conditioning as its images; the file is reused by the same model only."""
    model = randomise(instantiate_from_config(config))
    source = {"target": "ldm.data.emoji.EmojiValidation", "params": {"size": 16, "names": NAMES, "split": "seen"}}
    train = {"target": f"ldm.data.{wrapper}", "params": {"dataset": source, **params}}

    def cached(model):
        cache = {"path": str(tmp_path / "latents.pt")}
        data = DataModuleFromConfig(batch_size=3, train=train, num_workers=0, latent_cache=cache)
        cache_latents(data, model)
        return torch.utils.data.default_collate([data.datasets["train"][i] for i in (0, 5)])

    dataset = instantiate_from_config(train)
    batch = torch.utils.data.default_collate([dataset[i] for i in (0, 5)])
    expected = model.get_input(batch, "image")[1]
    for _ in range(2):
        conditioning = model.get_input(cached(model), "image")[1]
        torch.testing.assert_close(conditioning, expected, rtol=2e-3, atol=2e-3)
    assert "image" not in cached(model) and model.shared_step(cached(model))[0].isfinite()
    assert model.log_images(cached(model), N=2, ddim_steps=1, plot_progressive_rows=False)["samples"].isfinite().all()
    model.cond_dropout = 0.1
    (tmp_path / "latents.pt").unlink()
    with pytest.raises(UserError, match=r"latent_cache cannot contain .*cond_dropout"):
        cached(model)
