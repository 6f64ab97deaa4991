"""Training from the published configurations of layouts and label maps: tiny networks, miniatures of the data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from annotated_sets import CAR, CLASSES, DOG, MAN, box_row, write_landscapes, write_open_images
from PIL import Image
from tiny_models import layout_config

import main
from ldm.config.instantiate import instantiate_from_config
from ldm.data.openimages import OpenImagesBBoxTrain
from ldm.io.grids import draw_boxes
from ldm.io.pixels import to_batch

ROOT = Path(__file__).parents[2]
TINY = [
    *("model.params.image_size=8", "model.params.timesteps=4", "model.params.log_every_t=2"),
    "model.params.unet_config.params.image_size=8",
    "model.params.unet_config.params.model_channels=32",
    "model.params.unet_config.params.num_res_blocks=1",
    "model.params.unet_config.params.channel_mult=[1,1]",
    "model.params.unet_config.params.attention_resolutions=[2]",
    "model.params.first_stage_config.params.n_embed=16",
    "model.params.first_stage_config.params.ddconfig.resolution=32",
    "model.params.first_stage_config.params.ddconfig.ch=32",
    "model.params.first_stage_config.params.ddconfig.ch_mult=[1,1,1]",
    "model.params.first_stage_config.params.ddconfig.num_res_blocks=1",
    *("data.params.batch_size=2", "data.params.num_workers=0"),
]
OPTIONS = ["-t", "--max_steps", "2", "--enable_progress_bar", "false", "--enable_model_summary", "false"]
LOGGER = [
    "lightning.callbacks.image_logger.params.batch_frequency=1",
    "lightning.callbacks.image_logger.params.max_images=2",
    "lightning.callbacks.image_logger.params.log_images_kwargs={ddim_steps: 1, inpaint: false, "
    "plot_progressive_rows: false, plot_diffusion_rows: false, quantize_denoised: false}",
]


def row(number, label, x0, x1, y0, y1):
    """Return a row of a file of boxes for an image by its number."""
    return box_row(f"{number:016d}", label, x0, x1, y0, y1)


@pytest.fixture
def open_images(tmp_path, monkeypatch):
    """Write both splits of OpenImages into the default folder; the working folder is above it."""
    monkeypatch.chdir(tmp_path)
    rows = [row(n, label, *edges) for n in range(4) for label, *edges in ((MAN, 0, 0.5, 0, 1), (CAR, 0.5, 1, 0.5, 1))]
    for split in ("train", "validation"):
        write_open_images(tmp_path / "data/openimages", rows, split, images=4)
    return tmp_path / "data/openimages"


def logged_image(folder, key):
    """Return the first image that a run logged for training batches under a key."""
    (path,) = sorted(folder.glob(f"logs/*/images/train/{key}_gs-000001*.png"))
    return np.asarray(Image.open(path).convert("RGB"))


def test_layouts_train_and_are_logged(open_images, tmp_path):
    words = [
        *("model.params.cond_stage_config.params.n_layer=1", "model.params.cond_stage_config.params.n_embed=32"),
        *("model.params.unet_config.params.context_dim=32", "model.params.unet_config.params.transformer_depth=1"),
        *("data.params.train.params.size=32", "data.params.train.params.crop_method=none"),
        *("data.params.train.params.random_flip=false", "data.params.validation.params.size=32"),
    ]
    config = str(ROOT / "models/ldm/layout2img-openimages256/config.yaml")
    assert main.main(["-b", config, *OPTIONS, *TINY, *words, *LOGGER]) in (0, None)
    grid = logged_image(tmp_path, "conditioning")
    corners = [(0, 0, 44 / 89, 1), (44 / 89, 44 / 89, 1, 1)]
    expected = ((draw_boxes((32, 32), corners, ["Man", "Car"], 8).movedim(0, -1) + 1) * 127.5).round().numpy()
    assert np.array_equal(grid[2:34, 2:34], expected), "the boxes with the names of the data set"
    assert logged_image(tmp_path, "samples").shape == grid.shape


def test_label_maps_train_and_are_logged(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for split in ("train", "validation"):
        write_landscapes(tmp_path / "data/landscapes", split, count=4, height=48, width=64)
    words = [
        f"data.params.{split}.params.{name}"
        for split in ("train", "validation")
        for name in ("size=40", "crop_size=32")
    ]
    config = str(ROOT / "models/ldm/semantic_synthesis512/config.yaml")
    extra = ["model.params.unet_config.params.num_heads=2"]
    assert main.main(["-b", config, *OPTIONS, *TINY, *words, *extra, *LOGGER]) in (0, None)
    grid = logged_image(tmp_path, "conditioning")
    colours = {tuple(each) for each in grid[2:34, 2:34].reshape(-1, 3).tolist()}
    assert 2 <= len(colours) <= 3, "a colour for each label"


def test_plain_and_layout_models_show_the_same_boxes():
    config = layout_config(class_names=["cat", "dog"])
    plain = instantiate_from_config(config).eval()
    special = instantiate_from_config({**config, "target": "ldm.models.diffusion.ddpm.Layout2ImgDiffusion"}).eval()
    tokens = torch.full((2, 11), 299)
    tokens[0, :3] = torch.tensor([1, 0, 17 * 17 - 1])
    batch = {"image": torch.zeros(2, 16, 16, 3), "coordinates_bbox": tokens}
    options = {"ddim_steps": 1, "inpaint": False, "plot_progressive_rows": False, "plot_diffusion_rows": False}
    shown = plain.log_images(batch, **options)
    assert torch.equal(shown["conditioning"], special.log_images(batch, **options)["bbox_image"])
    assert "bbox_image" not in shown
    assert torch.equal(shown["conditioning"][0], draw_boxes((16, 16), [(0, 0, 1, 1)], ["dog"], 8))
    assert torch.equal(shown["conditioning"][1:], to_batch([np.full((16, 16, 3), 255, np.uint8)]))


def test_previews_read_the_file_of_class_names(tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("cat\nhound\tdog\n")
    model = instantiate_from_config({**layout_config(class_names=str(names))})
    special = {**layout_config(class_names=str(names)), "target": "ldm.models.diffusion.ddpm.Layout2ImgDiffusion"}
    assert [instantiate_from_config(special).class_name(label) for label in range(3)] == ["cat", "hound", "2"]
    assert model.class_names == str(names)


def test_classes_of_boxes_are_names_of_the_model(open_images):
    """Check that `class_names` of the data set names the tokens, groups among them."""
    dataset = OpenImagesBBoxTrain(32)
    assert dataset.class_names[: len(CLASSES)] == list(dataset.classes.names)
    assert dataset.class_names[len(CLASSES) + dataset.classes.number_of[DOG]] == "Dog (group)"
