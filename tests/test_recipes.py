"""Tests of the recipes of the paper's tasks, and of their small twins on emoji scenes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from test_state_dict_keys import recorded, without_files
from torch.utils.data import DataLoader

from ldm.config.assets import locate
from ldm.config.instantiate import get_obj_from_str, instantiate_from_config
from ldm.errors import UserError
from ldm.models.diffusion.batch_keys import LATENT_KEY
from ldm.training.batch_check import BatchCheck

ROOT = Path(__file__).parents[1]
RECIPES = {path.stem: path for path in sorted((ROOT / "configs/recipes").glob("*.yaml"))}
# Published configuration with the same network and stages, and the million trained parameters that the paper states.
PUBLISHED = {
    "unconditional_celebahq": ("configs/latent-diffusion/celebahq-ldm-vq-4.yaml", 274),
    "unconditional_ffhq": ("configs/latent-diffusion/ffhq-ldm-vq-4.yaml", 274),
    "unconditional_lsun_bedrooms": ("configs/latent-diffusion/lsun_bedrooms-ldm-vq-4.yaml", 274),
    "unconditional_lsun_churches": ("configs/latent-diffusion/lsun_churches-ldm-kl-8.yaml", 294),
    "class_imagenet": ("configs/latent-diffusion/cin256-v2.yaml", 400),
    "text_laion": ("configs/latent-diffusion/txt2img-1p4B-eval.yaml", 1450),
    "layout_openimages": ("models/ldm/layout2img-openimages256/config.yaml", 306),
    "layout_coco": (None, None),
    "semantic_landscapes": ("models/ldm/semantic_synthesis256/config.yaml", 215),
    "superres_imagenet": ("models/ldm/bsr_sr/config.yaml", None),
    "superres_openimages_bsr": ("models/ldm/bsr_sr/config.yaml", None),
    "inpainting_places": ("models/ldm/inpainting_big/config.yaml", 387),
    "retrieval_openimages": ("configs/retrieval-augmented-diffusion/768x768.yaml", None),
}
# Items of a step of the optimizer, and the learning rate times a million.
BATCHES = {
    "unconditional_celebahq": (48, 96),
    "unconditional_ffhq": (42, 84),
    "unconditional_lsun_bedrooms": (48, 96),
    "unconditional_lsun_churches": (96, 50),
    "class_imagenet": (1200, 100),
    "text_laion": (680, 100),
    "layout_openimages": (24, 48),
    "layout_coco": (48, 48),
    "semantic_landscapes": (48, 48),
    "superres_imagenet": (64, 64),
    "superres_openimages_bsr": (64, 64),
    "inpainting_places": (16, 16),  # on each of eight devices
    "retrieval_openimages": (56, 100),
}
TWINS = {
    "scenes_unconditional": None,
    "scenes_class": "class_label",
    "txt2img_64": "caption",
    "scenes_layout": "coordinates_bbox",
    "scenes_semantic": "segmentation",
    "scenes_superres": "LR_image",
    "scenes_superres_bsr": "LR_image",
    "scenes_inpaint": "masked_image",
    "drawings_retrieval": "nix",
}
SOURCES = ("paper", "published", "assumption", "this project")


def load(path: Path) -> dict[str, Any]:
    return OmegaConf.to_container(OmegaConf.load(path), resolve=True)


def targets(config: Any) -> Iterator[str]:
    """Yield every target in a configuration, at any depth."""
    for key, value in config.items() if isinstance(config, dict) else enumerate(config):
        if key == "target":
            yield value
        elif isinstance(value, dict | list):
            yield from targets(value)


@pytest.fixture(params=RECIPES)
def recipe(request):
    return load(RECIPES[request.param])


# -- recipes ---------------------------------------------------------------------------------------------------


def test_every_task_has_a_recipe():
    assert {*RECIPES} == {*PUBLISHED} == {*BATCHES}
    tasks = {"unconditional", "class", "text", "layout", "semantic", "superres", "inpainting", "retrieval"}
    assert {name.partition("_")[0] for name in RECIPES} == tasks


@pytest.mark.parametrize("name", RECIPES)
def test_every_value_names_its_source(name):
    """A value has a comment on its line, or lies in a block with a comment at its head."""
    sourced: list[int] = []  # indentation of the open blocks whose head names a source
    for number, line in enumerate(RECIPES[name].read_text(encoding="utf-8").splitlines(), 1):
        text, _, comment = line.partition("  # ")
        if not text.strip() or text.startswith("#"):
            continue
        depth = len(text) - len(text.lstrip())
        sourced = [indentation for indentation in sourced if indentation < depth]
        has_source = comment.startswith(SOURCES)
        is_head = text.rstrip().endswith(":")
        assert has_source or not comment, f"line {number} names no source: {line}"
        assert is_head or has_source or sourced, f"line {number} names no source: {line}"
        if has_source and is_head:
            sourced.append(depth)


def test_every_target_resolves(recipe):
    names = set(targets(recipe))
    assert len(names) >= 6
    for name in names:
        assert callable(get_obj_from_str(name)), name


@pytest.mark.parametrize("name", RECIPES)
def test_models_have_the_published_weight_names(name):
    with torch.device("meta"):
        model = instantiate_from_config(without_files(load(RECIPES[name])["model"]))
    published, millions = PUBLISHED[name]
    if published is not None:
        ours, theirs = (
            {key: list(shape) for key, shape in entries.items() if not key.startswith(("loss.", "model_ema."))}
            for entries in (
                {key: value.shape for key, value in model.state_dict().items()},
                recorded()["models"][published],
            )
        )
        assert ours == theirs
    if millions is not None:
        count = sum(parameter.numel() for parameter in model.optimizer_parameters()) / 1e6
        assert count == pytest.approx(millions, rel=0.005)
    assert model.monitor.startswith("val/")


@pytest.mark.parametrize("name", RECIPES)
def test_learning_rates_are_those_of_the_paper(name):
    config = load(RECIPES[name])
    items = config["data"]["params"]["batch_size"]
    items *= config["lightning"]["trainer"].get("accumulate_grad_batches", 1)
    assert (items, pytest.approx(1e6 * items * config["model"]["base_learning_rate"], rel=1e-3)) == BATCHES[name]
    assert config["lightning"]["trainer"]["max_steps"] >= 1e5


@pytest.mark.parametrize("name", RECIPES)
def test_data_sets_accept_their_parameters_and_name_missing_files(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    data = instantiate_from_config(load(RECIPES[name])["data"])
    assert set(data.dataset_configs) == {"train", "validation"}
    for dataset in data.dataset_configs.values():
        with pytest.raises(UserError, match=r"there (is|are) no (folder|synset|shard)|found no shard") as raised:
            instantiate_from_config(dataset)
        assert "\n" not in str(raised.value)


def test_first_stages_have_the_published_names():
    for path in RECIPES.values():
        for checkpoint in re.findall(r"ckpt_path: (\S+)", path.read_text(encoding="utf-8")):
            assert (ROOT / checkpoint).with_name("config.yaml").is_file(), checkpoint


# -- twins -----------------------------------------------------------------------------------------------------


def parts(name: str) -> tuple[Any, Any]:
    """Return the model and the training set of a twin; the first stage of the text model is that of the bundled one."""
    config = load(ROOT / f"configs/emoji/{name}.yaml")
    stage = config["model"]["params"]["first_stage_config"]["params"]
    stage["ckpt_path"] = str(locate("models/ldm/emoji64/model.safetensors"))
    return instantiate_from_config(config["model"]).train(), instantiate_from_config(config["data"]["params"]["train"])


def test_every_task_has_a_twin():
    found = {path.stem for path in (ROOT / "configs/emoji").glob("*.yaml")}
    assert found >= {*TWINS} and {name for name in found if name.startswith("scenes_")} <= {*TWINS}


@pytest.mark.parametrize("name", TWINS)
def test_the_loss_of_a_twin_falls_in_20_steps(name):
    """Every step sees the same batch, timesteps and noise. The latents are encoded once, as with `latent_cache`."""
    torch.manual_seed(0)
    model, dataset = parts(name)
    assert (model.cond_stage_key if model.model.conditioning_key else None) == TWINS[name]
    batch = next(iter(DataLoader(dataset, batch_size=2)))
    BatchCheck(model)(batch, name)
    with torch.no_grad():
        batch[LATENT_KEY] = model.first_stage_model.encode(batch["image"].movedim(-1, 1)).parameters
    optimizer = torch.optim.AdamW(model.optimizer_parameters(), lr=8e-4)
    model.before_training_batch(batch, is_first=True)
    losses = []
    for _ in range(20):
        torch.manual_seed(1)
        loss, _ = model.shared_step(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5]), losses


@pytest.mark.parametrize("name", TWINS)
def test_the_validation_set_of_a_twin_is_deterministic(name):
    config = load(ROOT / f"configs/emoji/{name}.yaml")["data"]["params"]["validation"]
    first, second = (instantiate_from_config(config)[3] for _ in range(2))
    assert first["caption"] == second["caption"] and (first["image"] == second["image"]).all()
