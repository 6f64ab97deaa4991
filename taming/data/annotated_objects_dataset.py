import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image as ImageModule
from torch import Tensor
from torch.utils.data import Dataset

from ldm.data.boxed_images import BoxLimits, check_crop_method
from ldm.data.boxes import BoxTable
from ldm.data.image_files import ImageFiles
from ldm.data.object_classes import LAST_ID, ObjectClasses, TopClasses, load_mapping, load_selection
from ldm.errors import UserError
from ldm.io.images import open_image
from ldm.models.diffusion.batch_keys import LAYOUT_KEY
from taming.data.conditional_builder.objects_bbox import ObjectsBoundingBoxConditionalBuilder
from taming.data.conditional_builder.objects_center_points import (
    ATTRIBUTE_FIELDS,
    ObjectsCenterPointsConditionalBuilder,
)
from taming.data.conditional_builder.utils import load_object_from_string
from taming.data.helper_types import Annotation, BoundingBox, CropMethodType, Image, SplitType
from taming.data.image_transforms import (
    CenterCropReturnCoordinates,
    Random2dCropReturnCoordinates,
    RandomCrop1dReturnCoordinates,
    RandomHorizontalFlipReturn,
    convert_pil_to_tensor,
)

__all__ = [
    "AnnotatedObjectsDataset",
    "Annotation",
    "BoundingBox",
    "CenterCropReturnCoordinates",
    "CropMethodType",
    "Image",
    "ObjectsBoundingBoxConditionalBuilder",
    "ObjectsCenterPointsConditionalBuilder",
    "Random2dCropReturnCoordinates",
    "RandomCrop1dReturnCoordinates",
    "RandomHorizontalFlipReturn",
    "SplitType",
    "TableAnnotations",
    "convert_pil_to_tensor",
    "load_object_from_string",
]

CROPS = (CenterCropReturnCoordinates, Random2dCropReturnCoordinates, RandomCrop1dReturnCoordinates)


class TableAnnotations(Mapping[str, list[Annotation]]):
    """Annotations of images by their ids, built from a table on demand: millions of boxes stay in arrays.

    Args:
        table: boxes whose images are ids, and whose labels are numbers of `classes`.
        classes: the classes.
    """

    def __init__(self, table: BoxTable, classes: ObjectClasses) -> None:
        self.table, self.classes = table, classes
        self.index = {image: number for number, image in enumerate(table.images.tolist())}

    def __len__(self) -> int:
        return len(self.index)

    def __iter__(self) -> Iterator[str]:
        return iter(self.index)

    def __getitem__(self, image_id: str) -> list[Annotation]:
        rows = zip(*(column.tolist() for column in self.table[self.index[image_id]]), strict=True)
        return [self._annotation(image_id, *row) for row in rows]

    def _annotation(self, image_id: str, box: list[float], label: int, bits: int, number: int) -> Annotation:
        x, y, width, height = box
        attributes: Any = {field: bool(bits >> bit & 1) for bit, field in enumerate(ATTRIBUTE_FIELDS)}
        category_id = self.classes.ids[label]
        return Annotation(width * height, image_id, (x, y, width, height), label, category_id, number, **attributes)


class AnnotatedObjectsDataset(Dataset):
    """Base class of data sets of images with labelled boxes.

    Subclasses set `categories`, `annotations` and `image_ids`, and define `get_path_structure`, `get_image_path` and
    `get_image_description`. Items have the entries of `keys`: `image` (S, S, 3) float32 in [-1, 1], `objects_bbox` and
    `objects_center_points` (tokens), `coordinates_bbox` (as `objects_bbox`), `annotations`, `image_path`, `crop_bbox`,
    `flipped` and those of `get_image_description`.

    Args:
        data_path: folder of the data.
        split: "train", "validation" or "test".
        keys: the entries of an item; all of them if it is empty.
        target_image_size: S.
        min_object_area: boxes must be larger than this fraction of the image.
        min_objects_per_image, max_objects_per_image: images with fewer or more boxes are left out.
        crop_method: "none", "center", "random-1d" or "random-2d"; see `ldm.data.boxed_images.choose_window`.
        random_flip: mirror half of the images.
        no_tokens: size of the vocabulary.
        use_group_parameter: class tokens say whether a box holds a group of objects.
        encode_crop: tokens end with the corners of the crop.
        category_allow_list_target: names of the classes to use: a text file, or the dotted path of a list.
        category_mapping_target: classes to merge into others: a CSV file, or the dotted path of a dictionary.
        no_object_classes: number of classes in the code of the tokens (default: that of the classes in use).

    Raises:
        UserError: a file or folder is missing, or a list of classes is unknown.
    """

    def __init__(
        self,
        data_path: str | Path,
        split: SplitType,
        keys: Sequence[str],
        target_image_size: int,
        min_object_area: float,
        min_objects_per_image: int,
        max_objects_per_image: int,
        crop_method: CropMethodType,
        random_flip: bool,
        no_tokens: int,
        use_group_parameter: bool,
        encode_crop: bool,
        category_allow_list_target: str = "",
        category_mapping_target: str = "",
        no_object_classes: int | None = None,
    ) -> None:
        self.data_path = data_path
        self.split = split
        self.keys = keys
        self.target_image_size = target_image_size
        self.min_object_area = min_object_area
        self.min_objects_per_image = min_objects_per_image
        self.max_objects_per_image = max_objects_per_image
        self.crop_method = crop_method
        self.random_flip = random_flip
        self.no_tokens = no_tokens
        self.use_group_parameter = use_group_parameter
        self.encode_crop = encode_crop
        self.categories: dict[str, Any] = {}
        self.category_ids: list[str] = []
        self.category_number: dict[str, int] = {}
        self.image_ids: list[str] = []
        self.annotations: Mapping[str, list[Annotation]] = {}
        self.image_descriptions: Mapping[str, Any] = {}
        selection = load_selection(category_allow_list_target)
        self.selection = selection
        self.category_allow_list = None if selection is None or isinstance(selection, TopClasses) else set(selection)
        self.category_mapping = load_mapping(category_mapping_target)
        self.no_object_classes = no_object_classes
        self.data: ImageFiles | None = None
        self._conditional_builders: dict[str, ObjectsCenterPointsConditionalBuilder] | None = None
        self.paths = self.build_paths(data_path)
        self.transform_functions = self.setup_transform(target_image_size, crop_method, random_flip)

    def build_paths(self, top_level: str | Path) -> dict[str, Path]:
        """Return the paths of `get_path_structure`.

        Raises:
            UserError: one of them does not exist.
        """
        paths = {name: Path(top_level) / path for name, path in self.get_path_structure().items()}
        for path in paths.values():
            if not path.exists():
                raise UserError(f'{type(self).__name__}: there is no "{path}"; put it there, or set data_path')
        return paths

    @staticmethod
    def load_image_from_disk(path: str | Path) -> ImageModule.Image:
        """Return the image in a file as RGB.

        Raises:
            UserError: the file is missing or is not an image.
        """
        return open_image(path)

    @staticmethod
    def setup_transform(
        target_image_size: int, crop_method: CropMethodType | None, random_flip: bool
    ) -> list[Callable[[Any], Any]] | None:
        """Return the functions that `image_transform` applies; None without a crop method."""
        if crop_method is None:
            return None
        check_crop_method(crop_method)
        size = target_image_size
        functions: dict[str, list[Callable[[Any], Any]]] = {
            "none": [_Resize(size, square=True)],
            "center": [_Resize(size), CenterCropReturnCoordinates(size)],
            "random-1d": [_Resize(size), RandomCrop1dReturnCoordinates(size)],
            "random-2d": [Random2dCropReturnCoordinates(size), _Resize(size)],
        }
        return [*functions[crop_method], *([RandomHorizontalFlipReturn()] if random_flip else []), _to_values]

    def image_transform(self, x: Any) -> tuple[BoundingBox | None, bool | None, Any]:
        """Return the box of the crop, whether the image is mirrored, and the image (3, S, S) in [-1, 1]."""
        crop, flipped = None, None
        for function in self.transform_functions or ():
            if isinstance(function, CROPS):
                crop, x = function(x)
            elif isinstance(function, RandomHorizontalFlipReturn):
                flipped, x = function(x)
            else:
                x = function(x)
        return crop, flipped, x

    @property
    def no_classes(self) -> int:
        """Number of classes in the code of the tokens."""
        return self.no_object_classes or len(self.categories)

    @property
    def conditional_builders(self) -> dict[str, ObjectsCenterPointsConditionalBuilder]:
        """Builder of the tokens of each entry."""
        if self._conditional_builders is None:
            parameters = (
                *(self.no_classes, self.max_objects_per_image, self.no_tokens, self.encode_crop),
                *(self.use_group_parameter, getattr(self, "use_additional_parameters", False)),
            )
            boxes = ObjectsBoundingBoxConditionalBuilder(*parameters)
            self._conditional_builders = {
                "objects_center_points": ObjectsCenterPointsConditionalBuilder(*parameters),
                "objects_bbox": boxes,
                LAYOUT_KEY: boxes,
            }
        return self._conditional_builders

    @property
    def class_names(self) -> list[str]:
        """Names of the class tokens in their order, such as "Dog" and "Dog (group)", for `class_names` of a model."""
        names = [self.get_textual_label_for_category_id(category_id) for category_id in self.category_ids]
        return self.conditional_builders[LAYOUT_KEY].layout.token_names(names)

    def filter_categories(self) -> None:
        """Remove the categories that are not allowed, and those that are merged into others."""
        self.categories = {
            category_id: category
            for category_id, category in self.categories.items()
            if category_id not in self.category_mapping
            and (self.category_allow_list is None or category.name in self.category_allow_list)
        }

    def setup_category_id_and_number(self) -> None:
        """Number the categories in the order of their ids."""
        self.category_ids = sorted(self.categories, key=lambda category_id: (category_id == LAST_ID, category_id))
        self.category_number = {category_id: number for number, category_id in enumerate(self.category_ids)}
        allowed = self.category_allow_list
        if allowed is not None and not self.category_mapping and len(self.category_ids) != len(allowed):
            warnings.warn("some names of the allowed categories do not exist", stacklevel=2)

    def clean_up_annotations_and_image_descriptions(self) -> None:
        """Remove what belongs to images that are not among `image_ids`."""
        ids = set(self.image_ids)
        self.annotations = {image: each for image, each in self.annotations.items() if image in ids}
        self.image_descriptions = {image: each for image, each in self.image_descriptions.items() if image in ids}

    @staticmethod
    def filter_object_number(
        all_annotations: Mapping[str, list[Annotation]],
        min_object_area: float,
        min_objects_per_image: int,
        max_objects_per_image: int,
    ) -> dict[str, list[Annotation]]:
        """Return the annotations that are large enough, of the images with as many as allowed."""
        large = {
            image: [each for each in annotations if each.area is not None and each.area > min_object_area]
            for image, annotations in all_annotations.items()
        }
        return {
            image: annotations
            for image, annotations in large.items()
            if min_objects_per_image <= len(annotations) <= max_objects_per_image
        }

    def image_files(self) -> ImageFiles:
        """Return the files of the images; the object keeps account of those that cannot be read."""
        if self.data is None:
            self.data = ImageFiles([Path(self.get_image_path(image)) for image in self.image_ids], {})
        return self.data

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, n: int) -> dict[str, Any]:
        image = None
        if "image" in self.keys or not self.keys:
            name = type(self).__name__
            n, image = self.image_files().unreadable.replace(range(len(self))[n], self._read, name)
        image_id = self.get_image_id(n)
        sample = {**self.get_image_description(image_id), "annotations": self.get_annotation(image_id)}
        crop, flipped = None, None
        if image is not None:
            crop, flipped, values = self.image_transform(image)
            sample |= {"image_path": str(self.get_image_path(image_id)), "crop_bbox": crop, "flipped": flipped}
            sample["image"] = values.movedim(0, -1) if isinstance(values, Tensor) else values
        for key, builder in self.conditional_builders.items():
            if key in self.keys:
                sample[key] = builder.build(sample["annotations"], crop, flipped)
        return {key: sample[key] for key in self.keys} if self.keys else sample

    def _read(self, index: int) -> ImageModule.Image:
        return self.load_image_from_disk(self.get_image_path(self.get_image_id(index)))

    def get_image_id(self, no: int) -> str:
        """Return the id of an item's image."""
        return self.image_ids[no]

    def get_annotation(self, image_id: str) -> list[Annotation]:
        """Return the annotations of an image."""
        return self.annotations[image_id]

    def get_textual_label_for_category_id(self, category_id: str) -> str:
        """Return the name of a category by its id."""
        return self.categories[category_id].name

    def get_textual_label_for_category_no(self, category_no: int) -> str:
        """Return the name of a category by its number."""
        return self.categories[self.get_category_id(category_no)].name

    def get_category_number(self, category_id: str) -> int:
        """Return the number of a category by its id."""
        return self.category_number[category_id]

    def get_category_id(self, category_no: int) -> str:
        """Return the id of a category by its number."""
        return self.category_ids[category_no]

    @abstractmethod
    def get_image_description(self, image_id: str) -> dict[str, Any]:
        """Return entries of an item that describe its image."""

    @abstractmethod
    def get_path_structure(self) -> dict[str, str]:
        """Return name → path within `data_path` of the files and folders of the data set."""

    @abstractmethod
    def get_image_path(self, image_id: str) -> Path:
        """Return the path of an image."""

    def use_table(self, table: BoxTable, classes: ObjectClasses) -> None:
        """Use the boxes of a table, the labels of which are numbers of `classes`."""
        self.category_ids, self.category_number = list(classes.ids), dict(classes.number_of)
        self.annotations = TableAnnotations(table, classes)
        self.image_ids = list(self.annotations)

    def limits(self) -> BoxLimits:
        """Return the limits of the boxes."""
        return BoxLimits(self.min_object_area, self.min_objects_per_image, self.max_objects_per_image)


class _Resize:
    """Resizing of the smaller side to `size` pixels, or to a square.

    Args:
        size: pixels.
        square: resize both sides.
    """

    def __init__(self, size: int, square: bool = False) -> None:
        self.size, self.square = size, square

    def __call__(self, image: ImageModule.Image) -> ImageModule.Image:
        scale = self.size / min(image.size)
        width, height = (self.size if self.square else max(self.size, round(side * scale)) for side in image.size)
        return image.resize((width, height), ImageModule.Resampling.BICUBIC)


def _to_values(image: ImageModule.Image) -> Tensor:
    """Convert an image to a tensor (3, H, W) float32 in [-1, 1]."""
    return convert_pil_to_tensor(image).float() / 127.5 - 1.0
