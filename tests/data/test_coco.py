"""COCO: captions, and boxes of things and stuff, from miniatures of its files."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from annotated_sets import COCO_THINGS, coco_box, write_coco
from images_on_disk import values
from PIL import Image

from ldm.data import coco
from ldm.errors import UserError


@pytest.fixture
def root(tmp_path):
    """Write both splits and return their folder."""
    write_coco(tmp_path / "coco")
    write_coco(tmp_path / "coco", "val2017")
    return tmp_path / "coco"


def layout(dataset, index):
    """Return the names of the class tokens of an item, and its boxes in the whole image."""
    found = dataset.builders["coordinates_bbox"].decode(dataset[index]["coordinates_bbox"], relative_to_crop=False)
    tokens = found.labels + len(dataset.classes) * found.attributes
    return [dataset.class_names[token] for token in tokens], found.boxes


def test_boxes_of_things_and_stuff(root):
    dataset = coco.CocoBBoxTrain(16, str(root), crop_method="none", random_flip=False)
    assert dataset.classes.ids == ("1", "124", "157", "18"), "ids are texts in the published order"
    assert dataset.classes.names == ("person", "grass", "sky-other", "dog")
    names, boxes = layout(dataset, 0)
    assert names == ["sky-other", "dog", "person (group)"]
    assert boxes == pytest.approx(np.array([[0, 0, 1, 0.5], [0, 0, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5]]), abs=0.012)
    item = dataset[1]
    assert item["image_id"] == "25" and item["image"].shape == (16, 16, 3) and item["coordinates_bbox"].shape == (92,)


def test_things_alone_and_limits(root):
    things = coco.CocoBBoxTrain(16, str(root), use_stuff=False, min_objects_per_image=1, crop_method="none")
    assert things.classes.names == ("person", "dog") and len(things) == 2
    assert len(coco.CocoBBoxTrain(16, str(root), use_stuff=False)) == 1, "the other image has one thing"
    stuff = coco.CocoBBoxValidation(16, str(root), use_things=False, min_objects_per_image=1)
    assert stuff.classes.names == ("grass", "sky-other") and stuff.crop_method == "center" and stuff.flip_p == 0
    chosen = coco.CocoBBoxTrain(16, str(root), category_allow_list_target=["dog"], min_objects_per_image=1)
    assert [item["image_id"] for item in (chosen[0],)] == ["9"] and len(chosen) == 1


def test_images_may_lie_in_a_folder_of_images(root):
    (root / "images").mkdir()
    (root / "train2017").rename(root / "images/train2017")
    assert len(coco.CocoBBoxTrain(16, str(root))) == 2


def test_faults_of_boxes_are_counted_in_one_line(tmp_path, caplog):
    things = [
        *COCO_THINGS,
        coco_box(10, 9, 1, [0.0, 0.0, 0.0, 5.0]),
        coco_box(11, 9, 1, [30.0, 0.0, 60.0, 5.0]),
        coco_box(12, 77, 1, [0.0, 0.0, 5.0, 5.0]),
        {**coco_box(13, 9, 1, [0.0, 0.0, 5.0, 5.0]), "bbox": [1.0]},
    ]
    write_coco(tmp_path, things=things)
    (tmp_path / "train2017/000000000025.jpg").unlink()
    dataset = coco.CocoBBoxTrain(16, str(tmp_path), use_stuff=False)
    source = tmp_path / "annotations/instances_train2017.json"
    assert [record.getMessage() for record in caplog.records] == [
        f'"{source}": left out boxes of unknown images: 1 (id 12); annotations without a box: 1 (id 13); '
        "boxes outside their image: 1 (id 11); empty boxes: 1 (id 10)"
    ]
    assert len(dataset) == 1


def test_missing_images_are_counted(root, caplog):
    (root / "train2017/000000000025.jpg").unlink()
    assert len(coco.CocoBBoxTrain(16, str(root))) == len(coco.CocoCaptionsTrain(16, data_root=str(root))) == 1
    boxes, captions = (record.getMessage() for record in caplog.records)
    assert boxes.endswith("left out images whose files are missing: 1 (25)")
    assert captions.endswith("left out images that are missing: 1 (000000000025.jpg)")


def test_captions(root):
    dataset = coco.CocoCaptionsValidation(16, data_root=str(root))
    item = dataset[0]
    assert item["caption"] == "A dog under the sky." and item["image_id"] == 9
    photo = np.asarray(Image.open(root / "val2017/000000000009.jpg").resize((24, 16), Image.Resampling.BICUBIC))
    assert item["image"] == pytest.approx(values(photo[:, 4:20]), abs=0.05)
    train = coco.CocoCaptionsTrain(24, crop_size=16, data_root=str(root))
    torch.manual_seed(0)
    items = [train[0] for _ in range(20)]
    assert {each["caption"] for each in items} == {"A dog under the sky.", "Dog and people."}
    assert {each["image"].shape for each in items} == {(16, 16, 3)}
    assert len({each["image"].tobytes() for each in items}) > 10


def test_images_without_captions_are_counted(root, caplog):
    path = root / "annotations/captions_train2017.json"
    content = json.loads(path.read_text())
    content["annotations"][1]["caption"] = " "
    content["annotations"][2]["image_id"] = 77
    path.write_text(json.dumps(content))
    dataset = coco.CocoCaptionsTrain(16, data_root=str(root))
    assert dataset.captions == [["A dog under the sky."]]
    assert [record.getMessage() for record in caplog.records] == [
        f'"{path}": left out images without a caption: 1 (000000000025.jpg); captions of unknown images: 1 (77)'
    ]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("instances_train2017.json", "{", "cannot read the annotations"),
        ("instances_train2017.json", "[]", 'have no list "images"'),
        ("instances_train2017.json", '{"images": [1]}', 'have no list "images"'),
        ("stuff_train2017.json", '{"images": [], "annotations": []}', 'have no list "categories"'),
        ("stuff_train2017.json", None, "there is no file of annotations"),
    ],
)
def test_damaged_files_raise_user_error(file, content, message, root):
    path = root / "annotations" / file
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message) as raised:
        coco.CocoBBoxTrain(16, str(root))
    assert "\n" not in str(raised.value) and file in str(raised.value)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"data_path": "none"}, 'there is no folder "none"'),
        ({"split": "test"}, 'COCO has no split "test"'),
        ({"use_things": False, "use_stuff": False}, "set use_things or use_stuff to true"),
        ({"category_allow_list_target": ["dogs"]}, 'has no class "dogs" \\(did you mean "dog"'),
        ({"min_objects_per_image": 9}, "names no image that exists and has enough boxes"),
    ],
    ids=str,
)
def test_invalid_parameters_raise_user_error(params, message, root):
    with pytest.raises(UserError, match=message):
        coco.CocoBBoxTrain(**{"size": 16, "data_path": str(root), **params})


def test_missing_folder_of_images_raises_user_error(root):
    for path in (root / "train2017").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"has no image with a caption .*images that are missing: 2"):
        coco.CocoCaptionsTrain(16, data_root=str(root))
    (root / "train2017").rmdir()
    with pytest.raises(UserError, match=f'there is no folder "{root}/train2017" of COCO'):
        coco.CocoCaptionsTrain(16, data_root=str(root))
