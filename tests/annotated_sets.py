"""Miniatures of OpenImages, COCO and landscapes in their real files, for the tests of data sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from images_on_disk import pixels
from PIL import Image

PERSON, MAN, WOMAN, CAR, DOG, SUITCASE = "/m/01g317", "/m/04yx4", "/m/03bt1vf", "/m/0k4j", "/m/0bt9lr", "/m/01s55n"
CLASSES = {PERSON: "Person", MAN: "Man", WOMAN: "Woman", CAR: "Car", DOG: "Dog", SUITCASE: "Suitcase"}
HEADER = (
    "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside,"
    "XClick1X,XClick2X,XClick3X,XClick4X,XClick1Y,XClick2Y,XClick3Y,XClick4Y"
)
CLICKS = ",0.1,0.2,0.3,0.4,0.1,0.2,0.3,0.4"


def box_row(
    image: str, label: str, x0: float, x1: float, y0: float, y1: float, group: int = 0, occluded: int = 0
) -> str:
    """Return a row of a CSV file of OpenImages; IsInside is -1, which means unknown."""
    return f"{image},xclick,{label},1,{x0},{x1},{y0},{y1},{occluded},0,{group},0,-1{CLICKS}"


def write_photo(path: Path, height: int = 24, width: int = 36, seed: int = 0) -> np.ndarray:
    """Write a JPEG and return its decoded pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(height, width, seed)).save(path, quality=95)
    return np.asarray(Image.open(path))


def write_open_images(root: Path, rows: list[str], split: str = "train", images: int = 3, folder: str = "") -> None:
    """Write a split of OpenImages: classes, boxes, hierarchy and images `0000000000000000.jpg`, …

    Args:
        root: folder of the data set.
        rows: rows of the boxes, see `box_row`.
        split: name of the split.
        images: number of images.
        folder: folder of the images (default: the split).
    """
    root.mkdir(parents=True, exist_ok=True)
    (root / "class-descriptions-boxable.csv").write_text("".join(f"{i},{name}\n" for i, name in CLASSES.items()))
    prefix = "oidv6-" if split == "train" else ""
    (root / f"{prefix}{split}-annotations-bbox.csv").write_text("\n".join([HEADER, *rows]) + "\n")
    people = {"LabelName": PERSON, "Subcategory": [{"LabelName": MAN}, {"LabelName": WOMAN}]}
    vehicle = {"LabelName": "/m/07yv9", "Subcategory": [{"LabelName": CAR, "Part": [{"LabelName": "/m/0h9mv"}]}]}
    hierarchy = {"LabelName": "/m/0bl9f", "Subcategory": [people, vehicle, {"LabelName": DOG}]}
    (root / "bbox_labels_600_hierarchy.json").write_text(json.dumps(hierarchy))
    for number in range(images):
        write_photo(root / (folder or split) / f"{number:016d}.jpg", seed=number)


def coco_box(number: int, image: int, category: int, box: list[float], crowd: int = 0) -> dict[str, Any]:
    """Return an annotation of COCO; crowds have outlines in another form."""
    outline = {"counts": [1, 2, 3], "size": [24, 36]} if crowd else [[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]
    return {
        **{"id": number, "image_id": image, "category_id": category, "bbox": box, "iscrowd": crowd},
        **{"area": box[2] * box[3] / 2, "segmentation": outline},
    }


COCO_THINGS = [
    coco_box(1, 9, 18, [0.0, 0.0, 18.0, 12.0]),  # a dog in the upper left quarter
    coco_box(2, 9, 1, [18.0, 12.0, 18.0, 12.0], crowd=1),
    coco_box(3, 25, 1, [9.0, 6.0, 18.0, 12.0]),
]
COCO_STUFF = [
    coco_box(4, 9, 157, [0.0, 0.0, 36.0, 12.0]),
    coco_box(5, 25, 124, [0.0, 12.0, 36.0, 12.0]),
    coco_box(6, 25, 183, [0.0, 0.0, 36.0, 24.0]),  # everything else
]


def write_coco(root: Path, split: str = "train2017", things: Any = None, stuff: Any = None) -> None:
    """Write a split of COCO with two images, 9 and 25: boxes, captions, images and label maps of stuff."""
    images = [
        {
            **{"id": number, "file_name": f"{number:012d}.jpg", "width": 36, "height": 24, "license": 3},
            **{"coco_url": f"http://images.cocodataset.org/{split}/{number:012d}.jpg"},
        }
        for number in (9, 25)
    ]
    kinds = {
        "instances": (
            things or COCO_THINGS,
            [
                {"supercategory": "person", "id": 1, "name": "person"},
                {"supercategory": "animal", "id": 18, "name": "dog"},
            ],
        ),
        "stuff": (
            stuff or COCO_STUFF,
            [
                {"supercategory": "plant", "id": 124, "name": "grass"},
                {"supercategory": "sky", "id": 157, "name": "sky-other"},
                {"supercategory": "other", "id": 183, "name": "other"},
            ],
        ),
    }
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for kind, (boxes, categories) in kinds.items():
        content = {"info": {}, "licenses": [], "images": images, "annotations": boxes, "categories": categories}
        (root / f"annotations/{kind}_{split}.json").write_text(json.dumps(content))
    captions = [
        {"id": 1, "image_id": 9, "caption": "A dog under the sky.\n"},
        {"id": 2, "image_id": 25, "caption": "A person on grass."},
        {"id": 3, "image_id": 9, "caption": "Dog and people."},
    ]
    content = {"info": {}, "images": images, "annotations": captions}
    (root / f"annotations/captions_{split}.json").write_text(json.dumps(content))
    for number in (9, 25):
        write_photo(root / split / f"{number:012d}.jpg", seed=number)


def write_label_map(path: Path, labels: np.ndarray, palette: bool = False) -> None:
    """Write labels (H, W) as a PNG of 8 bits, grey or with a palette, as COCO-Stuff does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(labels.astype(np.uint8))
    if palette:
        image.putpalette([value for label in range(256) for value in (label, 255 - label, 7 * label % 256)])
    image.save(path)


def write_landscapes(root: Path, split: str = "train", count: int = 2, height: int = 24, width: int = 36) -> np.ndarray:
    """Write landscapes with maps of sky, sea and a part without a label; return the labels (H, W) of the maps."""
    labels = np.full((height, width), 156)
    labels[height // 2 :] = 154
    labels[:4, :4] = 255
    for number in range(count):
        write_photo(root / split / f"images/{number}.jpg", height, width, seed=number)
        write_label_map(root / split / f"segmentations/{number}.png", labels)
    return labels
