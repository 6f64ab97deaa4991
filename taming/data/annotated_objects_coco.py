from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from ldm.data import coco
from ldm.errors import UserError
from taming.data.annotated_objects_dataset import AnnotatedObjectsDataset
from taming.data.helper_types import Annotation, Category, ImageDescription

__all__ = [
    "COCO_PATH_STRUCTURE",
    "AnnotatedObjectsCoco",
    "AnnotatedObjectsDataset",
    "Annotation",
    "Category",
    "ImageDescription",
    "load_annotations",
    "load_categories",
    "load_image_descriptions",
]

COCO_PATH_STRUCTURE = {
    split: {
        "top_level": "",
        "instances_annotations": f"annotations/instances_{name}.json",
        "stuff_annotations": f"annotations/stuff_{name}.json",
        "files": name,
    }
    for split, name in coco.SPLITS.items()
}


def load_image_descriptions(description_json: Iterable[Mapping[str, Any]]) -> dict[str, ImageDescription]:
    """Return the descriptions of images by their ids, from the list `images` of a file of COCO."""
    return {
        str(each["id"]): ImageDescription(
            id=each["id"],
            file_name=each["file_name"],
            original_size=(each["width"], each["height"]),
            license=each.get("license"),
            coco_url=each.get("coco_url"),
            date_captured=each.get("date_captured"),
            flickr_url=each.get("flickr_url"),
        )
        for each in description_json
    }


def load_categories(category_json: Iterable[Mapping[str, Any]]) -> dict[str, Category]:
    """Return the categories by their ids, from the list `categories` of files of COCO, without "other"."""
    return {
        str(each["id"]): Category(str(each["id"]), each.get("supercategory"), each["name"])
        for each in category_json
        if each["name"] != coco.OTHER
    }


def load_annotations(
    annotations_json: Sequence[Sequence[Mapping[str, Any]]],
    image_descriptions: Mapping[str, ImageDescription],
    category_no_for_id: Callable[[str], int],
    split: str,
) -> dict[str, list[Annotation]]:
    """Return the annotations of each image by its id; those of unknown categories are left out.

    Args:
        annotations_json: lists `annotations` of files of COCO.
        image_descriptions: description of each image by its id.
        category_no_for_id: function from the id of a category to its number; raises KeyError if there is none.
        split: name of the split in messages.

    Raises:
        UserError: an image has no description.
    """
    found: dict[str, list[Annotation]] = defaultdict(list)
    for entry in chain(*annotations_json):
        image, category_id = str(entry["image_id"]), str(entry["category_id"])
        if image not in image_descriptions:
            raise UserError(f"the {split} split has a box in the image {image}, which is not in its list of images")
        try:
            number = category_no_for_id(category_id)
        except KeyError:
            continue
        width, height = image_descriptions[image].original_size
        x, y, w, h = entry["bbox"]
        box = (x / width, y / height, w / width, h / height)
        is_group = bool(entry.get("iscrowd", 0))
        found[image].append(
            Annotation(box[2] * box[3], image, box, number, category_id, entry["id"], is_group_of=is_group)
        )
    return dict(found)


class AnnotatedObjectsCoco(AnnotatedObjectsDataset):
    """COCO with boxes of things and stuff; see `ldm.data.coco` for the files.

    Args:
        use_things, use_stuff: use the boxes of things, and of stuff.
        **kwargs: parameters of `AnnotatedObjectsDataset`.

    Raises:
        UserError: a file is missing or damaged, a class is unknown, or no image is left.
    """

    def __init__(self, use_things: bool = True, use_stuff: bool = True, **kwargs: Any) -> None:
        self.use_things, self.use_stuff = use_things, use_stuff
        super().__init__(**kwargs)
        boxes = coco.CocoBoxes(coco.box_files(Path(self.data_path), self.split, use_things, use_stuff))
        images = boxes.images(self.paths["files"], self.selection, self.category_mapping, self.limits())
        categories = load_categories(boxes.categories)
        self.categories = {class_id: categories[class_id] for class_id in images.classes.ids}
        self.use_table(images.table, images.classes)
        self.image_descriptions = load_image_descriptions(boxes.descriptions[image] for image in self.image_ids)
        self.image_files()

    def get_path_structure(self) -> dict[str, str]:
        """Return the files of the split, under the names of `COCO_PATH_STRUCTURE`.

        Raises:
            UserError: there is no such split, or its images are missing.
        """
        root = Path(self.data_path)
        structure = dict(COCO_PATH_STRUCTURE.get(self.split, ()))
        structure["files"] = str(coco.image_folder(root, self.split).relative_to(root))
        for name, used in (("instances_annotations", self.use_things), ("stuff_annotations", self.use_stuff)):
            if not used:
                structure.pop(name)
        return structure

    def get_image_path(self, image_id: str) -> Path:
        """Return the path of an image."""
        return self.paths["files"] / self.image_descriptions[str(image_id)].file_name

    def get_image_description(self, image_id: str) -> dict[str, Any]:
        """Return the description of an image as a dictionary."""
        return self.image_descriptions[image_id]._asdict()
