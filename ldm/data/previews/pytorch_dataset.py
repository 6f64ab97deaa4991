"""Photographs with captions as Conceptual Captions provides them: downloaded files, a table of links, or shards.

The published configuration `models/ldm/text2img256/config.yaml` names these data sets.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from ldm.data.image_files import ImageFiles, existing_folder, pil_method, to_image
from ldm.data.previews.link_table import find_link_table, rows_of_links
from ldm.data.previews.shard_index import ShardIndex
from ldm.data.row_captions import FROM_TEXT_FILE, add_captions, caption_file
from ldm.data.rows import find_rows
from ldm.data.unreadable import UnreadableFiles, check_share
from ldm.data.windows import find_window
from ldm.errors import UserError
from ldm.io.images import open_image

SHARDS = "*.tar"
PROBED = 200  # images in shards that are decoded before training
OVERSAMPLING = 2  # a JPEG is decoded at a reduced size, as long as its sides are this many times larger than the image


class Previews(ImageFiles):
    """Base class of images with captions.

    The folder `data_root` has one of these layouts, which are recognised in this order:

    - shards `00000.tar`, …, with `000000000.jpg` and `000000000.txt` in them, as img2dataset writes them;
    - a table of links such as `Train_GCC-training.tsv`, with a caption, a tab and an address in each line, and files
      named by the index of their line, such as `17.jpg`, `000000017.jpg` or `17_<CRC-32 of the address>`;
    - folders `00000/000000000.jpg` with `000000000.txt` beside each image, as img2dataset writes them as well.

    Items: `image` (size, size, 3) float32 in [-1, 1], `caption`, `file_path_` and `relative_file_path_`. Images without
    a caption, and captions without an image, are left out and counted in the log.

    Args:
        size: side of the image in pixels.
        data_root: the folder (default: the class attribute `folder`).
        captions: path of the table of links, if it is not in the folder.
        crop: "random" or "center"; position of the square along the larger side.
        flip_p: probability of mirroring an image.
        image_key, caption_key: suffixes of the images and texts in shards.
        max_unreadable: largest share of the files that may be unreadable when training starts; None skips the check.

    Raises:
        UserError: the folder or the table is missing, or holds no image with a caption.
    """

    folder: ClassVar[str] = ""
    default_crop: ClassVar[str] = "center"

    def __init__(
        self,
        size: int = 256,
        data_root: str | None = None,
        captions: str | None = None,
        crop: str | None = None,
        flip_p: float = 0.0,
        image_key: str = "jpg",
        caption_key: str = "txt",
        max_unreadable: float | None = 0.01,
    ) -> None:
        name = type(self).__name__
        self.size, self.flip_p, self.max_unreadable = size, flip_p, max_unreadable
        self.crop = self.default_crop if crop is None else crop
        self.method = pil_method("bicubic")
        if self.crop not in ("random", "center"):
            raise UserError(f'{name}: crop must be "random" or "center", not "{self.crop}"')
        root = existing_folder(data_root or self.folder, name)
        shards = sorted(root.glob(SHARDS)) if captions is None else []
        self.index = ShardIndex(shards, image_key, caption_key, name) if shards else None
        if self.index is not None:
            self._use_shards(self.index)
            return
        table = find_link_table(root) if captions is None else Path(captions).expanduser()
        rows = find_rows(name, root, None) if table is None else rows_of_links(name, root, table)
        if table is None:
            add_captions(rows, FROM_TEXT_FILE)
            rows.log_others([caption_file(file) for file in rows.files])
        super().__init__(rows.paths, {"caption": rows.entries["caption"], "relative_file_path_": rows.files})

    def _use_shards(self, index: ShardIndex) -> None:
        super().__init__([], {"caption": index.captions})
        self.paths = index.paths()  # names for messages
        self.unreadable = UnreadableFiles(len(index))

    def check_files(self) -> None:
        """Find the files that cannot be read and log them in one line; of shards, a part of the images is decoded.

        Raises:
            UserError: their share is larger than `max_unreadable`.
        """
        if self.index is None or self.max_unreadable is None or self.unreadable.is_checked:
            super().check_files()
            return
        chosen = sorted({round(i) for i in np.linspace(0, len(self) - 1, PROBED)})
        faults: dict[int, str] = {}
        for number, index in enumerate(chosen):
            try:
                self.read(index)
            except UserError as error:
                faults[number] = str(error)
        check_share(faults, [str(self.paths[i]) for i in chosen], self.max_unreadable, type(self).__name__)
        self.unreadable.add_checked(chosen[number] for number in faults)

    def entries(self, index: int) -> dict[str, Any]:
        """Return the entries of an item except `image`."""
        item = super().entries(index)
        if self.index is not None:
            item["relative_file_path_"] = "/".join(self.paths[index].parts[-2:])
        return item

    def read(self, index: int) -> Image.Image:
        """Read an image, at a reduced size if it is much larger than `size`.

        Raises:
            UserError: the file is missing or is not an image.
        """
        data = None if self.index is None else self.index.read(index)
        return open_image(self.paths[index], data=data, min_side=OVERSAMPLING * self.size)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index, image = self.readable(index)
        width, height = image.size
        window = find_window(width, height, self.size, self.crop == "random", self.flip_p)
        pixels = np.asarray(window.view(image, self.size, self.method))
        return {**self.entries(index), "image": to_image(pixels)}


class PreviewsTrain(Previews):
    """Images with captions for training: squares at random positions."""

    folder, default_crop = "data/previews/train", "random"


class PreviewsValidation(Previews):
    """Images with captions for validation: central squares."""

    folder = "data/previews/validation"
