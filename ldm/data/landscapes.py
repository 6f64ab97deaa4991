"""Landscapes with label maps of COCO-Stuff's 182 labels, for semantic synthesis (arXiv:2112.10752, section 4.3.2).

The published images were never released. Any images with maps serve, in this form:

    data/landscapes/train/images/a.jpg             data/landscapes/validation/images/…
    data/landscapes/train/segmentations/a.png      data/landscapes/validation/segmentations/…

A map is a grey or palette PNG with the pixel values of COCO-Stuff, from 0 to 181, and 255 for "no label". See
`ldm.data.coco_stuff` for their names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from ldm.data.coco_stuff import N_LABELS
from ldm.data.image_files import existing_folder, images_below, read_list
from ldm.data.label_maps import LabelMapImages, OneHotMap, find_pairs
from ldm.errors import UserError


class RFWBase(LabelMapImages):
    """Base class of the landscapes; see `ldm.data.label_maps.LabelMapImages` for the items.

    Args:
        size: resize the smaller side to this many pixels.
        crop_size: side of the image and the map (default: `size`).
        segmentation_to_float32: return float32 maps; otherwise uint8.
        data_root: folder of the images.
        segmentation_root: folder of the maps (default: `segmentations` beside `data_root`).
        txt_file: file with one path a line, relative to `data_root` (default: all images below `data_root`).
        n_labels: number of labels.
        shift_segmentation: number the labels from 1, so that 0 means "no label"; `n_labels` is then 183.
        palette: file with the label of each colour, for maps in colour; see `ldm.io.label_maps`.
        random_crop, flip_p, interpolation, keys: see `LabelMapImages`.

    Raises:
        UserError: a folder or the list is missing, or no image has a map.
    """

    folder: ClassVar[str] = "data/landscapes/train/images"
    default_random_crop: ClassVar[bool] = False
    default_flip_p: ClassVar[float] = 0.0

    def __init__(
        self,
        size: int | None = None,
        crop_size: int | None = None,
        segmentation_to_float32: bool = False,
        data_root: str | None = None,
        segmentation_root: str | None = None,
        txt_file: str | None = None,
        n_labels: int = N_LABELS,
        shift_segmentation: bool = False,
        palette: str | None = None,
        random_crop: bool | None = None,
        flip_p: float | None = None,
        interpolation: str = "bicubic",
        keys: Sequence[str] | None = None,
    ) -> None:
        name = type(self).__name__
        folder = existing_folder(data_root or self.folder, name)
        map_folder = folder.parent / "segmentations"
        if segmentation_root is not None:
            map_folder = existing_folder(segmentation_root, name)
        elif not map_folder.is_dir():
            raise UserError(f'{name}: there is no folder "{map_folder}"; put the maps there, or set segmentation_root')
        listed = read_list(txt_file, name) if txt_file else images_below(folder)
        images, maps = find_pairs(listed, folder, map_folder, str(txt_file or folder))
        super().__init__(
            [folder / image for image in images],
            maps,
            {"relative_file_path_": images},
            OneHotMap(n_labels, palette, shift_segmentation, segmentation_to_float32),
            size,
            crop_size,
            self.default_random_crop if random_crop is None else random_crop,
            self.default_flip_p if flip_p is None else flip_p,
            interpolation,
            keys,
        )


class RFWTrain(RFWBase):
    """Landscapes for training, cropped at random positions and mirrored half of the time."""

    default_random_crop = True
    default_flip_p = 0.5


class RFWValidation(RFWBase):
    """Landscapes for validation, cropped at the centre."""

    folder = "data/landscapes/validation/images"
