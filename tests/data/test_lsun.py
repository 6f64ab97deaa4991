"""LSUN: central squares, randomly mirrored."""

from __future__ import annotations

import io
import pickle
import sys

import lmdb
import numpy as np
import pytest
import torch
from images_on_disk import pixels, values, write
from PIL import Image

from ldm.config.instantiate import instantiate_from_config
from ldm.data import lsun
from ldm.errors import UserError
from ldm.io import lmdb_reader
from ldm.training.fingerprint import fingerprint


@pytest.fixture
def churches(tmp_path, monkeypatch):
    """Create the published lists and images of churches; return the pixels of an image."""
    monkeypatch.chdir(tmp_path)
    array = write(tmp_path / "data/lsun/churches/ab/one.webp")
    array = np.asarray(Image.open(tmp_path / "data/lsun/churches/ab/one.webp").convert("RGB"))
    for split in ("train", "val"):
        (tmp_path / f"data/lsun/church_outdoor_{split}.txt").write_text("ab/one.webp\n")
    return array


def test_central_square_is_resized_by_pillow(churches):
    config = {"target": "ldm.data.lsun.LSUNChurchesValidation", "params": {"size": 16}}
    item = instantiate_from_config(config)[0]
    expected = Image.fromarray(churches[:, 6:30]).resize((16, 16), Image.Resampling.BICUBIC)
    assert np.array_equal(item["image"], values(np.asarray(expected)))
    assert item["relative_file_path_"] == "ab/one.webp"
    assert lsun.LSUNChurchesValidation()[0]["image"].shape == (24, 24, 3)
    nearest = lsun.LSUNChurchesValidation(size=12, interpolation="nearest")[0]["image"]
    assert np.array_equal(nearest, values(churches[1::2, 7:30:2]))


def test_half_of_training_images_are_mirrored(churches):
    dataset = lsun.LSUNChurchesTrain(size=16)
    plain = lsun.LSUNChurchesTrain(size=16, flip_p=0.0)[0]["image"]
    torch.manual_seed(0)
    images = [dataset[0]["image"] for _ in range(100)]
    mirrored = sum(np.array_equal(image, plain[:, ::-1]) for image in images)
    assert mirrored + sum(np.array_equal(image, plain) for image in images) == 100
    assert 35 <= mirrored <= 65  # three standard deviations


def test_missing_published_folder_raises_user_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, where in [
        ("LSUNBedroomsTrain", "data/lsun/bedrooms"),
        ("LSUNCatsValidation", "data/lsun/cats"),
        ("LSUNChurchesTrain", "data/lsun/churches"),
    ]:
        with pytest.raises(UserError, match=f'{name}: there is no folder "{where}"'):
            getattr(lsun, name)(size=256)
        (tmp_path / where).mkdir(parents=True)
    with pytest.raises(UserError, match=r'there is no list "data/lsun/bedrooms_train\.txt"'):
        lsun.LSUNBedroomsTrain(size=256)


def test_unknown_interpolation_raises_user_error(churches):
    with pytest.raises(UserError, match='did you mean "bicubic"'):
        lsun.LSUNChurchesTrain(interpolation="bicubc")


# -- databases -------------------------------------------------------------------------------------------------

KEYS = ["0a1b2c3d4e5f60718293a4b5c6d7e8f901234567", "5e0000000000000000000000000000000000000a", "f" * 40]


def webp(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels(seed=seed)).save(buffer, format="WEBP", quality=90)
    return buffer.getvalue()


def decoded(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def write_database(path, values: dict[str, bytes]) -> None:
    """Write a database as LSUN is distributed: keys are hashes in hexadecimal, values are WebP files."""
    path.mkdir(parents=True)
    with lmdb.open(str(path), map_size=1 << 20) as database, database.begin(write=True) as transaction:
        for key, value in values.items():
            transaction.put(key.encode(), value)


@pytest.fixture
def bedrooms(tmp_path, monkeypatch):
    """Create the databases of bedrooms beside the published folder, which does not exist."""
    monkeypatch.chdir(tmp_path)
    write_database(tmp_path / "data/lsun/bedroom_train_lmdb", {key: webp(n) for n, key in enumerate(KEYS)})
    write_database(tmp_path / "data/lsun/bedroom_val_lmdb", {"9" * 40: webp(9)})
    return tmp_path / "data/lsun"


def test_database_beside_the_published_folder_is_read(bedrooms):
    config = {"target": "ldm.data.lsun.LSUNBedroomsTrain", "params": {"size": 16, "flip_p": 0.0}}
    dataset = instantiate_from_config(config)
    assert len(dataset) == 3 and [dataset.entries(n)["relative_file_path_"] for n in range(3)] == KEYS
    item = dataset[1]
    square = Image.fromarray(decoded(webp(1))[:, 6:30]).resize((16, 16), Image.Resampling.BICUBIC)
    assert np.array_equal(item["image"], values(np.asarray(square)))
    assert item["file_path_"] == f"data/lsun/bedroom_train_lmdb/{KEYS[1]}"
    assert len(lsun.LSUNBedroomsValidation(size=16)) == 1


@pytest.mark.parametrize("root", [".", "bedroom_train_lmdb"])
def test_data_root_is_a_database_or_contains_it(bedrooms, root):
    assert len(lsun.LSUNBedroomsTrain(data_root=str(bedrooms / root))) == 3
    assert len(lsun.LSUNBase(data_root=str(bedrooms / "bedroom_val_lmdb"))) == 1


def test_lists_name_keys_of_a_database(bedrooms, caplog):
    (bedrooms / "bedrooms_train.txt").write_text(f"{KEYS[2]}.webp\n\n0/a/{KEYS[0]}.webp\n")
    dataset = lsun.LSUNBedroomsTrain(size=8, flip_p=0.0)
    assert [dataset[n]["relative_file_path_"] for n in (0, 1)] == [f"{KEYS[2]}.webp", f"0/a/{KEYS[0]}.webp"]
    assert np.array_equal(lsun.LSUNBedroomsTrain(flip_p=0.0)[1]["image"], values(decoded(webp(0))[:, 6:30]))
    (bedrooms / "bedrooms_val.txt").write_text(f"{KEYS[1]}.webp\n")
    validation = lsun.LSUNBedroomsValidation()
    assert validation[0]["file_path_"].endswith(f"bedroom_train_lmdb/{KEYS[1]}"), "the published list splits the set"


def test_cats_are_one_database(bedrooms, caplog):
    write_database(bedrooms / "cat", {key: webp(n) for n, key in enumerate(KEYS)})
    assert len(lsun.LSUNCatsTrain()) == len(lsun.LSUNCatsValidation()) == 3
    assert caplog.text.count("has no split; without txt_file, training and validation use the same images") == 2
    (bedrooms / "cat_val.txt").write_text(f"{KEYS[1]}.jpg\n")
    caplog.clear()
    assert len(lsun.LSUNCatsValidation()) == 1 and not caplog.text


def test_images_that_a_database_lacks_are_counted(bedrooms, caplog, monkeypatch):
    (bedrooms / "some.txt").write_text("".join(f"{name}.webp\n" for name in ["absent", *KEYS]))
    list_file = str(bedrooms / "some.txt")
    with pytest.raises(UserError, match=r'1 of 4 images of ".*some.txt" are not in the database ".*" \(absent.webp\)'):
        lsun.LSUNBedroomsTrain(txt_file=list_file)
    monkeypatch.setattr(lsun.LSUNBase, "max_unreadable", 0.25)
    assert len(lsun.LSUNBedroomsTrain(txt_file=list_file)) == 3
    assert '1 of 4 images of "' in caplog.text and caplog.text.count("absent.webp") == 1


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_read_a_database(bedrooms, method):
    dataset = lsun.LSUNBedroomsTrain(size=8, flip_p=0.0)
    expected = [dataset[n]["image"] for n in range(3)]
    loader = torch.utils.data.DataLoader(dataset, num_workers=2, multiprocessing_context=method)
    for batch, image in zip(loader, expected, strict=True):
        assert np.array_equal(batch["image"][0], image)


def test_reading_leaves_the_state_of_the_data_set(bedrooms):
    dataset = lsun.LSUNBedroomsTrain(size=8, flip_p=0.0)
    before = fingerprint(dataset)
    dataset[0]
    assert fingerprint(dataset) == before
    copy = pickle.loads(pickle.dumps(dataset))
    assert np.array_equal(copy[2]["image"], dataset[2]["image"])


def test_damaged_values_are_replaced_and_named(bedrooms, caplog):
    write_database(bedrooms / "damaged", {KEYS[0]: b"no image", KEYS[1]: webp(1)})
    dataset = lsun.LSUNBase(data_root=str(bedrooms / "damaged"), flip_p=0.0)
    assert [dataset[n]["relative_file_path_"] for n in (0, 0, 1)] == [KEYS[1]] * 3
    assert caplog.text.count(f"damaged/{KEYS[0]}") == 1


def test_damaged_and_empty_databases_raise_user_error(bedrooms):
    write_database(bedrooms / "empty", {})
    (bedrooms / "junk").mkdir()
    (bedrooms / "junk/data.mdb").write_bytes(b"junk" * 5000)
    for name, message in (("empty", "contains no image"), ("junk", "cannot read the database")):
        with pytest.raises(UserError, match=message) as raised:
            lsun.LSUNBase(data_root=str(bedrooms / name))
        assert "\n" not in str(raised.value) and name in str(raised.value)


def test_missing_package_raises_user_error(bedrooms, monkeypatch):
    monkeypatch.setitem(sys.modules, "lmdb", None)
    monkeypatch.setattr(lmdb_reader, "_open", {})
    with pytest.raises(UserError, match=r'bedroom_train_lmdb" needs the package lmdb; install it with pip install'):
        lsun.LSUNBedroomsTrain()
