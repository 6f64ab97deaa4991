"""Photographs with captions in the layouts of Conceptual Captions and img2dataset."""

import io
import json
import logging
import zlib

import numpy as np
import pytest
from images_on_disk import pixels, values, write
from PIL import Image
from shard_writing import encoded, sample, write_shard, write_shards

from ldm.config.instantiate import instantiate_from_config
from ldm.data.previews.pytorch_dataset import PreviewsTrain, PreviewsValidation
from ldm.errors import UserError

PAIRS = [(f"a photograph of number {i}", f"http://example.org/{i}.jpg?x=é") for i in range(5)]


def write_files(folder, shards=2, size=3):
    """Write the folders of img2dataset's output format "files"."""
    for shard in range(shards):
        for number in range(size):
            stem = folder / f"{shard:05}" / f"{shard:05}{number:04}"
            write(stem.with_suffix(".png"), seed=number)
            stem.with_suffix(".txt").write_text(f"caption of {stem.name}")
            stem.with_suffix(".json").write_text(json.dumps({"key": stem.name, "status": "success"}))
        (folder / f"{shard:05}_stats.json").write_text("{}")


def write_table(path, pairs=PAIRS):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{caption}\t{url}\n" for caption, url in pairs), encoding="utf-8")
    return path


def captions(dataset):
    return [dataset[i]["caption"] for i in range(len(dataset))]


def test_published_parameters_suffice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, target in (("train", "PreviewsTrain"), ("validation", "PreviewsValidation")):
        write_files(tmp_path / "data/previews" / name)
        config = {"target": f"ldm.data.previews.pytorch_dataset.{target}", "params": {"size": 16}}
        dataset = instantiate_from_config(config)
        item = dataset[4]
        assert len(dataset) == 6 and set(item) == {"image", "caption", "file_path_", "relative_file_path_"}
        assert item["image"].shape == (16, 16, 3) and item["image"].dtype == np.float32
        assert item["caption"] == "caption of 000010001" and item["relative_file_path_"] == "00001/000010001.png"


def test_missing_folder_is_an_error_that_names_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match='PreviewsTrain: there is no folder "data/previews/train"'):
        PreviewsTrain()


def test_validation_shows_the_centre_and_training_moves(tmp_path):
    array = write(tmp_path / "a.png", height=16, width=40)
    (tmp_path / "a.txt").write_text("wide")
    item = PreviewsValidation(16, str(tmp_path))[0]
    np.testing.assert_array_equal(item["image"], values(array[:, 12:28]))
    train = PreviewsTrain(16, str(tmp_path))
    assert len({train[0]["image"].tobytes() for _ in range(20)}) > 5


def test_images_without_caption_are_left_out_and_counted(tmp_path, caplog):
    write_files(tmp_path, shards=1)
    (tmp_path / "00000/000000001.txt").unlink()
    assert captions(PreviewsTrain(16, str(tmp_path))) == ["caption of 000000000", "caption of 000000002"]
    assert "1 of 3 images have no caption beside them and are left out: 00000/000000001.png" in caplog.text


@pytest.mark.parametrize("header", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        lambda i, url: f"{i}.jpg",
        lambda i, url: f"00000/{i:09}.jpg",
        lambda i, url: f"training/{i}_{zlib.crc32(url.encode())}",
    ],
    ids=["index", "padded", "checksum"],
)
def test_table_of_links_finds_the_images_of_its_lines(name, header, tmp_path, caplog):
    table = write_table(tmp_path / "Train_GCC-training.tsv", [("caption", "url"), *PAIRS] if header else PAIRS)
    for i in (4, 1):
        path = tmp_path / f"{name(i, PAIRS[i][1])}"
        path = path if path.suffix else path.with_suffix(".png")
        write(path, seed=i)
    with caplog.at_level(logging.INFO):
        dataset = PreviewsTrain(16, str(tmp_path))
    assert captions(dataset) == [PAIRS[1][0], PAIRS[4][0]]
    assert f'PreviewsTrain: 3 of 5 lines of "{table}" have no image' in caplog.messages


def test_table_elsewhere_is_named(tmp_path):
    table = write_table(tmp_path / "elsewhere/links.tsv")
    write(tmp_path / "images/2.png")
    assert captions(PreviewsTrain(16, str(tmp_path / "images"), captions=str(table))) == [PAIRS[2][0]]


def test_wrong_lines_and_foreign_images_are_counted(tmp_path, caplog):
    table = write_table(tmp_path / "x_GCC_x.tsv")
    lines = table.read_bytes().split(b"\n")
    lines[1], lines[3] = b"no address", b"caf\xe9\thttp://example.org/3"
    table.write_bytes(b"\n".join(lines))
    for name in ("0", "1", "2", "3", "7", "cat", f"4_{zlib.crc32(b'other')}"):
        write(tmp_path / f"{name}.png")
    assert captions(PreviewsTrain(16, str(tmp_path))) == [PAIRS[0][0], PAIRS[2][0]]
    assert f'1 lines of "{table}" are no pairs: 1' in caplog.text
    assert f'3 of 7 images belong to no line of "{table}" and are left out: ' in caplog.text
    assert "2 of 4 images have no caption, or one that is not valid UTF-8 and are left out: 1.png, 3.png" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: write_table(folder / "b_GCC.tsv"), "contains several tables of links: a_GCC.tsv, b_GCC.tsv"),
        (lambda folder: (folder / "a_GCC.tsv").write_text("nothing\n"), "is a caption, a tab and an address"),
        (lambda folder: (folder / "1.png").rename(folder / "99.png"), "all 1 images belong to no line of"),
    ],
)
def test_unsuitable_tables_raise_user_error(change, message, tmp_path):
    write_table(tmp_path / "a_GCC.tsv")
    write(tmp_path / "1.png")
    change(tmp_path)
    with pytest.raises(UserError, match=message):
        PreviewsTrain(16, str(tmp_path))


def test_shards_are_read_in_any_order(tmp_path):
    names = write_shards(tmp_path, shards=2, size=3)
    dataset = PreviewsValidation(24, str(tmp_path))
    assert len(dataset) == 6
    item = dataset[4]
    assert item["caption"] == f"a caption of {names[4]}"
    assert item["file_path_"] == f"{tmp_path}/00001.tar/{names[4]}.jpg"
    assert item["relative_file_path_"] == f"00001.tar/{names[4]}.jpg"
    decoded = np.asarray(Image.open(io.BytesIO(encoded(seed=int(names[4])))))
    np.testing.assert_array_equal(item["image"], values(decoded[:, 6:30]))
    assert captions(dataset) == [f"a caption of {name}" for name in names]


def test_samples_of_shards_without_caption_are_counted(tmp_path, caplog):
    files = {key: sample(key) for key in "abc"}
    del files["a"]["txt"]
    files["b"]["txt"] = b"\xff\xff"
    write_shard(tmp_path / "0.tar", files)
    assert captions(PreviewsTrain(16, str(tmp_path))) == ["a caption of c"]
    assert f"2 samples without image or caption of the shards are left out: {tmp_path}/0.tar/a, " in caplog.text


def test_unreadable_images_in_shards_are_replaced_and_stop_a_run_before_training(tmp_path, caplog):
    files = {str(i): sample(str(i)) for i in range(4)}
    files["2"]["jpg"] = b"\xff\xd8\xffjunk"
    write_shard(tmp_path / "0.tar", files)
    dataset = PreviewsTrain(16, str(tmp_path))
    assert captions(dataset) == [f"a caption of {i}" for i in (0, 1, 3, 3)]
    assert len([line for line in caplog.messages if "2.jpg" in line]) == 1
    with pytest.raises(UserError, match="1 of 4 images cannot be read"):
        PreviewsTrain(16, str(tmp_path)).check_files()
    checked = PreviewsTrain(16, str(tmp_path), max_unreadable=0.5)
    checked.check_files()
    assert captions(checked) == [f"a caption of {i}" for i in (0, 1, 3, 3)]


def test_shard_that_was_cut_after_indexing_is_an_error_of_its_images(tmp_path):
    write_shards(tmp_path, shards=1, size=2)
    dataset = PreviewsTrain(16, str(tmp_path))
    path = tmp_path / "00000.tar"
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(UserError, match="no image can be read"):
        dataset[0]


def test_compressed_shards_are_refused(tmp_path):
    write_shard(tmp_path / "0.tar", {"a": sample("a")}, mode="w:gz")
    with pytest.raises(UserError, match=r"is compressed; decompress it, or use ldm.data.shards.ImageShards"):
        PreviewsTrain(16, str(tmp_path))


def test_large_jpeg_is_decoded_at_a_reduced_size(tmp_path):
    Image.fromarray(pixels(640, 960)).save(tmp_path / "a.jpg")
    (tmp_path / "a.txt").write_text("large")
    dataset = PreviewsValidation(64, str(tmp_path))
    assert dataset.read(0).size == (240, 160)
    full = Image.open(tmp_path / "a.jpg").resize((64, 64), Image.Resampling.BICUBIC, (160, 0, 800, 640))
    assert np.abs(dataset[0]["image"] - values(np.asarray(full))).mean() < 0.02
