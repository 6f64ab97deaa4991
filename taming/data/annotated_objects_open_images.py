from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.data import openimages_boxes
from ldm.data.object_classes import ObjectClasses
from ldm.data.openimages_boxes import OpenImagesFiles
from ldm.errors import UserError
from taming.data.annotated_objects_dataset import AnnotatedObjectsDataset, TableAnnotations
from taming.data.helper_types import Annotation, Category

__all__ = [
    "OPEN_IMAGES_STRUCTURE",
    "AnnotatedObjectsDataset",
    "AnnotatedObjectsOpenImages",
    "Annotation",
    "Category",
    "load_annotations",
    "load_categories",
    "load_image_ids",
]

OPEN_IMAGES_STRUCTURE = {
    split: {
        "top_level": "",
        "class_descriptions": "class-descriptions-boxable.csv",
        "annotations": annotations,
        "file_list": file_list,
        "files": split,
    }
    for split, annotations, file_list in (
        ("train", "oidv6-train-annotations-bbox.csv", "train-images-boxable.csv"),
        ("validation", "validation-annotations-bbox.csv", "validation-images.csv"),
        ("test", "test-annotations-bbox.csv", "test-images.csv"),
    )
}


def load_annotations(
    descriptor_path: Path,
    min_object_area: float,
    category_mapping: Mapping[str, str],
    category_no_for_id: Mapping[str, int],
) -> dict[str, list[Annotation]]:
    """Return the annotations of each image by its id, from a CSV file of boxes.

    Args:
        descriptor_path: the file.
        min_object_area: smallest area of a box, as a fraction of the image.
        category_mapping: id of a category → id of the one that it is merged into.
        category_no_for_id: numbers of the categories to use, by their ids.

    Raises:
        UserError: the file is missing, is not CSV, or lacks a column.
    """
    boxes = openimages_boxes.read_boxes(Path(descriptor_path))
    classes = ObjectClasses(tuple(category_no_for_id), tuple(category_no_for_id))
    table = boxes.table.relabelled(classes.numbers(boxes.class_ids, category_mapping))
    table = table.with_boxes(table.areas >= min_object_area).with_counts(1, len(table.labels))
    found: dict[str, list[Annotation]] = defaultdict(list)
    for image, annotations in TableAnnotations(table, classes).items():
        found[image] = [each._replace(category_no=category_no_for_id[str(each.category_id)]) for each in annotations]
    return dict(found)


def load_image_ids(csv_path: Path) -> list[str]:
    """Return the ids of images in the column `image_name` of a CSV file.

    Raises:
        UserError: the file is missing, or lacks the column.
    """
    return openimages_boxes.read_image_names(Path(csv_path))


def load_categories(csv_path: Path) -> dict[str, Category]:
    """Return the categories by their ids, from a file such as `class-descriptions-boxable.csv`.

    Raises:
        UserError: the file is missing, or has another form.
    """
    classes = openimages_boxes.read_classes(Path(csv_path))
    return {class_id: Category(class_id, None, name) for class_id, name in classes.items()}


class AnnotatedObjectsOpenImages(AnnotatedObjectsDataset):
    """OpenImages with boxes; see `ldm.data.openimages_boxes` for the files.

    Args:
        use_additional_parameters: class tokens also say whether an object is occluded, a depiction, or shown from the
            inside.
        **kwargs: parameters of `AnnotatedObjectsDataset`.

    Raises:
        UserError: a file is missing or damaged, a class is unknown, or no image is left.
    """

    def __init__(self, use_additional_parameters: bool, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.use_additional_parameters = use_additional_parameters
        images = OpenImagesFiles(Path(self.data_path), self.split).images(
            self.selection, self.category_mapping, self.limits()
        )
        names = zip(images.classes.ids, images.classes.names, strict=True)
        self.categories = {class_id: Category(class_id, None, name) for class_id, name in names}
        self.use_table(images.table, images.classes)
        self._path_of = dict(zip(images.ids, images.paths, strict=True))
        self.image_files()

    def get_path_structure(self) -> dict[str, str]:
        """Return the files of the split that exist in `data_path`, under the names of `OPEN_IMAGES_STRUCTURE`.

        Raises:
            UserError: there is no such split, or a file is missing.
        """
        if self.split not in OPEN_IMAGES_STRUCTURE:
            known = ", ".join(OPEN_IMAGES_STRUCTURE)
            raise UserError(f'OpenImages has no split "{self.split}"; choose one of {known}')
        root, files = Path(self.data_path), OpenImagesFiles(Path(self.data_path), self.split)
        return {name: str(path.relative_to(root)) for name, path in files.paths().items()}

    def get_image_path(self, image_id: str) -> Path:
        """Return the path of an image."""
        return self._path_of[image_id]

    def get_image_description(self, image_id: str) -> dict[str, Any]:
        """Return `file_path` and `file_name` of an image."""
        path = self.get_image_path(image_id)
        return {"file_path": str(path), "file_name": path.name}
