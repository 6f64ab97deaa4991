"""Published data sets of images with labelled boxes: OpenImages and COCO, and COCO with captions and maps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from annotated_sets import (
    CAR,
    COCO_STUFF,
    COCO_THINGS,
    DOG,
    MAN,
    PERSON,
    box_row,
    write_coco,
    write_label_map,
    write_open_images,
    write_photo,
)
from torch.utils.data import DataLoader

from ldm.data.object_classes import TopClasses
from ldm.errors import UserError
from taming.data import annotated_objects_coco, annotated_objects_open_images, open_images_helper
from taming.data import coco as taming_coco
from taming.data.annotated_objects_coco import AnnotatedObjectsCoco
from taming.data.annotated_objects_dataset import AnnotatedObjectsDataset
from taming.data.annotated_objects_open_images import AnnotatedObjectsOpenImages
from taming.data.helper_types import Annotation, Category
from taming.data.utils import custom_collate

KEYS = ["image", "objects_bbox", "file_name", "annotations"]
ROWS = [
    box_row("0000000000000000", MAN, 0.0, 0.5, 0.0, 1.0),
    box_row("0000000000000000", CAR, 0.5, 0.75, 0.5, 1.0, group=1),
    box_row("0000000000000001", DOG, 0.25, 0.5, 0.25, 0.5),
    box_row("0000000000000001", MAN, 0.0, 1.0, 0.0, 1.0, occluded=1),
    box_row("0000000000000001", DOG, 0.0, 1.0, 0.0, 0.5),
]


def parameters(folder: Any, **changes: Any) -> dict[str, Any]:
    """Return the parameters of the published configurations, with small images."""
    published = {
        **{"data_path": str(folder), "split": "train", "keys": KEYS, "no_tokens": 8192, "target_image_size": 16},
        **{"min_object_area": 0.0001, "min_objects_per_image": 2, "max_objects_per_image": 30},
        **{"crop_method": "random-2d", "random_flip": True, "use_group_parameter": True, "encode_crop": True},
    }
    return {**published, **changes}


def test_open_images_with_published_parameters(tmp_path, monkeypatch):
    write_open_images(tmp_path, ROWS)
    monkeypatch.setattr(open_images_helper, "top_300_classes_plus_coco_compatibility", TopClasses(1, ("person", "car")))
    dataset = AnnotatedObjectsOpenImages(
        use_additional_parameters=True,
        category_allow_list_target="taming.data.open_images_helper.top_300_classes_plus_coco_compatibility",
        category_mapping_target="taming.data.open_images_helper.open_images_unify_categories_for_coco",
        **parameters(tmp_path, min_objects_per_image=1),
    )
    assert dataset.category_ids == [PERSON, DOG, CAR], "the most frequent class, and those of COCO"
    assert [each.category_id for each in dataset[0]["annotations"]] == [PERSON, CAR]


def test_items_of_open_images(tmp_path):
    write_open_images(tmp_path, ROWS)
    dataset = AnnotatedObjectsOpenImages(
        use_additional_parameters=True, **parameters(tmp_path, crop_method="none", random_flip=False)
    )
    assert len(dataset) == 2 and dataset.no_classes == 6 and dataset.image_ids[1] == "0000000000000001"
    item = dataset[1]
    assert set(item) == set(KEYS) and item["file_name"] == "0000000000000001.jpg"
    assert item["image"].shape == (16, 16, 3) and item["image"].dtype == torch.float32
    assert -1 <= item["image"].min() < item["image"].max() <= 1
    assert item["objects_bbox"].shape == (92,)
    first, second, _ = item["annotations"]
    assert first.bbox == (0.25, 0.25, 0.25, 0.25) and first.area == 0.0625 and first.id == 3
    assert (first.category_id, second.category_id) == (DOG, MAN)
    assert second.is_occluded is True and second.is_inside is False, "-1 means unknown"
    assert dataset.class_names[first.category_no + dataset.no_classes] == "Dog (group)"
    assert dataset.get_textual_label_for_category_no(first.category_no) == "Dog"
    assert dataset.get_textual_label_for_category_id(MAN) == "Man" and dataset.get_category_number(PERSON) == 0
    found, crop = dataset.conditional_builders["objects_bbox"].inverse_build(item["objects_bbox"])
    assert sorted(token for token, _ in found) == sorted(
        [first.category_no, first.category_no, second.category_no + 2 * dataset.no_classes]
    )
    assert crop == (0, 0, 1, 1)


def test_further_keys(tmp_path):
    write_open_images(tmp_path, ROWS)
    keys = ["image", "objects_center_points", "coordinates_bbox", "objects_bbox", "crop_bbox", "flipped", "image_path"]
    dataset = AnnotatedObjectsOpenImages(False, **parameters(tmp_path, keys=keys, min_objects_per_image=1))
    torch.manual_seed(0)
    items = [dataset[0] for _ in range(10)]
    assert {each["flipped"] for each in items} == {True, False} and len({each["crop_bbox"] for each in items}) > 5
    assert items[0]["objects_center_points"].shape == (62,) and Path(items[0]["image_path"]).is_file()
    assert items[0]["coordinates_bbox"].shape == (92,)
    tokens_only = AnnotatedObjectsOpenImages(False, **parameters(tmp_path, keys=["objects_bbox"]))
    assert set(tokens_only[0]) == {"objects_bbox"}


def test_batches_keep_annotations_as_lists(tmp_path):
    write_open_images(tmp_path, ROWS)
    dataset = AnnotatedObjectsOpenImages(True, **parameters(tmp_path))
    batch = next(iter(DataLoader(dataset, 2, collate_fn=custom_collate)))
    assert batch["image"].shape == (2, 16, 16, 3) and batch["objects_bbox"].shape == (2, 92)
    assert [len(each) for each in batch["annotations"]] == [2, 3]
    assert all(isinstance(each, Annotation) for each in batch["annotations"][1])


def test_items_of_coco(tmp_path):
    write_coco(tmp_path)
    dataset = AnnotatedObjectsCoco(**parameters(tmp_path, crop_method="random-1d", min_object_area=0.00001))
    assert dataset.category_ids == ["1", "124", "157", "18"] and dataset.categories["18"].super_category == "animal"
    item = dataset[0]
    assert item["file_name"] == "000000000009.jpg" and item["objects_bbox"].shape == (92,)
    dog, person, sky = item["annotations"]
    assert dog.bbox == (0, 0, 0.5, 0.5) and dog.area == 0.25 and person.is_group_of and not sky.is_group_of
    assert dataset.get_image_description("9")["original_size"] == (36, 24)
    things = AnnotatedObjectsCoco(use_stuff=False, **parameters(tmp_path))
    assert things.category_ids == ["1", "18"] and len(things) == 1


def test_loading_functions_of_open_images(tmp_path):
    write_open_images(tmp_path, ROWS)
    path = tmp_path / "oidv6-train-annotations-bbox.csv"
    categories = annotated_objects_open_images.load_categories(tmp_path / "class-descriptions-boxable.csv")
    assert categories[DOG] == Category(DOG, None, "Dog")
    found = annotated_objects_open_images.load_annotations(path, 0.1, {MAN: PERSON}, {DOG: 5, PERSON: 2})
    assert {image: [each.category_no for each in boxes] for image, boxes in found.items()} == {
        "0000000000000000": [2],
        "0000000000000001": [2, 5],
    }
    (tmp_path / "images.csv").write_text("image_name,url\na.jpg,x\nb.jpg,y\n")
    assert annotated_objects_open_images.load_image_ids(tmp_path / "images.csv") == ["a.jpg", "b.jpg"]
    structure = annotated_objects_open_images.OPEN_IMAGES_STRUCTURE
    assert structure["validation"]["annotations"] == "validation-annotations-bbox.csv"


def test_loading_functions_of_coco(tmp_path):
    write_coco(tmp_path)
    content = json.loads((tmp_path / "annotations/instances_train2017.json").read_text())
    descriptions = annotated_objects_coco.load_image_descriptions(content["images"])
    assert descriptions["9"].original_size == (36, 24) and descriptions["9"].license == 3
    assert annotated_objects_coco.load_categories([{"id": 183, "name": "other", "supercategory": "other"}]) == {}
    numbers = {"1": 0, "157": 1}
    found = annotated_objects_coco.load_annotations(
        [COCO_THINGS, COCO_STUFF], descriptions, numbers.__getitem__, "train"
    )
    assert {image: [each.category_no for each in boxes] for image, boxes in found.items()} == {"9": [0, 1], "25": [0]}
    with pytest.raises(UserError, match="the train split has a box in the image 9"):
        annotated_objects_coco.load_annotations([COCO_THINGS], {}, numbers.__getitem__, "train")


def test_data_set_of_the_users_own(tmp_path):
    """Subclass the published base class as its own subclasses do."""

    class Own(AnnotatedObjectsDataset):
        def __init__(self, **params):
            super().__init__(**params)
            self.categories = {each: Category(each, None, each.upper()) for each in ("b", "a", "c")}
            self.filter_categories()
            self.setup_category_id_and_number()
            box = Annotation(0.25, "x", (0.0, 0.0, 0.5, 0.5), 0, "a")
            annotations = {"x": [box, box._replace(category_no=1)], "y": [box], "z": [box, box._replace(area=0.0)]}
            self.annotations = self.filter_object_number(annotations, 0.1, 2, 30)
            self.image_descriptions = dict.fromkeys("xyz")
            self.image_ids = list(self.annotations)
            self.clean_up_annotations_and_image_descriptions()

        def get_path_structure(self):
            return {"files": "images"}

        def get_image_path(self, image_id):
            return self.paths["files"] / f"{image_id}.jpg"

        def get_image_description(self, image_id):
            return {"file_name": image_id}

    write_photo(tmp_path / "images/x.jpg")
    names = tmp_path / "names.txt"
    names.write_text("A\nB\n")
    dataset = Own(**parameters(tmp_path, category_allow_list_target=str(names), keys=["image", "objects_bbox"]))
    assert (
        dataset.category_ids == ["a", "b"] and dataset.image_ids == ["x"] and list(dataset.image_descriptions) == ["x"]
    )
    assert dataset[0]["image"].shape == (16, 16, 3)
    with pytest.raises(UserError, match=r'Own: there is no ".*images"; put it there'):
        Own(**parameters(tmp_path / "none"))


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (AnnotatedObjectsOpenImages, {"split": "tests"}, 'OpenImages has no split "tests"; choose one of train'),
        (AnnotatedObjectsOpenImages, {"data_path": "none"}, 'no list of classes "none/'),
        (AnnotatedObjectsOpenImages, {"crop_method": "random"}, 'no crop_method "random" \\(did you mean "random-'),
        (AnnotatedObjectsOpenImages, {"category_allow_list_target": "os.environ"}, '"os.environ" is refused'),
        (AnnotatedObjectsCoco, {"split": "test"}, 'COCO has no split "test"'),
    ],
)
def test_invalid_parameters_raise_user_error(kind, changes, message, tmp_path):
    write_open_images(tmp_path, ROWS)
    write_coco(tmp_path)
    extra = {"use_additional_parameters": True} if kind is AnnotatedObjectsOpenImages else {}
    with pytest.raises(UserError, match=message) as raised:
        kind(**extra, **parameters(tmp_path, **changes))
    assert "\n" not in str(raised.value)


def test_unreadable_images_are_replaced_and_counted(tmp_path, caplog):
    write_open_images(tmp_path, ROWS)
    (tmp_path / "train/0000000000000000.jpg").write_bytes(b"damaged")
    dataset = AnnotatedObjectsOpenImages(True, **parameters(tmp_path))
    assert dataset[0]["file_name"] == dataset[0]["file_name"] == "0000000000000001.jpg"
    assert caplog.text.count("0000000000000000.jpg") == 1
    with pytest.raises(UserError, match="1 of 2 images cannot be read"):
        AnnotatedObjectsOpenImages(True, **parameters(tmp_path)).image_files().check_files()


@pytest.fixture
def coco_folder(tmp_path, monkeypatch):
    """Write COCO with both kinds of maps into the published folders, the working folder above them."""
    monkeypatch.chdir(tmp_path)
    labels = np.full((24, 36), 156)
    labels[12:] = 255
    for split in ("train2017", "val2017"):
        write_coco(tmp_path / "data/coco", split)
        for number in (9, 25):
            write_label_map(tmp_path / f"data/cocostuffthings/{split}/{number:012d}.png", labels)
            path = tmp_path / f"data/coco/annotations/stuff_{split}_pixelmaps/{number:012d}.png"
            write_label_map(path, labels, palette=True)
    return tmp_path / "data"


def test_coco_with_captions_and_one_hot_maps(coco_folder):
    dataset = taming_coco.CocoImagesAndCaptionsValidation(24, onehot_segmentation=True, use_stuffthing=True)
    item = dataset[0]
    assert set(item) == {"image", "caption", "segmentation", "img_path", "seg_path", "filename_"}
    assert item["image"].shape == (24, 24, 3) and item["segmentation"].shape == (24, 24, 183)
    assert item["segmentation"][:12, :, 157].all() and item["segmentation"][12:, :, 0].all()
    assert item["filename_"] == "000000000009.jpg" and item["caption"] in ("A dog under the sky.", "Dog and people.")
    assert dataset.img_id_to_captions == {9: ["A dog under the sky.", "Dog and people."], 25: ["A person on grass."]}
    batch = next(iter(DataLoader(dataset, 2)))
    assert batch["caption"][1] == "A person on grass.", "a batch of captions is a list of texts"


def test_coco_with_maps_as_images(coco_folder):
    train = taming_coco.CocoImagesAndCaptionsTrain(24, crop_size=16)
    item = train[0]
    assert item["image"].shape == item["segmentation"].shape == (16, 16, 3)
    colours = {tuple(each) for each in ((item["segmentation"].reshape(-1, 3) + 1) * 127.5).round().astype(int).tolist()}
    assert colours <= {(156, 99, 1092 % 256), (255, 0, 1785 % 256)}, "colours of labels are not mixed"
    whole = taming_coco.CocoImagesAndCaptionsTrain(20, force_no_crop=True)[0]
    assert whole["image"].shape == (20, 20, 3) and len(np.unique(whole["segmentation"][:, 0, 0])) == 2


def test_given_files_and_missing_maps(coco_folder, caplog):
    given = taming_coco.CocoImagesAndCaptionsValidation(16, given_files=["000000000025.png"])
    assert len(given) == 1 and given[0]["filename_"] == "000000000025.jpg"
    (coco_folder / "coco/annotations/stuff_train2017_pixelmaps/000000000009.png").unlink()
    assert len(taming_coco.CocoImagesAndCaptionsTrain(16)) == 1
    assert caplog.text.count("left out images without a label map: 1 (000000000009.jpg)") == 1
    with pytest.raises(UserError, match="onehot_segmentation needs use_stuffthing: true"):
        taming_coco.CocoImagesAndCaptionsTrain(16, onehot_segmentation=True)


def test_published_examples(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_photo(tmp_path / "data/coco_images/a.jpg")
    write_label_map(tmp_path / "data/coco_segmentations/a.png", np.full((24, 36), 9))
    (tmp_path / "data/coco_examples.txt").write_text("a.jpg\n")
    item = taming_coco.Examples(size=16)[0]
    assert item["image"].shape == (16, 16, 3) and item["segmentation"].shape == (16, 16, 183)
    assert item["segmentation"][..., 10].all() and item["relative_file_path_"] == "a.jpg"
    assert taming_coco.Examples(size=0)[0]["image"].shape == (24, 36, 3)
