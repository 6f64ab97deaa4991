from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ldm.config.assets import locate
from ldm.data.coco import read_captions
from ldm.data.faults import Faults
from ldm.data.image_files import ImageFiles, to_image
from ldm.data.label_maps import OneHotMap
from ldm.data.windows import Window, find_window
from ldm.errors import UserError
from ldm.io.images import decode_image, open_image
from taming.data.sflckr import SegmentationBase

__all__ = ["CocoBase", "CocoImagesAndCaptionsTrain", "CocoImagesAndCaptionsValidation", "Examples", "SegmentationBase"]

N_LABELS = 183  # 182 of COCO-Stuff, and 0 for "no label"


class Examples(SegmentationBase):
    """Published examples of COCO with maps of COCO-Stuff."""

    def __init__(self, size: int | None = 256, random_crop: bool = False, interpolation: str = "bicubic") -> None:
        super().__init__(
            data_csv="data/coco_examples.txt",
            data_root="data/coco_images",
            segmentation_root="data/coco_segmentations",
            size=size,
            random_crop=random_crop,
            interpolation=interpolation,
            n_labels=N_LABELS,
            shift_segmentation=True,
        )


class CocoBase(ImageFiles):
    """COCO with captions and label maps.

    Items: `image` (S, S, 3) float32 in [-1, 1], `caption` (one of the image's), `segmentation`, `img_path`, `seg_path`
    and `filename_`. `segmentation` is the map as an RGB image (S, S, 3) in [-1, 1], or (S, S, 183) with 1 in the
    channel of the label.

    Args:
        size: resize the smaller side to this many pixels.
        dataroot: folder of the images.
        datajson: file of the captions, `captions_train2017.json` or `captions_val2017.json`.
        onehot_segmentation: return maps with one channel a label; needs `use_stuffthing`.
        use_stuffthing: read maps of things and stuff from `data/cocostuffthings`; otherwise maps of stuff from
            `data/coco/annotations`.
        crop_size: S (default: `size`).
        force_no_crop: resize whole images to squares of `size` pixels.
        given_files: names of the maps, such as "000000000139.png", of the images to use (default: all).

    Raises:
        UserError: a file is missing or damaged, or no image has a caption and a map.
    """

    def __init__(
        self,
        size: int | None = None,
        dataroot: str = "",
        datajson: str = "",
        onehot_segmentation: bool = False,
        use_stuffthing: bool = False,
        crop_size: int | None = None,
        force_no_crop: bool = False,
        given_files: Collection[str] | None = None,
    ) -> None:
        self.split = self.get_split()
        if size is None:
            raise UserError(f"{type(self).__name__} needs size, the smaller side of images in pixels")
        if onehot_segmentation and not use_stuffthing:
            raise UserError("onehot_segmentation needs use_stuffthing: true; maps of stuff alone have other labels")
        self.size, self.crop_size = size, crop_size or size
        self.onehot, self.stuffthing, self.force_no_crop = onehot_segmentation, use_stuffthing, force_no_crop
        name = "val2017" if Path(datajson).name == "captions_val2017.json" else "train2017"
        folder = f"data/cocostuffthings/{name}" if use_stuffthing else f"data/coco/annotations/stuff_{name}_pixelmaps"
        self.segmentation_prefix = folder
        self.map_form = OneHotMap(N_LABELS, shift=True)
        captions = read_captions(locate(datajson), locate(dataroot))
        images = _with_maps(captions, locate(folder), given_files, datajson)
        self.labels_of_images = [image for image, _, _, _ in images]
        self.img_id_to_captions = {image: texts for image, _, texts, _ in images}
        self.img_id_to_filepath = {image: str(path) for image, path, _, _ in images}
        self.img_id_to_segmentation_filepath = {image: str(path) for image, _, _, path in images}
        super().__init__([path for _, path, _, _ in images], {"image_ids": self.labels_of_images})

    def get_split(self) -> str:
        """Return "train" or "validation"."""
        raise NotImplementedError(f"{type(self).__name__} does not implement get_split")

    def preprocess_image(self, image_path: str | Path, segmentation_path: str | Path) -> tuple[np.ndarray, np.ndarray]:
        """Return an image (S, S, 3) in [-1, 1] and its map, cropped alike.

        Raises:
            UserError: a file is missing or cannot be read.
        """
        return self._views(*self._read(Path(image_path), Path(segmentation_path)))

    def read(self, index: int) -> Any:
        """Read the image and the map of an item.

        Raises:
            UserError: a file is missing or cannot be read.
        """
        path = self.img_id_to_segmentation_filepath[self.labels_of_images[index]]
        return self._read(self.paths[index], Path(path))

    def _read(self, path: Path, map_path: Path) -> tuple[Image.Image, Image.Image]:
        image = open_image(path)
        if self.onehot:
            return image, self.map_form.read_matching(map_path, image.size)
        return image, decode_image(map_path, "label map").convert("RGB")

    def _views(self, image: Image.Image, labels: Image.Image) -> tuple[np.ndarray, np.ndarray]:
        if self.force_no_crop:
            window, side = Window(0.0, 0.0, 1.0, 1.0), self.size
        else:
            side = self.crop_size
            window = find_window(*image.size, self.size, self.split != "validation", 0.0, side)
        values = to_image(np.asarray(window.view(image, side, Image.Resampling.BICUBIC)))
        view = np.asarray(window.view(labels, side, Image.Resampling.NEAREST))
        return values, (self.map_form.one_hot(view) if self.onehot else to_image(view))

    def __getitem__(self, i: int) -> dict[str, Any]:
        index, contents = self.readable(i)
        image, segmentation = self._views(*contents)
        number = self.labels_of_images[index]
        captions, path = self.img_id_to_captions[number], self.img_id_to_filepath[number]
        return {
            "image": image,
            "caption": captions[int(torch.randint(len(captions), ()))],
            "segmentation": segmentation,
            "img_path": path,
            "seg_path": self.img_id_to_segmentation_filepath[number],
            "filename_": Path(path).name,
        }


class CocoImagesAndCaptionsTrain(CocoBase):
    """Training images of COCO with captions and label maps, cropped at random positions."""

    def __init__(
        self,
        size: int,
        onehot_segmentation: bool = False,
        use_stuffthing: bool = False,
        crop_size: int | None = None,
        force_no_crop: bool = False,
    ) -> None:
        super().__init__(
            size,
            "data/coco/train2017",
            "data/coco/annotations/captions_train2017.json",
            onehot_segmentation,
            use_stuffthing,
            crop_size,
            force_no_crop,
        )

    def get_split(self) -> str:
        """Return "train"."""
        return "train"


class CocoImagesAndCaptionsValidation(CocoBase):
    """Validation images of COCO with captions and label maps, cropped at the centre."""

    def __init__(
        self,
        size: int,
        onehot_segmentation: bool = False,
        use_stuffthing: bool = False,
        crop_size: int | None = None,
        force_no_crop: bool = False,
        given_files: Collection[str] | None = None,
    ) -> None:
        super().__init__(
            size,
            "data/coco/val2017",
            "data/coco/annotations/captions_val2017.json",
            onehot_segmentation,
            use_stuffthing,
            crop_size,
            force_no_crop,
            given_files,
        )

    def get_split(self) -> str:
        """Return "validation"."""
        return "validation"


def _with_maps(
    images: list[tuple[int, Path, list[str]]], folder: Path, given_files: Collection[str] | None, source: str
) -> list[tuple[int, Path, list[str], Path]]:
    """Return (id, file, captions, map) of each image that has a map; one log line counts the others.

    Raises:
        UserError: no image has a map.
    """
    faults, found = Faults(source), []
    for image, path, captions in images:
        map_path = folder / f"{path.stem}.png"
        if given_files is not None and map_path.name not in given_files:
            continue
        if map_path.is_file():
            found.append((image, path, captions, map_path))
        else:
            faults.add("images without a label map", [path.name])
    faults.log()
    if not found:
        raise UserError(f'no image of "{source}" has a label map in "{folder}"; put the maps of COCO-Stuff there')
    return found
