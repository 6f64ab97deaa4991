from pathlib import PurePosixPath
from typing import ClassVar

from ldm.config.assets import locate
from ldm.data.image_files import existing_folder, images_below, read_list
from ldm.data.label_maps import LabelMapImages, OneHotMap, find_pairs
from ldm.errors import UserError
from ldm.io.text import read_lines
from taming.data.sflckr import SegmentationBase, pillow_name

__all__ = ["ADE20kBase", "ADE20kTrain", "ADE20kValidation", "Examples", "SegmentationBase"]

N_LABELS = 151  # 150 classes, and 0 for "unknown"
SCENES = "sceneCategories.txt"


class Examples(SegmentationBase):
    """Examples of ADE20K."""

    def __init__(self, size: int | None = 256, random_crop: bool = False, interpolation: str = "bicubic") -> None:
        super().__init__(
            "data/ade20k_examples.txt",
            "data/ade20k_images",
            "data/ade20k_segmentations",
            size,
            random_crop,
            interpolation,
            n_labels=N_LABELS,
        )


class ADE20kBase(LabelMapImages):
    """Base class of the splits of ADE20K's scene parsing (SceneParse150): images, label maps and their scene.

    Items: those of `ldm.data.label_maps.LabelMapImages` with 151 labels, and `scene_category`,
    `relative_file_path_` and `relative_segmentation_path_`.

    The folder `data/ade20k_root` has the content of `ADEChallengeData2016`: `images/training/ADE_train_00000001.jpg`,
    `annotations/training/ADE_train_00000001.png`, and `sceneCategories.txt` with lines such as
    "ADE_train_00000001 airport_terminal". `data/ade20k_train.txt` and `data/ade20k_test.txt` list the images, such as
    `training/ADE_train_00000001.jpg`. Without a list, all images of the split are used.

    Args:
        config: unused, as published.
        size: resize the smaller side to this many pixels; None or 0 keeps the files as they are.
        random_crop: crop at a random position; otherwise at the centre.
        interpolation: name of a resampling filter for the images; maps take the nearest label.
        crop_size: side of the crop (default: `size`).
        data_root: folder to use instead of `data/ade20k_root`, without the published lists.

    Raises:
        UserError: a folder or the list of scenes is missing, or no image has a map.
    """

    list_file: ClassVar[str]
    folder: ClassVar[str]

    def __init__(
        self,
        config: object = None,
        size: int | None = None,
        random_crop: bool = False,
        interpolation: str = "bicubic",
        crop_size: int | None = None,
        data_root: str | None = None,
    ) -> None:
        name = type(self).__name__
        self.split, self.n_labels = self.get_split(), N_LABELS
        root = existing_folder(data_root or "data/ade20k_root", name)
        folder, map_folder = (existing_folder(root / part, name) for part in ("images", "annotations"))
        if data_root is None and locate(self.list_file).is_file():
            source, listed = self.list_file, read_list(self.list_file, name)
        else:
            existing_folder(folder / self.folder, name)
            source = str(folder / self.folder)
            listed = [f"{self.folder}/{image}" for image in images_below(folder / self.folder)]
        images, maps = find_pairs(listed, folder, map_folder, source)
        scenes = self._read_scenes(root / SCENES)
        super().__init__(
            [folder / image for image in images],
            maps,
            {
                "relative_file_path_": images,
                "relative_segmentation_path_": [str(path.relative_to(map_folder)) for path in maps],
                "scene_category": [scenes.get(PurePosixPath(image).stem, "unknown") for image in images],
            },
            OneHotMap(N_LABELS),
            size if size and size > 0 else None,
            crop_size,
            random_crop,
            interpolation=pillow_name(interpolation),
        )

    def get_split(self) -> str:
        """Return the name of the split.

        Raises:
            NotImplementedError: subclasses have a split.
        """
        raise NotImplementedError

    @staticmethod
    def _read_scenes(path: object) -> dict[str, str]:
        """Return the scene of each image.

        Raises:
            UserError: the file is missing, or a line is invalid.
        """
        scenes: dict[str, str] = {}
        for number, line in enumerate(read_lines(str(path), "list of scenes"), 1):
            words = line.split()
            if len(words) not in (0, 2):
                raise UserError(f'"{path}", line {number}, must be such as "ADE_train_00000001 airport_terminal"')
            if words:
                scenes[words[0]] = words[1]
        return scenes


class ADE20kTrain(ADE20kBase):
    """Training images, cropped at random positions."""

    list_file, folder = "data/ade20k_train.txt", "training"

    def __init__(
        self,
        config: object = None,
        size: int | None = None,
        random_crop: bool = True,
        interpolation: str = "bicubic",
        crop_size: int | None = None,
        data_root: str | None = None,
    ) -> None:
        super().__init__(config, size, random_crop, interpolation, crop_size, data_root)

    def get_split(self) -> str:
        """Return the name of the split."""
        return "train"


class ADE20kValidation(ADE20kBase):
    """Validation images, cropped at the centre."""

    list_file, folder = "data/ade20k_test.txt", "validation"

    def get_split(self) -> str:
        """Return the name of the split."""
        return "validation"
