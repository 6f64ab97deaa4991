"""Sets of images: folders, NPZ archives, data sets of configurations, and bad input."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest
from feature_networks import random_images, write_images
from PIL import Image
from torch.utils.data import IterableDataset

from ldm.errors import UserError
from ldm.evaluation.data_sets import DatasetImages, configured_images
from ldm.evaluation.image_sets import ImageArchive, ImageFolder, open_images


def pixels_of(images, batch_size=3):
    batches = list(images.batches(batch_size))
    return [name for names, _ in batches for name in names], np.concatenate([pixels for _, pixels in batches])


def test_folder_yields_images_in_the_order_of_names(tmp_path):
    images = random_images(7)
    write_images(tmp_path / "a/b", images[:3])
    write_images(tmp_path / "a", images[3:], "x")
    names, pixels = pixels_of(open_images(tmp_path / "a"))
    assert names == ["b/000.png", "b/001.png", "b/002.png", "x000.png", "x001.png", "x002.png", "x003.png"]
    np.testing.assert_array_equal(pixels, images)


def test_archive_yields_the_images_of_its_array(tmp_path):
    images = random_images(5)
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "x.npz", arr_0=images, seeds=np.arange(5))
        found = open_images(tmp_path / "x.npz")
        assert len(found) == 5
        assert found.size() == "16 × 16"
        np.testing.assert_array_equal(pixels_of(found)[1], images)


def test_limit_uses_the_first_images(tmp_path):
    images = random_images(5)
    np.savez(tmp_path / "x.npz", arr_0=images)
    for found in (open_images(tmp_path / "x.npz", limit=3), ImageFolder(write_images(tmp_path / "f", images), limit=3)):
        assert len(found) == 3
        np.testing.assert_array_equal(pixels_of(found)[1], images[:3])
    for path in ("x.npz", "f"):
        with pytest.raises(UserError, match="5 images, fewer than --n 6"):
            len(open_images(tmp_path / path, limit=6))


def test_size_uses_the_resized_centre_of_any_image(tmp_path):
    Image.new("L", (40, 20), 90).save(tmp_path / "grey.png")
    Image.new("RGB", (20, 30), (10, 20, 30)).save(tmp_path / "colour.png")
    found = open_images(tmp_path, size=8)
    _, pixels = pixels_of(found)
    assert pixels.shape == (2, 8, 8, 3)
    assert {tuple(pixel) for pixel in pixels.reshape(-1, 3)} == {(10, 20, 30), (90, 90, 90)}
    assert found.preparation == "centred square, Lanczos to 8 px, RGB"


def test_configuration_yields_the_images_of_its_data_set(tmp_path):
    images = random_images(4, size=20)
    write_images(tmp_path / "photos", images)
    config = tmp_path / "c.yaml"
    target = "ldm.data.folder.FolderValidation"
    config.write_text(
        f"data:\n  params:\n    validation:\n      target: {target}\n"
        f"      params: {{data_root: {tmp_path / 'photos'}, size: 20}}\n"
    )
    found = configured_images(config, "validation")
    np.testing.assert_array_equal(pixels_of(found)[1], images)
    assert target in found.preparation and '"size": 20' in found.preparation
    with pytest.raises(UserError, match=r"has no data.params.train; choose another --split"):
        configured_images(config, "train")


def test_random_crops_of_a_configuration_depend_on_its_seed_alone(tmp_path):
    write_images(tmp_path / "photos", random_images(3, size=40))
    config = tmp_path / "c.yaml"
    config.write_text(
        "data:\n  params:\n    train:\n      target: ldm.data.folder.FolderTrain\n"
        f"      params: {{data_root: {tmp_path / 'photos'}, size: 16}}\n"
    )
    state = np.random.get_state()[1].copy()
    first, second = (pixels_of(configured_images(config, "train"))[1] for _ in range(2))
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(np.random.get_state()[1], state)
    assert not np.array_equal(
        first, pixels_of(DatasetImages(configured_images(config, "train").dataset, "x", seed=7))[1]
    )


class Stream(IterableDataset):
    """Stream of five images."""

    def __iter__(self):
        return iter([{"image": np.full((4, 4, 3), index / 4 - 1, np.float32)} for index in range(5)])


def test_stream_needs_a_number_of_images_and_is_not_cached():
    found = DatasetImages(Stream(), "x", limit=3)
    assert len(found) == 3 and found.key() is None
    assert [int(pixels.mean()) for pixels in pixels_of(found)[1]] == [0, 31, 63]
    with pytest.raises(UserError, match="x is a stream without an end; give its number of images"):
        DatasetImages(Stream(), "x")
    with pytest.raises(UserError, match="x ends after 5 images; ask for fewer"):
        pixels_of(DatasetImages(Stream(), "x", limit=6))


def test_key_changes_with_files_and_preparation(tmp_path):
    folder = write_images(tmp_path / "f", random_images(3))
    keys = {open_images(folder).key(), open_images(folder, size=8).key(), open_images(folder, limit=2).key()}
    assert len(keys) == 3
    assert open_images(folder).key() in keys
    write_images(folder, random_images(1, seed=9))
    assert open_images(folder).key() not in keys


def folder_with(tmp_path, image):
    write_images(tmp_path, random_images(1))
    image.save(tmp_path / "odd.png")
    return tmp_path


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.new("L", (16, 16)), 'odd.png" is grey; convert it to RGB, or use --size'),
        (Image.new("LA", (16, 16)), 'odd.png" is grey; convert it to RGB, or use --size'),
        (Image.fromarray(np.zeros((16, 16), np.uint16)), 'odd.png" has 16 or 32 bits; convert it to RGB with 8 bits'),
        (Image.new("RGBA", (16, 16)), 'odd.png" has the mode RGBA, not RGB; convert it'),
        (
            Image.new("RGB", (16, 12)),
            r"different sizes: 16 × 16 \(000.png\) and 16 × 12 \(odd.png\); give images",
        ),
    ],
)
def test_odd_image_raises_user_error(tmp_path, image, message):
    with pytest.raises(UserError, match=message) as caught:
        pixels_of(open_images(folder_with(tmp_path, image)))
    assert "\n" not in str(caught.value)


def test_damaged_image_raises_user_error(tmp_path):
    write_images(tmp_path, random_images(1))
    (tmp_path / "odd.png").write_bytes((tmp_path / "000.png").read_bytes()[:100])
    with pytest.raises(UserError, match=r'cannot read the image ".*odd.png"'):
        pixels_of(open_images(tmp_path))


def test_missing_and_empty_paths_raise_user_error(tmp_path):
    with pytest.raises(UserError, match="there is no image in"):
        len(open_images(tmp_path))
    with pytest.raises(UserError, match="neither a folder of images nor an NPZ file"):
        open_images(tmp_path / "nothing")
    with pytest.raises(UserError, match="there is no archive"):
        ImageArchive(tmp_path / "nothing.npz")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros((2, 4, 4, 3), np.uint8)}, r'no array "arr_0" of images \(arrays: x\)'),
        ({"arr_0": np.zeros((2, 4, 4, 3), np.float32)}, r"of float32 and shape .*; images need \(N, H, W, 3\) uint8"),
        ({"arr_0": np.zeros((2, 4, 4, 1), np.uint8)}, r"images need \(N, H, W, 3\) uint8"),
        ({"arr_0": np.zeros((0, 4, 4, 3), np.uint8)}, r"images need \(N, H, W, 3\) uint8"),
        ({"arr_0": np.array([None], object)}, "cannot read the archive .* it contains Python objects"),
    ],
)
def test_archive_of_other_arrays_raises_user_error(tmp_path, arrays, message):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(UserError, match=message):
        ImageArchive(tmp_path / "x.npz")


@pytest.mark.parametrize("part", [0.3, 0.95])
def test_truncated_archive_raises_user_error(tmp_path, part):
    np.savez(tmp_path / "x.npz", arr_0=random_images(20))
    content = (tmp_path / "x.npz").read_bytes()
    (tmp_path / "x.npz").write_bytes(content[: int(part * len(content))])
    with pytest.raises(UserError, match=r"cannot read the archive .* it is damaged or not an NPZ file"):
        pixels_of(ImageArchive(tmp_path / "x.npz"))


def test_archive_with_changed_bytes_raises_user_error(tmp_path):
    np.savez(tmp_path / "x.npz", arr_0=random_images(20))
    content = bytearray((tmp_path / "x.npz").read_bytes())
    content[5000] ^= 255
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"cannot read the archive .* Bad CRC-32"):
        pixels_of(ImageArchive(tmp_path / "x.npz"))


# -- shards ------------------------------------------------------------------------------------------------------


def write_shards(folder, images, each=3):
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(images), each):
        with tarfile.open(folder / f"{start // each:03}.tar", "w") as archive:
            for number, pixels in enumerate(images[start : start + each], start):
                buffer = io.BytesIO()
                Image.fromarray(pixels).save(buffer, "PNG")
                for name, content in ((f"{number:04}.png", buffer.getvalue()), (f"{number:04}.txt", b"a caption")):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))
    return str(folder / "{000..002}.tar")


def test_shards_yield_images_in_order(tmp_path):
    images = random_images(8)
    found = open_images(write_shards(tmp_path, images))
    assert len(found) == 8 and found.size() == "16 × 16"
    names, pixels = pixels_of(found)
    np.testing.assert_array_equal(pixels, images)
    assert names[3] == f"{tmp_path}/001.tar/0003.png"
    np.testing.assert_array_equal(np.stack([each for _, each in found.images(5)]), images[5:])
    assert len(open_images(found.pattern, limit=4)) == 4
    assert pixels_of(open_images(found.pattern, size=8))[1].shape == (8, 8, 8, 3)
    assert len({found.key(), open_images(found.pattern, limit=4).key(), open_images(found.pattern, size=8).key()}) == 3
    with pytest.raises(UserError, match="has 8 images, fewer than --n 9"):
        len(open_images(found.pattern, limit=9))


def test_damaged_missing_and_empty_shards_raise_user_error(tmp_path):
    pattern = write_shards(tmp_path, random_images(8))
    content = (tmp_path / "001.tar").read_bytes()
    (tmp_path / "001.tar").write_bytes(content[:700])
    with pytest.raises(UserError, match=r'the shard ".*001.tar" is damaged: .*; replace it'):
        pixels_of(open_images(pattern))
    (tmp_path / "001.tar").unlink()
    with pytest.raises(UserError):
        pixels_of(open_images(pattern))
    with tarfile.open(tmp_path / "empty.tar", "w") as archive:
        archive.add(tmp_path / "000.tar", "x.txt")
    with pytest.raises(UserError, match="there is no image in"):
        len(open_images(tmp_path / "empty.tar"))
