"""COCO (arXiv:1405.0312) with captions, and with boxes, in the files of its web site.

| file in `data/coco` | content |
|---|---|
| `annotations/captions_train2017.json`, `captions_val2017.json` | about five captions of each image |
| `annotations/instances_train2017.json`, `instances_val2017.json` | boxes of things, in pixels |
| `annotations/stuff_train2017.json`, `stuff_val2017.json` | boxes of stuff, in pixels |
| `train2017/`, `val2017/` (also below `images/`) | images |
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from ldm.data.boxed_images import AnnotatedImages, BoxedImages, BoxLimits
from ldm.data.boxes import BoxTable
from ldm.data.faults import Faults
from ldm.data.image_files import ImageFiles, existing_folder, to_image
from ldm.data.layout_tokens import LayoutTokenBuilder, object_attributes
from ldm.data.object_classes import ObjectClasses, Selection, TopClasses, choose_classes, load_mapping, load_selection
from ldm.data.windows import find_window
from ldm.errors import UserError
from ldm.io.images import open_image
from ldm.models.diffusion.batch_keys import LAYOUT_KEY

SPLITS = {"train": "train2017", "validation": "val2017"}
# A class of the files of stuff that stands for everything else in an image.
OTHER = "other"


def split_name(split: str) -> str:
    """Return the name of a split in the names of COCO's files.

    Raises:
        UserError: there is no such split.
    """
    if split not in SPLITS:
        raise UserError(f'COCO has no split "{split}"; choose {" or ".join(SPLITS)}')
    return SPLITS[split]


def annotation_file(root: Path, kind: str, split: str) -> Path:
    """Return the path of a file of annotations: its kind is "captions", "instances" or "stuff"."""
    return root / "annotations" / f"{kind}_{split_name(split)}.json"


def image_folder(root: Path, split: str) -> Path:
    """Return the folder of the images of a split.

    Raises:
        UserError: it does not exist.
    """
    folders = [root / split_name(split), root / "images" / split_name(split)]
    folder = next((each for each in folders if each.is_dir()), None)
    if folder is None:
        raise UserError(f'there is no folder "{folders[0]}" of COCO\'s images; put them there, or set the folder')
    return folder


def read_annotations(path: Path, *lists: str) -> dict[str, list[dict[str, Any]]]:
    """Return lists of a JSON file of COCO, such as `images`. Outlines of objects are left out, to save memory.

    Raises:
        UserError: the file is missing, is not JSON, or lacks a list.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            content = json.load(file, object_hook=_without_outline)
    except FileNotFoundError:
        raise UserError(f'there is no file of annotations "{path}"; download it from the site of COCO') from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f'cannot read the annotations "{path}": {error}; download the file again') from None
    for name in lists:
        entries = content.get(name) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise UserError(f'the annotations "{path}" have no list "{name}"; give a file of COCO')
    return content


def _without_outline(entry: dict[str, Any]) -> dict[str, Any]:
    entry.pop("segmentation", None)
    return entry


class CocoBoxes:
    """Boxes of COCO in one or two of its files.

    Args:
        paths: files of boxes, whose classes have different ids.

    Attributes:
        categories: the entry of each class, without the class of everything else.
        names: name of each class by its id.
        descriptions: the entry of each image by its id.

    Raises:
        UserError: a file is missing or damaged.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)
        contents = [read_annotations(path, "images", "annotations", "categories") for path in paths]
        listed = [each for content in contents for each in content["categories"]]
        self.categories = [each for each in listed if each["name"] != OTHER]
        self.names = {str(each["id"]): each["name"] for each in self.categories}
        self.descriptions = {str(each["id"]): each for content in contents for each in content["images"]}
        self.class_ids = list(self.names)
        self.table, self.faults = self._table([each for content in contents for each in content["annotations"]])

    def _table(self, annotations: Sequence[Mapping[str, Any]]) -> tuple[BoxTable, Faults]:
        """Return a table whose labels are indices in `class_ids`, and what was wrong with the annotations."""
        faults = Faults(", ".join(map(str, self.paths)))
        class_index = {class_id: number for number, class_id in enumerate(self.class_ids)}
        image_index: dict[str, int] = {}
        rows: list[tuple[int, int, int, int]] = []  # image, class, whether it is a group, id
        boxes: list[list[float]] = []
        for entry in annotations:
            image, label = str(entry.get("image_id")), class_index.get(str(entry.get("category_id")))
            box, identity = entry.get("bbox"), entry.get("id", 0)
            if image not in self.descriptions:
                faults.add("boxes of unknown images", [f"id {identity}"])
            elif not isinstance(box, list) or len(box) != 4:
                faults.add("annotations without a box", [f"id {identity}"])
            elif label is not None:
                rows.append(
                    (image_index.setdefault(image, len(image_index)), label, entry.get("iscrowd", 0) == 1, identity)
                )
                boxes.append(box)
        columns = np.array(rows, np.int64).reshape(-1, 4)
        sizes = np.array([_size(self.descriptions[image]) for image in image_index], np.float64).reshape(-1, 2)
        fractions = np.array(boxes, np.float64).reshape(-1, 4) / np.tile(sizes, 2)[columns[:, 0]]
        table = BoxTable.grouped(
            list(image_index),
            columns[:, 0],
            fractions,
            columns[:, 1].astype(np.int32),
            columns[:, 2].astype(np.uint8),
            columns[:, 3],
        )
        return table.checked(faults, "id"), faults

    def images(
        self,
        folder: Path,
        selection: list[str] | TopClasses | None,
        mapping: Mapping[str, str],
        limits: BoxLimits,
    ) -> AnnotatedImages:
        """Return the images with the boxes of the selected classes.

        Args:
            folder: folder of the images.
            selection: names of classes, None for all.
            mapping: id of a class → id of the class that it is merged into.
            limits: limits of the boxes.

        Raises:
            UserError: a class is unknown, or no image is left.
        """
        source = str(self.paths[0])
        if isinstance(selection, TopClasses):
            counts = np.bincount(self.table.labels, minlength=len(self.class_ids)).tolist()
            named = {self.names[each]: count for each, count in zip(self.class_ids, counts, strict=True)}
            selection = [name for name, _ in selection.choose(named)]
        self.faults.log()
        classes: ObjectClasses = choose_classes(self.names, selection, mapping, source)
        table = limits.apply(self.table.relabelled(classes.numbers(self.class_ids, mapping)))

        def path_of(image: str) -> Path | None:
            path = folder / self.descriptions[image]["file_name"]
            return path if path.is_file() else None

        return AnnotatedImages.existing(table, path_of, classes, source)


def _size(description: Mapping[str, Any]) -> tuple[int, int]:
    return description["width"], description["height"]


class CocoBBox(BoxedImages):
    """COCO with the tokens of the boxes, for layout to image.

    Items: see `ldm.data.openimages.OpenImagesBBox`.

    Args:
        size: side of the image in pixels.
        data_path: folder with the files that `ldm.data.coco` describes.
        split: "train" or "validation".
        use_things, use_stuff: use the boxes of things, and of stuff.
        min_object_area, min_objects_per_image, max_objects_per_image, crop_method, random_flip, no_tokens: see
            `OpenImagesBBox`.
        use_group_parameter, encode_crop, category_allow_list_target, category_mapping_target, group_boxes: see
            `OpenImagesBBox`.
        no_object_classes, order, keys: see `OpenImagesBBox`.

    Raises:
        UserError: a file is missing or damaged, a class is unknown, or no image is left.
    """

    default_split: ClassVar[str] = "train"
    default_crop_method: ClassVar[str] = "random-1d"
    default_random_flip: ClassVar[bool] = True

    def __init__(
        self,
        size: int = 256,
        data_path: str = "data/coco",
        split: str | None = None,
        use_things: bool = True,
        use_stuff: bool = True,
        min_object_area: float = 0.00001,
        min_objects_per_image: int = 2,
        max_objects_per_image: int = 30,
        crop_method: str | None = None,
        random_flip: bool | None = None,
        no_tokens: int = 8192,
        use_group_parameter: bool = True,
        encode_crop: bool = True,
        category_allow_list_target: Selection = "",
        category_mapping_target: str | Mapping[str, str] = "",
        group_boxes: bool = True,
        no_object_classes: int | None = None,
        order: str = "size",
        keys: Sequence[str] | None = None,
    ) -> None:
        root, split = existing_folder(data_path, type(self).__name__), split or self.default_split
        boxes = CocoBoxes(box_files(root, split, use_things, use_stuff))
        images = boxes.images(
            image_folder(root, split),
            load_selection(category_allow_list_target),
            load_mapping(category_mapping_target),
            BoxLimits(min_object_area, min_objects_per_image, max_objects_per_image, group_boxes),
        )
        builder = LayoutTokenBuilder(
            no_object_classes or len(images.classes),
            max_objects_per_image,
            no_tokens,
            encode_crop,
            object_attributes(use_group_parameter, False),
            order,
        )
        flip = self.default_random_flip if random_flip is None else random_flip
        crop_method = crop_method or self.default_crop_method
        super().__init__(images, size, crop_method, 0.5 if flip else 0.0, {LAYOUT_KEY: builder}, keys)


class CocoBBoxTrain(CocoBBox):
    """Training images of COCO with their boxes: crops at random positions, half of them mirrored."""


class CocoBBoxValidation(CocoBBox):
    """Validation images of COCO with their boxes: the middle square."""

    default_split = "validation"
    default_crop_method = "center"
    default_random_flip = False


def box_files(root: Path, split: str, use_things: bool, use_stuff: bool) -> list[Path]:
    """Return the files of boxes of a split.

    Raises:
        UserError: neither things nor stuff are used.
    """
    kinds = [kind for kind, used in (("instances", use_things), ("stuff", use_stuff)) if used]
    if not kinds:
        raise UserError("COCO has boxes of things and of stuff; set use_things or use_stuff to true")
    return [annotation_file(root, kind, split) for kind in kinds]


class CocoCaptions(ImageFiles):
    """COCO with captions, for text to image.

    Items: `image` (S, S, 3) float32 in [-1, 1], `caption`, `image_id` and `file_path_`.

    Args:
        size: resize the smaller side to this many pixels.
        crop_size: S (default: `size`).
        data_root: folder with the files that `ldm.data.coco` describes.
        split: "train" or "validation".
        random_crop: crop at random positions; otherwise at the centre.
        flip_p: probability of mirroring.
        random_caption: choose one of the captions of an image at random; otherwise the first one.
        keys: return only these entries (default: all).

    Attributes:
        captions: the captions of each image.

    Raises:
        UserError: a file is missing or damaged, or no image has a caption.
    """

    split: ClassVar[str] = "train"
    is_random: ClassVar[bool] = True

    def __init__(
        self,
        size: int = 256,
        crop_size: int | None = None,
        data_root: str = "data/coco",
        split: str | None = None,
        random_crop: bool | None = None,
        flip_p: float = 0.0,
        random_caption: bool | None = None,
        keys: Sequence[str] | None = None,
    ) -> None:
        root, split = existing_folder(data_root, type(self).__name__), split or self.split
        self.size, self.crop_size, self.flip_p = size, crop_size or size, flip_p
        self.random_crop = self.is_random if random_crop is None else random_crop
        self.random_caption = self.is_random if random_caption is None else random_caption
        images = read_captions(annotation_file(root, "captions", split), image_folder(root, split))
        self.captions = [captions for _, _, captions in images]
        super().__init__([path for _, path, _ in images], {"image_id": [image for image, _, _ in images]}, keys)

    def entries(self, index: int) -> dict[str, Any]:
        """See `ImageFiles.entries`."""
        captions = self.captions[index]
        number = int(torch.randint(len(captions), ())) if self.random_caption else 0
        return {**super().entries(index), "caption": captions[number]}

    def read(self, index: int) -> Any:
        """See `ImageFiles.read`; returns an image of Pillow."""
        return open_image(self.paths[index], min_side=2 * self.size)

    def image(self, pixels: Any) -> np.ndarray:
        """Return a square crop (S, S, 3) float32 in [-1, 1]."""
        from PIL import Image

        width, height = pixels.size
        window = find_window(width, height, self.size, self.random_crop, self.flip_p, self.crop_size)
        return to_image(np.asarray(window.view(pixels, self.crop_size, Image.Resampling.BICUBIC)))


class CocoCaptionsTrain(CocoCaptions):
    """Training images of COCO with captions: crops at random positions, and a random caption."""


class CocoCaptionsValidation(CocoCaptions):
    """Validation images of COCO with captions: the middle square, and the first caption."""

    split = "validation"
    is_random = False


def read_captions(path: Path, folder: Path) -> list[tuple[int, Path, list[str]]]:
    """Return (id, file, captions) of each image that exists and has a caption; one log line counts the others.

    Args:
        path: file such as `captions_train2017.json`.
        folder: folder of the images.

    Raises:
        UserError: the file is missing or damaged, or no image has a caption.
    """
    content = read_annotations(path, "images", "annotations")
    captions = captions_by_image(content["annotations"])
    faults, found = Faults(str(path)), []
    for description in content["images"]:
        image, file = description["id"], folder / description["file_name"]
        texts = captions.pop(image, [])
        if not texts:
            faults.add("images without a caption", [description["file_name"]])
        elif not file.is_file():
            faults.add("images that are missing", [description["file_name"]])
        else:
            found.append((image, file, texts))
    faults.add("captions of unknown images", map(str, captions), sum(map(len, captions.values())))
    faults.log()
    if not found:
        raise UserError(f'"{path}" has no image with a caption in "{folder}": {faults.text()}; check the folder')
    return found


def captions_by_image(annotations: Iterable[Mapping[str, Any]]) -> dict[int, list[str]]:
    """Return the captions of each image by its id, without empty ones."""
    captions: dict[int, list[str]] = defaultdict(list)
    for entry in annotations:
        text = entry.get("caption")
        if isinstance(text, str) and text.strip():
            captions[entry.get("image_id", -1)].append(text.strip())
    return captions
