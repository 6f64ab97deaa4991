"""OpenImages: crops and pairs from folders, and boxes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from annotated_sets import CAR, DOG, MAN, PERSON, WOMAN, box_row, write_open_images, write_photo
from images_on_disk import values, write
from omegaconf import OmegaConf
from PIL import Image

from ldm.config.instantiate import instantiate_from_config
from ldm.data import openimages, openimages_boxes
from ldm.data.object_classes import TopClasses
from ldm.errors import UserError
from taming.data import open_images_helper

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Create the published folders; return the pixels of the validation image."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data/openimages/train/x.png")
    return write(tmp_path / "data/openimages/validation/x.png")


def test_training_crops_are_random_and_validation_crops_are_central(folder):
    item = openimages.FullOpenImagesValidation(crop_size=16)[0]
    assert np.array_equal(item["image"], values(folder[4:20, 10:26]))
    assert item["relative_file_path_"] == "x.png"
    dataset = openimages.FullOpenImagesTrain(crop_size=16)
    torch.manual_seed(0)
    images = [dataset[0]["image"] for _ in range(20)]
    assert {image.shape for image in images} == {(16, 16, 3)} and len({image.tobytes() for image in images}) > 10


def test_image_is_resized_before_cropping(folder):
    image = openimages.FullOpenImagesValidation(size=12, crop_size=8)[0]["image"]
    means = folder.reshape(12, 2, 18, 2, 3).mean(axis=(1, 3))[2:10, 5:13]
    assert (image + 1) * 127.5 == pytest.approx(means, abs=0.51)
    assert openimages.FullOpenImagesValidation(size=12)[0]["image"].shape == (12, 12, 3)
    assert openimages.FullOpenImagesValidation(crop_size=64)[0]["image"].shape == (64, 64, 3)


def test_super_resolution_pairs_with_published_parameters(folder):
    params = {"degradation": "bsrgan_light", "downscale_f": 4, "min_crop_f": 0.5, "max_crop_f": 1.0}
    for kind in (openimages.SuperresOpenImagesAdvancedTrain, openimages.SuperresOpenImagesAdvancedValidation):
        item = kind(size=16, random_crop=True, **params)[0]
        assert item["image"].shape == (16, 16, 3) and item["LR_image"].shape == (4, 4, 3)


BOXES = [
    box_row("0000000000000000", MAN, 0.0, 0.5, 0.0, 1.0),
    box_row("0000000000000000", CAR, 0.5, 0.75, 0.5, 1.0, group=1),
    box_row("0000000000000001", DOG, 0.25, 0.5, 0.25, 0.5),
    box_row("0000000000000000", DOG, 0.0, 0.005, 0.0, 0.005),  # smaller than the limit
    box_row("0000000000000001", WOMAN, 0.0, 1.0, 0.0, 1.0, occluded=1),
    box_row("0000000000000002", DOG, 0.0, 1.0, 0.0, 1.0),  # a single box
]


def boxes_of(dataset, index=0):
    """Return the names of the class tokens of an item, and its boxes in the whole image."""
    found = dataset.builders["coordinates_bbox"].decode(dataset[index]["coordinates_bbox"], relative_to_crop=False)
    tokens = found.labels + len(dataset.classes) * found.attributes
    return [dataset.class_names[token] for token in tokens], found


def test_items_have_image_and_tokens(tmp_path):
    write_open_images(tmp_path, BOXES)
    dataset = openimages.OpenImagesBBoxTrain(size=16, data_path=str(tmp_path), random_flip=False, crop_method="none")
    assert len(dataset) == 2 and dataset.classes.names == ("Person", "Woman", "Man", "Dog", "Car", "Suitcase")
    item = dataset[0]
    assert item["image"].shape == (16, 16, 3) and item["image"].dtype == np.float32
    assert item["coordinates_bbox"].shape == (92,) and item["image_id"] == "0000000000000000"
    assert item["file_path_"] == str(tmp_path / "train/0000000000000000.jpg")
    names, found = boxes_of(dataset)
    assert names == ["Man", "Car (group)"]
    assert found.boxes == pytest.approx(np.array([[0, 0, 0.5, 1], [0.5, 0.5, 0.25, 0.5]]), abs=0.6 / 89 * 2)
    assert boxes_of(dataset, 1)[0] == ["Woman", "Dog"]


@pytest.mark.parametrize("name", ["my cat", "00000000000000ab", "a_name_of_more_than_16_letters"])
def test_images_may_have_names_of_any_length(name, tmp_path):
    ids = (name.lstrip("0"), "2")  # some tools write ids without their leading zeros
    write_open_images(tmp_path, [box_row(i, kind, 0.0, 0.5, 0.0, 1.0) for i in ids for kind in (DOG, MAN)])
    write_photo(tmp_path / f"train/{name}.jpg")
    dataset = openimages.OpenImagesBBoxTrain(size=16, data_path=str(tmp_path))
    assert {Path(dataset[i]["file_path_"]).stem for i in range(len(dataset))} == {name, "0000000000000002"}


def test_published_configuration_reads_the_default_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_open_images(tmp_path / "data/openimages", BOXES)
    write_open_images(tmp_path / "data/openimages", BOXES, "validation")
    config = OmegaConf.load(ROOT / "models/ldm/layout2img-openimages256/config.yaml").data.params
    for split, crop_method in (("train", "random-2d"), ("validation", "center")):
        dataset = instantiate_from_config(config[split])
        assert dataset[1]["image"].shape == (256, 256, 3) and dataset.crop_method == crop_method
    assert dataset.flip_p == 0 and torch.equal(dataset[0]["coordinates_bbox"], dataset[0]["coordinates_bbox"])


def test_crop_and_mirror_image_agree_with_the_boxes(tmp_path):
    """Check that a box around a white part holds white pixels in every random view."""
    write_open_images(tmp_path, [box_row("0000000000000000", DOG, 0.5, 0.75, 0.25, 0.75)] * 2, images=0)
    array = np.zeros((64, 96, 3), np.uint8)
    array[16:48, 48:72] = 255
    (tmp_path / "train").mkdir()
    Image.fromarray(array).save(tmp_path / "train/0000000000000000.png")
    dataset = openimages.OpenImagesBBoxTrain(size=32, data_path=str(tmp_path), min_objects_per_image=1)
    torch.manual_seed(0)
    seen = 0
    for _ in range(40):
        item = dataset[0]
        layout = dataset.builders["coordinates_bbox"].decode(item["coordinates_bbox"])
        if not len(layout.boxes):
            continue
        x, y, width, height = layout.boxes[0]
        columns, rows = ((np.arange(32) + 0.5) / 32 for _ in range(2))
        inside = ((columns > x + 0.05) & (columns < x + width - 0.05))[None] & (
            (rows > y + 0.05) & (rows < y + height - 0.05)
        )[:, None]
        outside = ((columns < x - 0.05) | (columns > x + width + 0.05))[None] | (
            (rows < y - 0.05) | (rows > y + height + 0.05)
        )[:, None]
        assert (item["image"][inside] > 0.9).all() and (item["image"][outside] < -0.9).all()
        seen += bool(inside.any())
    assert seen > 20


def test_selection_and_merging_of_classes(tmp_path):
    write_open_images(tmp_path, BOXES)
    (tmp_path / "names.txt").write_text("Person\nDog\n")
    params = {"data_path": str(tmp_path), "size": 16, "crop_method": "none", "random_flip": False}
    unify = "taming.data.open_images_helper.open_images_unify_categories_for_coco"
    dataset = openimages.OpenImagesBBoxTrain(
        **params, category_allow_list_target=str(tmp_path / "names.txt"), category_mapping_target=unify
    )
    assert dataset.classes.names == ("Person", "Dog") and len(dataset) == 1
    assert boxes_of(dataset)[0] == ["Person", "Dog"], "the women are persons"
    merged = openimages.OpenImagesBBoxTrain(**params, merge_into=["Person"])
    assert merged.classes.names == ("Person", "Dog", "Car", "Suitcase")
    assert boxes_of(merged)[0] == ["Person", "Car (group)"]
    alone = openimages.OpenImagesBBoxTrain(**params, group_boxes=False, min_objects_per_image=1)
    assert boxes_of(alone)[0] == ["Man"]


def test_equal_boxes_count_once_after_merging(tmp_path):
    rows = [*(box_row("0000000000000000", label, 0, 0.5, 0, 0.5) for label in (MAN, PERSON)), BOXES[1]]
    write_open_images(tmp_path, rows)
    dataset = openimages.OpenImagesBBoxTrain(16, str(tmp_path), merge_into=["Person"], crop_method="none")
    assert sorted(boxes_of(dataset)[0]) == ["Car (group)", "Person"]


def test_most_frequent_classes_are_counted_in_the_training_boxes(tmp_path, monkeypatch):
    write_open_images(tmp_path, BOXES)
    write_open_images(tmp_path, [BOXES[0], BOXES[1]], "validation")
    monkeypatch.setattr(open_images_helper, "top_300_classes_plus_coco_compatibility", TopClasses(1, ("car", "Zebra")))
    target = "taming.data.open_images_helper.top_300_classes_plus_coco_compatibility"
    dataset = openimages.OpenImagesBBoxValidation(
        16, str(tmp_path), category_allow_list_target=target, min_objects_per_image=1
    )
    assert dataset.classes.names == ("Dog", "Car") and boxes_of(dataset)[0] == ["Car (group)"]


def test_images_are_found_at_any_depth(tmp_path):
    write_open_images(tmp_path, [row.replace("0000000000000000", "0") for row in BOXES], folder="images/train/train_0")
    assert len(openimages.OpenImagesBBoxTrain(16, str(tmp_path))) == 2


def test_faults_of_the_boxes_are_counted_in_one_line(tmp_path, caplog):
    rows = [
        *BOXES,
        box_row("0000000000000000", DOG, 0.5, 0.5, 0.0, 1.0),
        box_row("0000000000000000", DOG, 0.5, 1.5, 0.0, 1.0),
        box_row("0000000000000000", DOG, -0.004, 1.004, 0.0, 1.0),  # rounding: clipped
        "0000000000000000,xclick,/m/0bt9lr,1,zero",
        box_row("0000000000000000", "/m/unknown", 0.0, 0.5, 0.0, 1.0),
        *(box_row("00000000000000ff", DOG, 0.0, 0.5, 0.0, y) for y in (0.5, 1.0)),
    ]
    write_open_images(tmp_path, rows)
    dataset = openimages.OpenImagesBBoxTrain(16, str(tmp_path), crop_method="none", random_flip=False)
    lines = [record.getMessage() for record in caplog.records]
    source = tmp_path / "oidv6-train-annotations-bbox.csv"
    assert lines == [
        f'"{source}": left out rows that cannot be read: 1 (row 10); boxes outside their image: 1 (row 8); '
        "empty boxes: 1 (row 7); boxes of unknown classes: 1 (/m/unknown)",
        f'"{source}": left out images whose files are missing: 1 (00000000000000ff)',
    ]
    names, found = boxes_of(dataset)
    assert names[0] == "Dog" and found.boxes[0].tolist() == [0, 0, 1, 1]


def test_other_forms_of_the_files_are_read(tmp_path):
    """Read the class list of version 7, which has a header, and boxes without attributes, with CRLF and a mark."""
    write_open_images(tmp_path, BOXES)
    names = tmp_path / "class-descriptions-boxable.csv"
    lines = ["LabelName,DisplayName", *names.read_text().splitlines()]
    (tmp_path / "oidv7-class-descriptions-boxable.csv").write_text("\n".join(lines))
    names.unlink()
    (tmp_path / "oidv6-train-annotations-bbox.csv").unlink()
    rows = ["ImageID,XMin,XMax,YMin,YMax,LabelName"]
    rows += [f"0000000000000000,{x},{x + 0.5},0,1,{label}" for x, label in ((0, DOG), (0.25, CAR), (0.5, MAN))]
    data = "\r\n".join(rows).encode("utf-8-sig")
    (tmp_path / "train-annotations-bbox.csv").write_bytes(data)
    dataset = openimages.OpenImagesBBoxTrain(16, str(tmp_path), crop_method="none", random_flip=False)
    assert boxes_of(dataset)[0] == ["Dog", "Car", "Man"]


def test_large_files_are_read_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(openimages_boxes, "CACHED_FROM", 0)
    write_open_images(tmp_path, [*BOXES, box_row("0000000000000000", DOG, 0.5, 0.5, 0.0, 1.0)])
    first = openimages.OpenImagesBBoxTrain(16, str(tmp_path), crop_method="none", random_flip=False)
    parse = openimages_boxes._parse
    monkeypatch.setattr(openimages_boxes, "_parse", lambda *_: pytest.fail("the file is read again"))
    caplog.clear()
    second = openimages.OpenImagesBBoxTrain(16, str(tmp_path), crop_method="none", random_flip=False)
    assert torch.equal(first[0]["coordinates_bbox"], second[0]["coordinates_bbox"])
    assert "empty boxes: 1 (row 7)" in caplog.text, "the faults are part of the cache"
    (cache,) = (tmp_path / "cache/ldm/boxes").iterdir()
    cache.write_bytes(b"damaged")
    monkeypatch.setattr(openimages_boxes, "_parse", parse)
    third = openimages.OpenImagesBBoxTrain(16, str(tmp_path))
    assert len(third) == 2 and cache.stat().st_size > 100
    write_open_images(tmp_path, BOXES[:4] + BOXES[:2])
    assert len(openimages.OpenImagesBBoxTrain(16, str(tmp_path))) == 1, "a changed file is read again"


def test_unreadable_image_is_replaced(tmp_path, caplog):
    write_open_images(tmp_path, BOXES)
    (tmp_path / "train/0000000000000000.jpg").write_bytes(b"damaged")
    dataset = openimages.OpenImagesBBoxTrain(16, str(tmp_path))
    assert dataset[0]["image_id"] == dataset[0]["image_id"] == "0000000000000001"
    assert caplog.text.count("0000000000000000.jpg") == 1
    with pytest.raises(UserError, match="1 of 2 images cannot be read"):
        openimages.OpenImagesBBoxTrain(16, str(tmp_path)).check_files()


def test_plot_of_an_item_shows_its_boxes(tmp_path):
    write_open_images(tmp_path, BOXES)
    dataset = openimages.OpenImagesBBoxTrain(64, str(tmp_path), crop_method="none", random_flip=False)
    item = dataset[0]
    plot = dataset.plot(item)
    assert plot.shape == (3, 64, 64)
    changed = (plot.movedim(0, -1).numpy() - item["image"]).round(1).any(axis=-1)
    assert changed[:, 31].mean() > 0.9, "the right edge of the first box"
    assert not changed[5:30, 40:].any(), "no box"


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"data_path": "none"}, 'OpenImagesBBoxTrain: there is no folder "none"'),
        ({"split": "test"}, 'there is no list of boxes ".*test-annotations-bbox.csv"'),
        ({"crop_method": "centre"}, 'no crop_method "centre" \\(did you mean "center"'),
        ({"category_allow_list_target": ["Dogs"]}, 'has no class "Dogs" \\(did you mean "Dog"'),
        ({"category_allow_list_target": "none.txt"}, 'there is no file of labels "none.txt"'),
        ({"category_allow_list_target": "os.environ"}, '"os.environ" is refused'),
        ({"category_allow_list_target": "ldm.data.coco_stuff.NONE"}, 'there is no list "ldm.data.coco_stuff.NONE"'),
        ({"category_mapping_target": "ldm.data.coco_stuff.LABELS"}, "must be a mapping from id to id"),
        ({"merge_into": ["Persons"]}, 'has no class "Persons" \\(did you mean "Person"'),
        ({"min_objects_per_image": 5}, "names no image that exists and has enough boxes"),
        ({"no_tokens": 10}, "6 classes with the attributes group need 12 tokens"),
    ],
    ids=str,
)
def test_invalid_parameters_raise_user_error(params, message, tmp_path):
    write_open_images(tmp_path, BOXES)
    with pytest.raises(UserError, match=message) as raised:
        openimages.OpenImagesBBoxTrain(**{"size": 16, "data_path": str(tmp_path), **params})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("oidv6-train-annotations-bbox.csv", "ImageID,Label\n", "has no column LabelName"),
        ("oidv6-train-annotations-bbox.csv", "", "has no column ImageID"),
        ("class-descriptions-boxable.csv", "/m/1,a,b\n", "must have lines such as"),
        ("class-descriptions-boxable.csv", "", "must have lines such as"),
        ("bbox_labels_600_hierarchy.json", "[1]", "is not a label hierarchy"),
        ("bbox_labels_600_hierarchy.json", '{"Subcategory": [{"Name": 1}]}', "is not a label hierarchy"),
    ],
)
def test_damaged_files_raise_user_error(file, content, message, tmp_path):
    write_open_images(tmp_path, BOXES)
    (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=message) as raised:
        openimages.OpenImagesBBoxTrain(16, str(tmp_path), merge_into=["Person"])
    assert "\n" not in str(raised.value)
