"""Files that cannot be read: found by their first and last bytes, named once, and replaced."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
import torch
from images_on_disk import pixels, values, write
from PIL import Image

from ldm.data import unreadable
from ldm.data.image_files import ImageFiles, ListedImages, read_pixels
from ldm.data.lsun import LSUNBase
from ldm.data.superresolution import SuperResolution
from ldm.data.unreadable import UnreadableFiles, find_faults, wrapped
from ldm.errors import UserError
from ldm.training.data import DataModuleFromConfig
from ldm.training.loader import ResumableLoader, seed_worker

SUFFIXES = (".png", ".jpg", ".webp", ".gif", ".bmp", ".tif", ".npy")


@pytest.fixture(autouse=True)
def warnings_only(caplog):
    """Leave informative log lines out, also after a test that asked for them."""
    caplog.set_level("WARNING", "ldm")


@pytest.fixture
def folder(tmp_path):
    """Return a folder of five images, of which the second and third are damaged."""
    for number in range(5):
        write(tmp_path / f"{number}.png", height=8, width=8, seed=number)
    (tmp_path / "1.png").write_bytes(b"")
    (tmp_path / "2.png").write_bytes((tmp_path / "3.png").read_bytes()[:80])
    return tmp_path


# -- the check of all files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_complete_files_have_no_fault(suffix, tmp_path):
    write(tmp_path / f"x{suffix}")
    assert find_faults([tmp_path / f"x{suffix}"], read_pixels) == {}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "absent"])
def test_damaged_files_have_a_fault(suffix, damage, tmp_path):
    path = tmp_path / f"x{suffix}"
    write(path, height=200, width=300)
    data = path.read_bytes()
    contents = {"truncated": data[: len(data) // 2], "empty": b"", "text": b"<html>not found</html>"}
    if damage == "truncated" and suffix in (".bmp", ".tif"):
        pytest.skip("the header of this format does not tell")
    if damage == "absent":
        path.unlink()
    else:
        path.write_bytes(contents[damage])
    faults = find_faults([tmp_path / "y.png", path], read_pixels)
    assert list(faults) == [0, 1] and str(path) in faults[1]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_complete_files_are_not_decoded(suffix, tmp_path):
    write(tmp_path / f"x{suffix}")

    def read(path):
        raise AssertionError(f"{path} is decoded")

    assert find_faults([tmp_path / f"x{suffix}"], read) == {}


def test_image_of_too_many_pixels_is_a_fault(tmp_path):
    data = bytearray(_png_header(100_000, 100_000))
    (tmp_path / "x.png").write_bytes(data)
    (fault,) = find_faults([tmp_path / "x.png"], read_pixels).values()
    assert "has more than 178 million pixels" in fault


def _png_header(width, height):
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", b""), (b"IEND", b"")]
    parts = [struct.pack(">I", len(content)) + kind + content for kind, content in chunks]
    sums = [struct.pack(">I", zlib.crc32(kind + content)) for kind, content in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(part + sum_ for part, sum_ in zip(parts, sums, strict=True))


def test_values_of_32_bits_are_a_fault(tmp_path):
    Image.fromarray(np.zeros((8, 8), np.float32)).save(tmp_path / "x.tif")
    (fault,) = find_faults([tmp_path / "x.tif"], read_pixels).values()
    assert "its pixels have 32 bits" in fault


def test_bytes_after_a_jpeg_are_no_fault(tmp_path):
    write(tmp_path / "x.jpg")
    with open(tmp_path / "x.jpg", "ab") as file:
        file.write(b"\0" * 500)
    assert find_faults([tmp_path / "x.jpg"], read_pixels) == {}


def test_many_files_are_checked_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(unreadable, "BLOCK", 3)
    write(tmp_path / "x.png")
    paths = [tmp_path / ("x.png" if i % 4 else f"{i}.png") for i in range(20)]
    assert list(find_faults(paths, read_pixels)) == [0, 4, 8, 12, 16]


# -- replacement -----------------------------------------------------------------------------------------------


def test_next_readable_image_takes_the_place(folder, caplog):
    dataset = ListedImages(data_root=str(folder))
    for _ in range(2):
        found = [dataset[i]["relative_file_path_"] for i in (0, 1, 2, 3, -1)]
        assert found == ["0.png", "3.png", "3.png", "3.png", "4.png"]
    assert np.array_equal(dataset[1]["image"], values(pixels(8, 8, 3)))
    assert len(dataset.unreadable) == 2 and len(dataset) == 5
    first, second = caplog.messages
    assert first.startswith(f'cannot read the image "{folder}/1.png": ')
    assert second.startswith(f'cannot read the image "{folder}/2.png": ')
    assert all(message.endswith("; another image takes its place") for message in caplog.messages)


def test_after_the_last_image_the_first_one_follows(folder):
    (folder / "4.png").unlink()
    (folder / "list.txt").write_text("0.png\n3.png\n4.png\n")
    assert ListedImages(str(folder / "list.txt"), str(folder))[2]["relative_file_path_"] == "0.png"


def test_super_resolution_pairs_skip_unreadable_images(folder):
    pairs = SuperResolution(ListedImages(data_root=str(folder)), size=8, degradation="pil_bicubic")
    assert [pairs[i]["relative_file_path_"] for i in range(5)] == ["0.png", "3.png", "3.png", "3.png", "4.png"]


def test_index_out_of_range_raises_index_error(folder):
    dataset = ListedImages(data_root=str(folder))
    assert len([*dataset]) == 5, "iteration ends"
    with pytest.raises(IndexError):
        dataset[5]


def test_no_readable_image_raises_user_error(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(b"x")
    dataset = ListedImages(data_root=str(tmp_path))
    for _ in range(2):
        with pytest.raises(UserError, match="ListedImages: no image can be read"):
            dataset[1]


def test_many_failures_in_a_row_raise_user_error(tmp_path, monkeypatch):
    monkeypatch.setattr(unreadable, "MOST_IN_A_ROW", 4)
    files = ImageFiles([tmp_path / f"{number}.png" for number in range(20)], {})
    with pytest.raises(UserError, match="ImageFiles: 4 images in a row cannot be read; check the drive"):
        files[0]


def test_workers_name_each_file_once_and_the_loader_counts(folder, caplog, capfd):
    loader = ResumableLoader(
        ListedImages(data_root=str(folder), keys=["image"]),
        batch_size=2,
        shuffle=True,
        name="data.params.train",
        num_workers=2,
        worker_init_fn=_init_worker,
    )
    for _ in range(3):
        assert sum(len(batch["image"]) for batch in loader) == 5
    lines = [line for line in capfd.readouterr().err.splitlines() if "another image takes its place" in line]
    assert sorted(line.split('"')[1][-5:] for line in lines) == ["1.png", "2.png"]
    counted = "data.params.train: 2 of 5 images could not be read; others took their place"
    assert caplog.messages == [counted], "said once"


def _init_worker(worker_id):
    """Write the log lines of a worker to stderr."""
    import logging

    seed_worker(worker_id)
    logging.getLogger("ldm").addHandler(logging.StreamHandler())


def test_record_is_no_part_of_a_fingerprint(folder):
    from ldm.training.fingerprint import fingerprint

    dataset = ListedImages(data_root=str(folder))
    before = fingerprint(dataset)
    dataset.unreadable.set(4)
    dataset.unreadable.set(4)
    record = UnreadableFiles(3)
    assert not hasattr(record, "__dict__") and before == fingerprint(ListedImages(data_root=str(folder)))


# -- before training -------------------------------------------------------------------------------------------


def module(folder, target="ldm.data.lsun.LSUNBase", **params):
    train = {"target": target, "params": {"data_root": str(folder), "size": 8}}
    return DataModuleFromConfig(batch_size=1, num_workers=0, train=train, **params)


@pytest.mark.parametrize("wrap", [False, True])
def test_too_many_unreadable_files_stop_before_training(folder, wrap):
    with pytest.raises(UserError) as raised:
        module(folder, wrap=wrap).setup()
    message = str(raised.value)
    assert message.startswith(
        f"LSUNBase: 2 of 5 images cannot be read ({folder}/1.png, {folder}/2.png), more than max_unreadable (0.01) "
        "allows; remove or replace them, or raise max_unreadable; the first: cannot read the image "
    )
    assert "\n" not in message


def test_few_unreadable_files_are_one_log_line(folder, caplog):
    data = module(folder, max_unreadable=0.4)
    data.setup()
    assert caplog.messages == [
        f"LSUNBase: 2 of 5 images cannot be read and are left out: {folder}/1.png, {folder}/2.png"
    ]
    assert sum(len(batch["image"]) for batch in data._train_dataloader()) == 5
    assert len(caplog.messages) == 1, "they are not named again"


def test_check_can_be_left_out(folder, caplog):
    module(folder, max_unreadable=None).setup()
    assert not caplog.messages


def test_wrapped_data_sets_are_found(folder):
    inner = LSUNBase(data_root=str(folder), size=8)
    chain = torch.utils.data.ConcatDataset([torch.utils.data.Subset(inner, [0]), SuperResolution(inner, 8, "cv_area")])
    assert [each for each in wrapped(chain) if isinstance(each, ImageFiles)] == [inner]


def test_grey_values_of_16_bits_are_scaled(tmp_path):
    levels = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(levels).save(tmp_path / "x.png")
    assert np.abs(read_pixels(tmp_path / "x.png")[..., 0] - levels / 257).max() <= 0.5
