"""Cache of latents."""

from __future__ import annotations

import logging

import pytest
import torch
from images_on_disk import write
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


@pytest.mark.parametrize("variants", [1, 2])
def test_previews_show_the_original_images(model, variants):
    """They are read from the data set, for a shuffled batch and each variant; other batches stay as they are."""
    data = module(variants=variants, split="seen")
    data.setup()
    images = data.datasets["train"]
    cache_latents(data, model)
    cached = data.datasets["train"]
    chosen = [13, 2, len(cached) - 1]
    batch = torch.utils.data.default_collate([cached[index] for index in chosen])
    log = model.log_images(cached.with_images(batch, "image"), ddim_steps=2, split="train")
    expected = torch.stack([torch.as_tensor(images[index % 14]["image"]).movedim(-1, 0) for index in chosen])
    assert torch.equal(log["inputs"], expected)
    assert not torch.equal(log["inputs"], log["reconstruction"])
    other = {**batch, LATENT_KEY: batch[LATENT_KEY] + 1}
    assert cached.with_images(other, "image") is other


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


class Faces:
    """Data module of the images in a folder, with their names."""

    def __new__(cls, folder, path):
        train = {"target": "ldm.data.faceshq.FacesBase", "params": {"size": 16, "data_root": str(folder)}}
        return DataModuleFromConfig(batch_size=2, train=train, num_workers=0, latent_cache={"path": str(path)})


def cached_faces(folder, path, model):
    data = Faces(folder, path)
    cache_latents(data, model)
    cached = data.datasets["train"]
    return cached.fields["relative_file_path_"], cached.moments


def test_replaced_renamed_and_added_images_are_encoded_again(model, tmp_path, caplog):
    folder, path = tmp_path / "images", tmp_path / "latents.pt"
    caplog.set_level(logging.INFO, "ldm")
    for seed, name in enumerate(("a.png", "b.png")):
        write(folder / name, seed=seed)
    model.model.conditioning_key = None
    names, moments = cached_faces(folder, path, model)
    assert names == ["a.png", "b.png"]
    assert torch.equal(cached_faces(folder, path, model)[1], moments)
    assert caplog.records[-1].getMessage() == f"using the latents in {path}"

    write(folder / "b.png", seed=7)
    _, replaced = cached_faces(folder, path, model)
    assert torch.equal(replaced[0], moments[0]) and not torch.allclose(replaced[1], moments[1])
    message = f"computing latents again: those in {path} are of another state (data)"
    assert message in [record.getMessage() for record in caplog.records]

    (folder / "a.png").rename(folder / "c.png")
    names, renamed = cached_faces(folder, path, model)
    assert names == ["b.png", "c.png"] and torch.equal(renamed, replaced.flip(0))
    write(folder / "d.png", seed=3)
    names, _ = cached_faces(folder, path, model)
    assert names == ["b.png", "c.png", "d.png"]


def test_log_names_what_has_changed(model, tmp_path, caplog):
    caplog.set_level(logging.INFO, "ldm")
    path = str(tmp_path / "latents.pt")
    cache_latents(module(path), model)
    cache_latents(module(path, variants=2), model)
    assert f"those in {path} are of another state (settings)" in caplog.text
    with torch.no_grad():
        model.first_stage_model.quant_conv.weight *= 2
    cache_latents(module(path, variants=2), model)
    assert f"those in {path} are of another state (first stage)" in caplog.text


@pytest.mark.parametrize("content", [b"not a checkpoint", None], ids=["text", "checkpoint"])
def test_another_file_is_not_replaced(content, model, tmp_path):
    path = tmp_path / "model.ckpt"
    if content is None:
        torch.save({"state_dict": {"weight": torch.zeros(1)}}, path)
    else:
        path.write_bytes(content)
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"is not a cache of latents; name another file|model\.ckpt"):
        cache_latents(module(str(path)), model)
    assert path.read_bytes() == before


def test_unsuitable_path_is_found_before_encoding(model, tmp_path):
    (tmp_path / "file").touch()
    model.first_stage_model.encode = None
    with pytest.raises(UserError, match=r"data\.params\.latent_cache\.path .*is a file"):
        cache_latents(module(str(tmp_path / "file" / "latents.pt")), model)


def test_unsuitable_images_raise_user_error(model, monkeypatch):
    data = module()
    monkeypatch.setattr(data, "setup", lambda: data.datasets.update(train=[{"image": torch.zeros(16, 16, 3).byte()}]))
    with pytest.raises(UserError, match=r'data\.params\.train: "image" is a tensor .* of uint8'):
        cache_latents(data, model)


def test_latents_that_are_not_finite_raise_user_error(model, monkeypatch):
    items = [{"image": torch.zeros(16, 16, 3), "caption": "a", "file_path_": f"{name}.png"} for name in "abc"]
    items[1]["image"] = torch.full((16, 16, 3), float("nan"))
    data = module()
    monkeypatch.setattr(data, "setup", lambda: data.datasets.update(train=items))
    with pytest.raises(UserError, match=r'data\.params\.train: the latents of "b\.png" in a batch are not finite'):
        cache_latents(data, model)


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
        ("caption", 'data.params.train returns no "caption"'),
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
