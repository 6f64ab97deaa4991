from ldm.data.image_files import existing_folder, read_list
from ldm.data.label_maps import LabelMapImages, OneHotMap, find_pairs

__all__ = ["Examples", "SegmentationBase", "pillow_name"]

_PILLOW_NAMES = {"area": "box", "cv_area": "box", "cubic": "bicubic"}


def pillow_name(interpolation: str) -> str:
    """Return the name of Pillow's filter for a published name of OpenCV's interpolation."""
    name = interpolation.removeprefix("cv_")
    return _PILLOW_NAMES.get(name, name)


class SegmentationBase(LabelMapImages):
    """Images with label maps, which a text file lists; see `ldm.data.label_maps.LabelMapImages` for the items.

    Args:
        data_csv: text file with the path of an image a line, relative to `data_root`.
        data_root: folder of the images.
        segmentation_root: folder of the label maps, with the same paths and the suffix `.png`.
        size: resize the smaller side to this many pixels, and crop a square; None or 0 keeps the files as they are.
        random_crop: crop at a random position; otherwise at the centre.
        interpolation: name of a resampling filter for the images; maps take the nearest label.
        n_labels: number of labels.
        shift_segmentation: add 1 to the labels, so that 255, for "no label", becomes 0; `n_labels` counts the 0.

    Raises:
        UserError: a folder or the list is missing, or no image has a map.
    """

    def __init__(
        self,
        data_csv: str,
        data_root: str,
        segmentation_root: str,
        size: int | None = None,
        random_crop: bool = False,
        interpolation: str = "bicubic",
        n_labels: int = 182,
        shift_segmentation: bool = False,
    ) -> None:
        name = type(self).__name__
        folder = existing_folder(data_root, name)
        map_folder = existing_folder(segmentation_root, name)
        images, maps = find_pairs(read_list(data_csv, name), folder, map_folder, data_csv)
        self.data_csv, self.data_root, self.segmentation_root = data_csv, data_root, segmentation_root
        self.image_paths, self.n_labels, self.shift_segmentation = images, n_labels, shift_segmentation
        super().__init__(
            [folder / image for image in images],
            maps,
            {"relative_file_path_": images},
            OneHotMap(n_labels, shift=shift_segmentation),
            size if size and size > 0 else None,
            random_crop=random_crop,
            interpolation=pillow_name(interpolation),
        )


class Examples(SegmentationBase):
    """Examples of landscapes from Flickr, with the labels of COCO-Stuff."""

    def __init__(self, size: int | None = None, random_crop: bool = False, interpolation: str = "bicubic") -> None:
        super().__init__(
            "data/sflckr_examples.txt",
            "data/sflckr_images",
            "data/sflckr_segmentations",
            size,
            random_crop,
            interpolation,
        )
