"""OpenImages (arXiv:1811.00982), read from folders: crops for first stages, pairs for super-resolution, and boxes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from ldm.data.boxed_images import BoxedImages, BoxLimits
from ldm.data.image_files import ListedImages, crop_square, existing_folder, resize_smaller_side, to_image
from ldm.data.layout_tokens import LayoutTokenBuilder, object_attributes
from ldm.data.object_classes import Selection, load_mapping, load_selection
from ldm.data.openimages_boxes import OpenImagesFiles
from ldm.data.superresolution import SuperResolution
from ldm.models.diffusion.batch_keys import LAYOUT_KEY


class FullOpenImagesBase(ListedImages):
    """Base class of the OpenImages data sets: square crops of the images.

    Items: `image` (S, S, 3) float32 in [-1, 1], `relative_file_path_` and `file_path_`.

    Args:
        size: resize the smaller side to this many pixels first (default: keep the size of the file).
        crop_size: S (default: `size`, or the smaller side). Smaller images are enlarged.
        txt_file, data_root: see `ListedImages`; any folder of images works.

    Raises:
        UserError: the images are missing.
    """

    random_crop: bool = False

    def __init__(
        self,
        size: int | None = None,
        crop_size: int | None = None,
        txt_file: str | None = None,
        data_root: str | None = None,
    ) -> None:
        self.size = size
        self.crop_size = crop_size
        super().__init__(txt_file, data_root)

    def image(self, pixels: np.ndarray) -> np.ndarray:
        """Return a square crop, at a random position in training."""
        if self.size is not None:
            pixels = resize_smaller_side(pixels, self.size, "area")
        side = self.crop_size or min(pixels.shape[:2])
        if min(pixels.shape[:2]) < side:
            pixels = resize_smaller_side(pixels, side)
        return to_image(crop_square(pixels, side, self.random_crop))


class FullOpenImagesTrain(FullOpenImagesBase):
    """Training images, cropped at random positions."""

    folder = "data/openimages/train"
    random_crop = True


class FullOpenImagesValidation(FullOpenImagesBase):
    """Validation images, cropped at the centre."""

    folder = "data/openimages/validation"


class SuperresOpenImagesAdvanced(SuperResolution):
    """Super-resolution pairs of OpenImages.

    Args:
        args, params: see `SuperResolution`.
        txt_file, data_root: see `ListedImages`.
    """

    source: ClassVar[type[FullOpenImagesBase]]

    def __init__(self, *args: Any, txt_file: str | None = None, data_root: str | None = None, **params: Any) -> None:
        super().__init__(self.source(txt_file=txt_file, data_root=data_root), *args, **params)


class SuperresOpenImagesAdvancedTrain(SuperresOpenImagesAdvanced):
    """Super-resolution pairs of the training images."""

    source = FullOpenImagesTrain


class SuperresOpenImagesAdvancedValidation(SuperresOpenImagesAdvanced):
    """Super-resolution pairs of the validation images."""

    source = FullOpenImagesValidation


class OpenImagesBBox(BoxedImages):
    """OpenImages with the tokens of their boxes, for layout to image.

    Items: `image` (S, S, 3) float32 in [-1, 1], `coordinates_bbox` (3 max_objects_per_image + 2,) int64, `image_id`
    and `file_path_`. `class_names` lists the names of the classes in the order of their numbers.

    Args:
        size: S.
        data_path: folder with the files that `ldm.data.openimages_boxes` describes.
        split: "train", "validation" or "test".
        min_object_area: boxes must be larger than this fraction of the image.
        min_objects_per_image, max_objects_per_image: images with fewer or more boxes are left out. The second also
            sets the length of the tokens.
        crop_method: see `ldm.data.boxed_images.choose_window`.
        random_flip: mirror half of the images with their boxes.
        no_tokens: size of the vocabulary.
        use_group_parameter: class tokens say whether a box holds a group of objects.
        use_additional_parameters: class tokens also say whether an object is occluded, a depiction, or shown from the
            inside.
        encode_crop: tokens end with the corners of the crop; see `ldm.data.layout_tokens`.
        category_allow_list_target: names of the classes to use: a list, a text file with one name a line, or
            "taming.data.open_images_helper.top_300_classes_plus_coco_compatibility". All classes by default.
        category_mapping_target: classes to merge into others by their ids: a dictionary, a CSV file with two columns,
            or "taming.data.open_images_helper.open_images_unify_categories_for_coco".
        merge_into: names of classes that include all classes below them in the hierarchy, such as "Person".
        hierarchy: file of the hierarchy (default: `bbox_labels_600_hierarchy.json` in `data_path`).
        group_boxes: use boxes around groups of objects.
        no_object_classes: number of classes in the code of the tokens, if larger than that of the classes in use.
        order: order of the boxes in the tokens, see `LayoutTokenBuilder`.
        keys: return only these entries.

    Raises:
        UserError: a file is missing or damaged, a class is unknown, or no image is left.
    """

    default_split: ClassVar[str] = "train"
    default_crop_method: ClassVar[str] = "random-2d"
    default_random_flip: ClassVar[bool] = True

    def __init__(
        self,
        size: int = 256,
        data_path: str = "data/openimages",
        split: str | None = None,
        min_object_area: float = 0.0001,
        min_objects_per_image: int = 2,
        max_objects_per_image: int = 30,
        crop_method: str | None = None,
        random_flip: bool | None = None,
        no_tokens: int = 8192,
        use_group_parameter: bool = True,
        use_additional_parameters: bool = False,
        encode_crop: bool = True,
        category_allow_list_target: Selection = "",
        category_mapping_target: str | Mapping[str, str] = "",
        merge_into: Sequence[str] = (),
        hierarchy: str | None = None,
        group_boxes: bool = True,
        no_object_classes: int | None = None,
        order: str = "size",
        keys: Sequence[str] | None = None,
    ) -> None:
        files = OpenImagesFiles(existing_folder(data_path, type(self).__name__), split or self.default_split)
        mapping = {**files.mapping(merge_into, hierarchy), **load_mapping(category_mapping_target)}
        limits = BoxLimits(min_object_area, min_objects_per_image, max_objects_per_image, group_boxes)
        images = files.images(load_selection(category_allow_list_target), mapping, limits)
        builder = LayoutTokenBuilder(
            no_object_classes or len(images.classes),
            max_objects_per_image,
            no_tokens,
            encode_crop,
            object_attributes(use_group_parameter, use_additional_parameters),
            order,
        )
        flip = self.default_random_flip if random_flip is None else random_flip
        crop_method = crop_method or self.default_crop_method
        super().__init__(images, size, crop_method, 0.5 if flip else 0.0, {LAYOUT_KEY: builder}, keys)


class OpenImagesBBoxTrain(OpenImagesBBox):
    """Training images with their boxes: square crops of random size and position, half of them mirrored."""


class OpenImagesBBoxValidation(OpenImagesBBox):
    """Validation images with their boxes: the middle square."""

    default_split = "validation"
    default_crop_method = "center"
    default_random_flip = False
