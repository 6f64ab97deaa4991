"""ImageNet as published: archives, lists and markers in miniature."""

from __future__ import annotations

import errno
import gzip
import io
import shutil
import sys
import tarfile

import numpy as np
import pytest
from images_on_disk import pixels, values
from PIL import Image

from ldm.config.instantiate import instantiate_from_config
from ldm.data import imagenet_files
from ldm.data.imagenet import ImageNetSRTrain, ImageNetTrain, ImageNetValidation
from ldm.errors import DiskFullError, UserError
from ldm.io import tar_archives
from taming.data import imagenet as taming_imagenet

SYNSETS = ["n01440764", "n01443537", "n02084071"]
VALIDATION = {
    "ILSVRC2012_val_00000001.JPEG": "n01443537",
    "ILSVRC2012_val_00000002.JPEG": "n01440764",
    "ILSVRC2012_val_00000003.JPEG": "n01443537",
}


def jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels(seed=seed)).save(buffer, format="JPEG", quality=95)
    return buffer.getvalue()


def decoded(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def tar(files: dict[str, bytes], **options: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def class_files(number: int) -> dict[str, bytes]:
    return {f"{SYNSETS[number]}_{i}.JPEG": jpeg(10 * number + i) for i in (18, 2)}


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Create the cache folder and return the folder of both splits."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    root = tmp_path / "autoencoders" / "data"
    for split in ("train", "validation"):
        (root / f"ILSVRC2012_{split}").mkdir(parents=True)
    return root


@pytest.fixture
def train(root):
    """Put the archive of the training images, which holds one archive for each class, into its folder."""
    files = {f"{synset}.tar": tar(class_files(number)) for number, synset in enumerate(SYNSETS)}
    (root / "ILSVRC2012_train" / "ILSVRC2012_img_train.tar").write_bytes(tar(files))
    return root / "ILSVRC2012_train"


@pytest.fixture
def validation(root):
    """Put the archive of the validation images and the list of their synsets into the folder."""
    folder = root / "ILSVRC2012_validation"
    files = {name: jpeg(number) for number, name in enumerate(VALIDATION)}
    (folder / "ILSVRC2012_img_val.tar").write_bytes(tar(files))
    (folder / "validation_synset.txt").write_text("".join(f"{name} {s}\n" for name, s in VALIDATION.items()))
    return folder


def test_training_archive_becomes_the_published_layout(train, caplog):
    config = {"target": "ldm.data.imagenet.ImageNetTrain", "params": {"config": {"size": 24}}}
    dataset = instantiate_from_config(config)
    names = [f"{synset}/{synset}_{i}.JPEG" for synset in SYNSETS for i in (18, 2)]
    assert (train / "filelist.txt").read_text() == "".join(f"{name}\n" for name in names)
    assert (train / ".ready").read_bytes() == b""
    assert {path.name for path in train.iterdir()} == {".ready", "filelist.txt", "data", "ILSVRC2012_img_train.tar"}
    assert (train / "data" / names[0]).read_bytes() == class_files(0)["n01440764_18.JPEG"]
    assert dataset.relpaths == names and dataset.class_labels == [0, 0, 1, 1, 2, 2]
    assert dataset[3]["image"].shape == (24, 24, 3) and dataset[3]["synsets"] == "n01443537"
    expected = "has 3 classes and 6 images; the complete set has 1000 classes and 1281167 images"
    assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == [f"ILSVRC2012_train {expected}"]


def test_published_attributes_name_the_layout(train):
    dataset = ImageNetTrain(config={"size": 24})
    assert dataset.root == str(train) and dataset.datadir == str(train / "data")
    assert dataset.txt_filelist == str(train / "filelist.txt") and dataset.expected_length == 1281167
    assert dataset.human_dict == str(train / "synset_human.txt") and dataset.idx2syn == str(train / "index_synset.yaml")
    assert np.array_equal(dataset.data[0]["image"].shape, (24, 24, 3)) and len(dataset.data) == 6
    assert dataset.human2integer_dict == {synset: number for number, synset in enumerate(SYNSETS)}
    assert taming_imagenet.ImageNetTrain({"size": 24}).relpaths == dataset.relpaths


def test_ready_folder_is_read_by_its_file_list(train):
    ImageNetTrain()
    (train / "ILSVRC2012_img_train.tar").unlink()
    (train / "filelist.txt").write_text("n01443537/n01443537_2.JPEG\n\nn01443537/n01443537_18.JPEG\n")
    dataset = ImageNetTrain()
    assert dataset.relpaths == ["n01443537/n01443537_2.JPEG", "n01443537/n01443537_18.JPEG"]
    assert np.array_equal(dataset[0]["image"], values(decoded(class_files(1)["n01443537_2.JPEG"])))


def test_archives_of_single_classes_are_unpacked(root):
    folder = root / "ILSVRC2012_train"
    (folder / "data").mkdir()
    (folder / "n01440764.tar").write_bytes(tar(class_files(0)))
    (folder / "data" / "n02084071.tar").write_bytes(tar(class_files(2)))
    assert ImageNetTrain().synsets == ["n01440764"] * 2 + ["n02084071"] * 2


def test_archives_may_lie_in_data_root(train, validation, tmp_path):
    root = tmp_path / "elsewhere"
    root.mkdir()
    shutil.move(train / "ILSVRC2012_img_train.tar", root)
    dataset = ImageNetTrain(data_root=str(root))
    assert dataset.datadir == str(root / "ILSVRC2012_train" / "data") and len(dataset) == 6
    assert len(ImageNetValidation(data_root=str(validation))) == 3


def test_interrupted_unpacking_is_continued(train, monkeypatch):
    extract, calls = imagenet_files.extract, []

    def interrupted(archive, entry, target):
        calls.append(entry.name)
        if len(calls) == 4:
            target.write_bytes(b"part")
            raise KeyboardInterrupt
        extract(archive, entry, target)

    monkeypatch.setattr(imagenet_files, "extract", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ImageNetTrain()
    assert not (train / ".ready").exists() and [path.name for path in (train / "data").iterdir()] == ["n01440764"]
    (train / "data" / ".1-abc.tmp").mkdir()  # as a process leaves that was killed
    calls += [""]
    assert len(ImageNetTrain()) == 6
    assert calls[5:] == [*class_files(1), *class_files(2)], "complete classes are not unpacked again"
    assert (train / "data/n01443537/n01443537_2.JPEG").read_bytes() == class_files(1)["n01443537_2.JPEG"]
    assert not list((train / "data").glob(".*"))


def test_validation_images_are_sorted_into_synsets(validation, caplog):
    dataset = ImageNetValidation(config={"size": 24})
    assert dataset.relpaths == [
        "n01440764/ILSVRC2012_val_00000002.JPEG",
        "n01443537/ILSVRC2012_val_00000001.JPEG",
        "n01443537/ILSVRC2012_val_00000003.JPEG",
    ]
    assert np.array_equal(dataset[1]["image"], values(decoded(jpeg(0))[:, 6:30])) and dataset.class_labels == [0, 1, 1]
    assert (validation / ".ready").exists() and "2 classes and 3 images" in caplog.text


def test_incomplete_validation_image_is_replaced(validation):
    partial = validation / "data/n01440764/ILSVRC2012_val_00000002.JPEG"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(b"part")
    ImageNetValidation()
    assert partial.read_bytes() == jpeg(1)


def test_validation_list_of_kaggle_is_read(validation):
    (validation / "validation_synset.txt").unlink()
    lines = [f"{name[:-5]},{synset} 1 2 30 40 {synset} 5 6 7 8\n" for name, synset in VALIDATION.items()]
    (validation / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + "".join(lines))
    assert ImageNetValidation().class_labels == [0, 1, 1]


def test_script_that_moves_validation_images_is_a_list(validation):
    (validation / "validation_synset.txt").unlink()
    lines = [f"mv {name} {synset}/\n" for name, synset in VALIDATION.items()]
    script = "#!/bin/bash\n# moves the images\nmkdir -p n01440764\n" + "".join(lines)
    (validation.parent / "valprep.sh").write_text(script)
    assert ImageNetValidation().class_labels == [0, 1, 1]


def write_devkit(path, numbers: str, **others: bytes) -> None:
    """Write the archive of the development kit: classes have numbers of their own, and parents have children."""
    savemat = pytest.importorskip("scipy.io").savemat
    names = [
        "ILSVRC2012_ID",
        "WNID",
        "words",
        "gloss",
        "num_children",
        "children",
        "wordnet_height",
        "num_train_images",
    ]
    rows = [(1, "n01443537", "goldfish", "", 0, 0, 0, 1300), (2, "n01440764", "tench", "", 0, 0, 0, 1300)]
    rows.append((1001, "n00001740", "entity", "", 2, 1, 1, 0))
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": np.array(rows, dtype=[(name, object) for name in names])})
    folder = "ILSVRC2012_devkit_t12/data"
    files = {f"{folder}/meta.mat": buffer.getvalue(), "ILSVRC2012_devkit_t12/readme.txt": b"read me"}
    files[f"{folder}/ILSVRC2012_validation_ground_truth.txt"] = numbers.encode()
    files.update({f"{folder}/{name.replace('__', '.')}": data for name, data in others.items()})
    path.write_bytes(gzip.compress(tar({name: data for name, data in files.items() if data})))


def test_development_kit_states_the_synsets(validation):
    (validation / "validation_synset.txt").unlink()
    write_devkit(validation / "ILSVRC2012_devkit_t12.tar.gz", "1\n2\n1\n")
    assert ImageNetValidation().relpaths == [
        "n01440764/ILSVRC2012_val_00000002.JPEG",
        "n01443537/ILSVRC2012_val_00000001.JPEG",
        "n01443537/ILSVRC2012_val_00000003.JPEG",
    ]


def test_damaged_development_kit_raises_user_error(validation, monkeypatch):
    (validation / "validation_synset.txt").unlink()
    path = validation / "ILSVRC2012_devkit_t12.tar.gz"
    for numbers, others, message in [
        ("1\n7\n", {}, r"ground_truth.txt in \".*\" is damaged \(7\)"),
        ("one\n", {}, r"ground_truth.txt in \".*\" is damaged"),
        ("1\n", {"meta__mat": b"no file of MATLAB"}, r"meta.mat in \".*\" is damaged"),
        ("1\n", {"meta__mat": b""}, r"does not contain meta.mat"),
    ]:
        write_devkit(path, numbers, **others)
        with pytest.raises(UserError, match=message) as raised:
            ImageNetValidation()
        assert "\n" not in str(raised.value)
    write_devkit(path, "1\n")
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(UserError, match="needs the package scipy; install it with pip install "):
        ImageNetValidation()


def test_differences_of_validation_list_and_archive_are_counted(validation, caplog):
    lines = [f"{name} n01443537\n" for name in [*list(VALIDATION)[:2], "ILSVRC2012_val_00000009.JPEG"]]
    (validation / "validation_synset.txt").write_text("".join(lines))
    assert len(ImageNetValidation()) == 2
    messages = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert messages[:2] == [
        '"ILSVRC2012_img_val.tar" has 1 image that "validation_synset.txt" lacks: ILSVRC2012_val_00000003.JPEG',
        '"validation_synset.txt" lists 1 image that "ILSVRC2012_img_val.tar" lacks: ILSVRC2012_val_00000009.JPEG',
    ]


def test_missing_or_invalid_validation_list_raises_user_error(validation):
    path = validation / "validation_synset.txt"
    for text, message in [
        ("other.JPEG n01443537\n", r'validation_synset.txt" lists no image of "ILSVRC2012_img_val.tar"'),
        ("a.JPEG n01443537\nb.JPEG ../../x\n", r'validation_synset.txt", line 2, must be such as "ILSVRC2012_val_0'),
        ("../a.JPEG n01443537\n", "line 1, must be such as"),
    ]:
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            ImageNetValidation()
    path.unlink()
    with pytest.raises(UserError, match=r"validation images are unknown: put validation_synset.txt, with lines") as e:
        ImageNetValidation()
    assert "\n" not in str(e.value) and not (validation / ".ready").exists()


def test_damaged_archives_raise_user_error(train):
    path = train / "ILSVRC2012_img_train.tar"
    whole = path.read_bytes()
    inner = tar({"n01440764.tar": tar(class_files(0))[:1500], "n01443537.tar": tar(class_files(1))})
    for data, message in [
        (b"not a tar archive" * 100, "is damaged or incomplete"),
        (whole[:20000], "is damaged or incomplete"),
        (whole[: 512 + 512 * -(-len(tar(class_files(0))) // 512)], 'is incomplete: it ends after "n01440764.tar"'),
        (inner, r"n01440764.tar\" is damaged or incomplete"),
        (tar({"readme.txt": b"x"}), "contains no images"),
    ]:
        path.write_bytes(data)
        with pytest.raises(UserError, match=message) as raised:
            ImageNetTrain()
        assert "\n" not in str(raised.value) and not (train / ".ready").exists()
    path.write_bytes(whole)
    assert len(ImageNetTrain()) == 6


@pytest.mark.parametrize("name", ["../outside.JPEG", "/tmp/outside.JPEG", "a/../../outside.JPEG"])
def test_entries_outside_of_the_folder_are_refused(train, name):
    inner = tar({"n01440764_1.JPEG": jpeg(0), name: jpeg(1)})
    (train / "ILSVRC2012_img_train.tar").write_bytes(tar({"n01440764.tar": inner}))
    with pytest.raises(UserError, match=r'n01440764.tar" is refused: its entry ".*outside.JPEG" leaves the folder'):
        ImageNetTrain()
    assert not list(train.parent.rglob("outside*")) and not list((train / "data").iterdir())


def test_links_in_archives_are_refused(train):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        link = tarfile.TarInfo("n01440764_1.JPEG")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    (train / "ILSVRC2012_img_train.tar").write_bytes(tar({"n01440764.tar": buffer.getvalue()}))
    with pytest.raises(UserError, match=r"is refused: its entry .* is a link or a device"):
        ImageNetTrain()


def test_full_disk_is_one_line(train, monkeypatch):
    monkeypatch.setattr(tar_archives.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 0, 1000))
    with pytest.raises(DiskFullError, match=r'unpacking "ILSVRC2012_img_train.tar" needs 0.0 GB in') as raised:
        ImageNetTrain()
    assert "\n" not in str(raised.value)
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(train.parents[2]))

    def full(source, target, block):
        target.write(b"part")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tar_archives.shutil, "copyfileobj", full)
    with pytest.raises(DiskFullError, match="No space left on device") as raised:
        ImageNetTrain()
    assert "\n" not in str(raised.value) and not list((train / "data").iterdir())


def test_known_broken_and_listed_files_are_left_out(train, tmp_path):
    shutil.rmtree(train)
    folder = train / "data" / "n06596364"
    folder.mkdir(parents=True)
    for number in (9590, 9591, 9592, 9593):
        (folder / f"n06596364_{number}.JPEG").write_bytes(jpeg(0))
    assert [path[-9:] for path in ImageNetTrain().relpaths] == ["9590.JPEG", "9592.JPEG", "9593.JPEG"]
    config = {"ignore": ["n06596364_9590.JPEG", "n06596364/n06596364_9592.JPEG"]}
    assert [path[-9:] for path in ImageNetTrain(config=config).relpaths] == ["9593.JPEG"]
    (tmp_path / "ignore.txt").write_text("n06596364_9593.JPEG\n")
    assert len(ImageNetTrain(config={"ignore": str(tmp_path / "ignore.txt")})) == 2
    with pytest.raises(UserError, match="ignore and sub_indices leave no image"):
        ImageNetTrain(config={"ignore": [f"n06596364_{number}.JPEG" for number in (9590, 9592, 9593)]})


def test_index_of_synsets_numbers_the_classes(train):
    (train / "index_synset.yaml").write_text("0: n01440764\n1: n99999999\n2: n02084071\n5: n01443537\n")
    chosen = ImageNetTrain(config={"sub_indices": "2, 5"})
    assert chosen.synset2idx == {"n01443537": 0, "n02084071": 1}
    original = ImageNetTrain(config={"sub_indices": "2, 5", "keep_orig_class_label": True})
    assert original.synset2idx == {"n01443537": 5, "n02084071": 2} and original.class_labels == [5, 5, 2, 2]
    assert ImageNetTrain(config={"keep_orig_class_label": True}).class_labels == [0, 0, 5, 5, 2, 2]
    with pytest.raises(UserError, match="has no synset for the index 3 of sub_indices"):
        ImageNetTrain(config={"sub_indices": "2-3"})
    (train / "index_synset.yaml").write_text("0: n01440764\n")
    with pytest.raises(UserError, match="does not list n01443537, the synset of a folder"):
        ImageNetTrain(config={"keep_orig_class_label": True})


def test_published_section_of_a_class_sets_its_crop(train):
    config = {"size": 24, "ImageNetTrain": {"random_crop": False}, "ImageNetValidation": {"random_crop": True}}
    dataset = ImageNetTrain(config=config)
    assert not dataset.random_crop and len({dataset[0]["image"].tobytes() for _ in range(10)}) == 1
    assert dataset.config == {"size": 24, "random_crop": False}
    with pytest.raises(UserError, match="ImageNetTrain in config is not a mapping"):
        ImageNetTrain(config={"ImageNetTrain": 3})


def test_numbers_of_labels_are_read_from_the_published_file(train):
    (train / "imagenet1000_clsidx_to_labels.txt").write_text("{0: 'tench, Tinca tinca',\n 1: \"crow's nest\"}\n")
    assert ImageNetTrain().human2integer_dict == {"tench, Tinca tinca": 0, "crow's nest": 1}


@pytest.mark.parametrize("suffix", [".p", ".npy", ".txt"])
def test_published_list_selects_images_for_super_resolution(train, tmp_path, monkeypatch, suffix):
    import pickle

    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / f"imagenet_train_hr_indices{suffix}"
    if suffix == ".p":
        path.write_bytes(pickle.dumps([4, 1]))
    elif suffix == ".npy":
        np.save(path, np.array([4, 1]))
    else:
        path.write_text("4\n1\n")
    dataset = ImageNetSRTrain(size=16, degradation="pil_bicubic")
    names = ["n02084071/n02084071_18.JPEG", "n01440764/n01440764_2.JPEG"]
    assert [dataset[index]["relpath"] for index in range(len(dataset))] == names
    assert len(ImageNetSRTrain(size=16, degradation="pil_bicubic", data_root=str(train))) == 6
    again = ImageNetSRTrain(size=16, degradation="pil_bicubic", data_root=str(train), indices=str(path))
    assert [again[index]["relpath"] for index in range(len(again))] == names


def test_list_of_other_images_raises_user_error(train, tmp_path):
    for text, message in (("6", "has the index 6, but there are 6 images"), ("", "is empty")):
        (tmp_path / "list.txt").write_text(text)
        with pytest.raises(UserError, match=f'list.txt" {message}; give the list that belongs to the images'):
            ImageNetSRTrain(size=16, degradation="cv_area", indices=str(tmp_path / "list.txt"))
    with pytest.raises(UserError, match="there is no list of indices"):
        ImageNetSRTrain(size=16, degradation="cv_area", indices=str(tmp_path / "none.txt"))


def test_missing_archive_raises_user_error_with_its_place(root):
    with pytest.raises(UserError, match=r"ILSVRC2012_validation/data.*or put ILSVRC2012_img_val.tar into") as raised:
        ImageNetValidation()
    assert str(root / "ILSVRC2012_validation") in str(raised.value) and "\n" not in str(raised.value)
