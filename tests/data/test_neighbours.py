"""Tests of the data sets with nearest neighbours, and of the script that computes embeddings."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from images_on_disk import write
from omegaconf import OmegaConf
from retrieval_files import neighbours_by_argsort, unit, vectors, write_database
from tiny_models import write_clip
from torch.utils.data import DataLoader

from ldm.data.emoji import EmojiValidation, load_drawings
from ldm.data.emoji_neighbours import WIDTH, DrawingDatabase, DrawingNeighbours, embed_drawings
from ldm.data.neighbours import Neighbours
from ldm.errors import UserError
from ldm.modules.encoders.modules import FrozenClipImageEmbedder

SCENES = {"target": "ldm.data.emoji_scenes.SceneValidation", "params": {"length": 12, "size": 8}}
DRAWINGS = {"target": "ldm.data.emoji.EmojiValidation", "params": {"size": 16}}


@pytest.fixture
def folders(tmp_path):
    """Return the folders of 12 embeddings and of a database of 40, and both arrays."""
    queries, rows = vectors(12, seed=1), vectors(40, seed=2)
    return write_database(tmp_path / "items", queries), write_database(tmp_path / "base", rows), queries, rows


# -- Neighbours ------------------------------------------------------------------------------------------------


def test_items_have_their_neighbours(folders):
    items, base, queries, rows = folders
    dataset = Neighbours(SCENES, str(items), str(base), knn=3)
    expected, _ = neighbours_by_argsort(rows, queries, 3)
    assert len(dataset) == 12
    for index in range(12):
        item = dataset[index]
        assert item["nix"].shape == (3, 24) and item["nix"].dtype == np.float32
        np.testing.assert_allclose(item["nix"], unit(rows)[expected[index]], atol=1e-6)
        np.testing.assert_array_equal(item["image"], dataset.dataset[index]["image"])


def test_items_themselves_are_left_out(folders):
    items, _, queries, _ = folders
    dataset = Neighbours(SCENES, str(items), knn=2, leave_out=1)
    expected, _ = neighbours_by_argsort(queries, queries, 3)
    np.testing.assert_array_equal(expected[:, 0], np.arange(12))
    np.testing.assert_array_equal(dataset.indices, expected[:, 1:])


def test_neighbours_are_read_from_the_file_of_an_earlier_run(folders, tmp_path, monkeypatch):
    items, base, *_ = folders
    path = tmp_path / "neighbours.npz"
    first = Neighbours(SCENES, str(items), str(base), path=str(path))
    monkeypatch.setattr("ldm.data.neighbours.find_neighbours", None)
    again = Neighbours(SCENES, str(items), str(base), path=str(path))
    np.testing.assert_array_equal(first.indices, again.indices)
    np.testing.assert_array_equal(first[5]["nix"], again[5]["nix"])


def test_files_of_other_neighbours_are_refused(folders, tmp_path):
    items, base, *_ = folders
    path = tmp_path / "neighbours.npz"
    Neighbours(SCENES, str(items), str(base), path=str(path), knn=3)
    with pytest.raises(UserError, match="contains the neighbours of another data set or database; remove the file"):
        Neighbours(SCENES, str(items), str(base), path=str(path), knn=4)
    with pytest.raises(UserError, match="contains the neighbours of another data set or database"):
        Neighbours(SCENES, str(items), str(items), path=str(path), knn=3)
    path.write_bytes(b"damaged")
    with pytest.raises(UserError, match="cannot read the neighbours in"):
        Neighbours(SCENES, str(items), str(base), path=str(path), knn=3)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"knn": 0}, "knn must be at least 1"),
        ({"leave_out": -1}, "leave_out at least 0"),
        ({"knn": 39, "leave_out": 2}, "the database has 40 vectors, fewer than knn \\+ leave_out \\(41\\)"),
        ({"embeddings": "nowhere"}, 'there is no database "nowhere"'),
    ],
)
def test_invalid_parameters_raise_user_error(folders, params, message):
    items, base, *_ = folders
    with pytest.raises(UserError, match=message) as error:
        Neighbours(SCENES, **{"embeddings": str(items), "database": str(base), **params})
    assert "\n" not in str(error.value)


def test_embeddings_of_another_data_set_raise_user_error(folders):
    _, base, *_ = folders
    with pytest.raises(UserError, match="has 40 embeddings, the data set 12 items"):
        Neighbours(SCENES, str(base))


# -- drawings --------------------------------------------------------------------------------------------------


def test_embeddings_of_drawings_weight_colours_by_opacity():
    rgba = np.zeros((1, 16, 16, 4), np.uint8)
    rgba[0, :2, :2] = 255, 0, 255, 255
    rgba[0, :2, 2:4] = 255, 255, 255, 51
    cells = embed_drawings(rgba).reshape(8, 8, 4)
    np.testing.assert_allclose(cells[0, 0], [1, -1, 1, 1], atol=1e-6)
    np.testing.assert_allclose(cells[0, 1], [0.2, 0.2, 0.2, 0.2], atol=1e-6)
    assert not cells[1:].any() and not cells[0, 2:].any()


def test_the_nearest_drawing_is_the_drawing_itself():
    dataset = DrawingNeighbours(DRAWINGS, knn=3)
    assert dataset.indices.shape == (1366, 3)
    np.testing.assert_array_equal(dataset.indices[:, 0], np.arange(1366))
    item = dataset[5]
    own = embed_drawings(load_drawings(64).rgba[item["class_label"]][None])
    np.testing.assert_allclose(item["nix"][0], unit(own)[0], atol=1e-6)
    assert item["nix"].shape == (3, WIDTH) and len(dataset) == len(EmojiValidation(16))
    assert next(iter(DataLoader(dataset, batch_size=2)))["nix"].shape == (2, 3, WIDTH)


def test_similar_drawings_are_near():
    names = load_drawings(64).cldr_names
    found = DrawingDatabase(load_drawings(64)).neighbours([names.index("grinning face")], 4)
    assert all("face" in names[index] for index in found[0])


def test_a_database_of_some_drawings_contains_no_others():
    database = DrawingDatabase(load_drawings(64), classes=range(1, 1366, 2))
    found = database.classes[database.neighbours(range(0, 20), 4)]
    assert found.shape == (20, 4) and (found % 2 == 1).all()


def test_items_without_a_drawing_raise_user_error():
    scenes = {"target": "ldm.data.superresolution.SmallerPictures", "params": {"dataset": SCENES}}
    dataset = DrawingNeighbours(scenes)
    dataset.dataset = [{"image": 0}]
    with pytest.raises(UserError, match="an item has the class_label None; wrap a data set of single drawings"):
        dataset[0]


# -- embed_images ----------------------------------------------------------------------------------------------


def test_embeddings_of_a_folder_train_a_retrieval_model(load_script, tmp_path):
    pytest.importorskip("transformers")
    clip = write_clip(tmp_path / "clip")
    for number in range(5):
        write(tmp_path / "images" / f"{number}.png", height=20, width=20, seed=number)
    folder = {"data_root": str(tmp_path / "images"), "size": 16, "flip_p": 0.0}
    images = {"target": "ldm.data.lsun.LSUNBase", "params": folder}
    wrapper = {"dataset": images, "embeddings": str(tmp_path / "database"), "knn": 2, "leave_out": 1}
    config = tmp_path / "retrieval.yaml"
    train = {"target": "ldm.data.neighbours.Neighbours", "params": wrapper}
    data = {"target": "main.DataModuleFromConfig", "params": {"batch_size": 2, "train": train}}
    OmegaConf.save({"data": data}, config)
    options = ["--config", str(config), "--clip_type", str(clip), "--batch_size", "2", "--device", "cpu"]
    assert load_script("embed_images").main(options) == 0
    dataset = Neighbours(**wrapper)
    model = FrozenClipImageEmbedder(str(clip))
    batch = torch.stack([torch.from_numpy(dataset[index]["image"]) for index in range(5)]).movedim(-1, 1)
    with torch.no_grad():
        expected = model(batch).numpy()
    indices, _ = neighbours_by_argsort(expected, expected, 3)
    np.testing.assert_array_equal(dataset.indices, indices[:, 1:])
    np.testing.assert_allclose(dataset[4]["nix"], unit(expected)[indices[4, 1:]], atol=1e-5)


def test_embed_images_needs_a_folder_and_a_split(load_script, tmp_path, capsys):
    config = tmp_path / "data.yaml"
    train = {"target": "ldm.data.emoji.EmojiTrain"}
    OmegaConf.save({"data": {"target": "main.DataModuleFromConfig", "params": {"train": train}}}, config)
    main = load_script("embed_images").main
    assert main(["--config", str(config), "--split", "validation"]) == 2
    assert "has no data.params.validation; choose another --split" in capsys.readouterr().err
    assert main(["--config", str(config)]) == 2
    assert "name the folder of the result with --outdir" in capsys.readouterr().err
