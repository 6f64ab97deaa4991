"""Few images of one object or style with captions from templates, for textual inversion and LoRA.

Shapes: images (S, S, 3) float32 in [-1, 1].
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

from ldm.data.image_files import ListedImages, crop_square, pil_method, to_image
from ldm.errors import UserError, did_you_mean

# The templates that CLIP's authors use to describe an object (arXiv:2103.00020), and for a style. {} is the token.
OBJECT = (
    "a photo of a {}",
    "a rendering of a {}",
    "a cropped photo of the {}",
    "the photo of a {}",
    "a photo of a clean {}",
    "a photo of a dirty {}",
    "a dark photo of the {}",
    "a photo of my {}",
    "a photo of the cool {}",
    "a close-up photo of a {}",
    "a bright photo of the {}",
    "a cropped photo of a {}",
    "a photo of the {}",
    "a good photo of the {}",
    "a photo of one {}",
    "a close-up photo of the {}",
    "a rendition of the {}",
    "a photo of the clean {}",
    "a rendition of a {}",
    "a photo of a nice {}",
    "a good photo of a {}",
    "a photo of the nice {}",
    "a photo of the small {}",
    "a photo of the weird {}",
    "a photo of the large {}",
    "a photo of a cool {}",
    "a photo of a small {}",
)
STYLE = (
    "a painting in the style of {}",
    "a rendering in the style of {}",
    "a cropped painting in the style of {}",
    "the painting in the style of {}",
    "a clean painting in the style of {}",
    "a dirty painting in the style of {}",
    "a dark painting in the style of {}",
    "a picture in the style of {}",
    "a cool painting in the style of {}",
    "a close-up painting in the style of {}",
    "a bright painting in the style of {}",
    "a cropped painting in the style of {}",
    "a good painting in the style of {}",
    "a close-up painting in the style of {}",
    "a rendition in the style of {}",
    "a nice painting in the style of {}",
    "a small painting in the style of {}",
    "a weird painting in the style of {}",
    "a large painting in the style of {}",
)
TEMPLATES = {"object": OBJECT, "style": STYLE}


class PersonalizedBase(ListedImages):
    """Data set of the images in a folder with captions from templates, under the published name.

    Items: `image`, `caption`, `file_path_` and `relative_file_path_`. In training each image occurs `repeats` times,
    each time with the next template, and PyTorch's global generator determines whether it is mirrored. Otherwise it
    occurs once and is not mirrored.

    Args:
        data_root: the folder of the images.
        size: S.
        repeats: number of times that an epoch contains each image in training.
        interpolation: method of Pillow for resizing, such as "bicubic".
        flip_p: probability of mirroring an image.
        set: "train", or another name for validation.
        placeholder_token: the token that stands for the object in the captions.
        per_image_tokens: accepted for published configurations that do not use it.
        center_crop: crop a square at the centre first. Otherwise images that are not square change their proportions.
        mixing_prob: accepted for published configurations; only `per_image_tokens` uses it.
        coarse_class_text: a word before the token, such as "dog".
        templates: "object", "style", or texts that contain {}.

    Raises:
        UserError: the folder is missing or contains no image, or a parameter is invalid.
    """

    def __init__(
        self,
        data_root: str,
        size: int = 512,
        repeats: int = 100,
        interpolation: str = "bicubic",
        flip_p: float = 0.5,
        set: str = "train",  # the published name
        placeholder_token: str = "*",
        per_image_tokens: bool = False,
        center_crop: bool = False,
        mixing_prob: float = 0.25,
        coarse_class_text: str | None = None,
        templates: Any = "object",
    ) -> None:
        super().__init__(data_root=data_root)
        if per_image_tokens:
            raise UserError("PersonalizedBase: per_image_tokens is not implemented; leave it out")
        if size < 1 or repeats < 1 or not 0.0 <= flip_p <= 1.0:
            raise UserError(
                f"PersonalizedBase: size and repeats must be at least 1 and flip_p between 0 and 1, not {size}, "
                f"{repeats} and {flip_p}"
            )
        self.size, self.center_crop, self.method = size, center_crop, pil_method(interpolation)
        self.is_training = set == "train"
        self.repeats = repeats if self.is_training else 1
        self.flip_p = flip_p if self.is_training else 0.0
        self.subject = f"{coarse_class_text} {placeholder_token}" if coarse_class_text else placeholder_token
        self.templates = _templates(templates)

    def __len__(self) -> int:
        return len(self.paths) * self.repeats

    def image(self, pixels: np.ndarray) -> np.ndarray:
        """Resize to (S, S, 3), and mirror at random."""
        if self.center_crop:
            pixels = crop_square(pixels, min(pixels.shape[:2]))
        resized = np.asarray(Image.fromarray(pixels).resize((self.size, self.size), resample=self.method))
        is_mirrored = self.flip_p > 0 and float(torch.rand(())) < self.flip_p
        return to_image(np.ascontiguousarray(resized[:, ::-1]) if is_mirrored else resized)

    def entries(self, index: int) -> dict[str, Any]:
        """Return the entries of an item except `image`, without opening the file."""
        repetition, image = divmod(index, len(self.paths))
        template = self.templates[(repetition + image) % len(self.templates)]
        return {**super().entries(image), "caption": template.replace("{}", self.subject)}

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]  # an IndexError ends an iteration over the items
        repetition, image = divmod(index, len(self.paths))
        image, pixels = self.readable(image)
        return {**self.entries(repetition * len(self.paths) + image), "image": self.image(pixels)}


def _templates(templates: Any) -> tuple[str, ...]:
    if isinstance(templates, str) and templates in TEMPLATES:
        return TEMPLATES[templates]
    if isinstance(templates, str):
        hint = did_you_mean(templates, TEMPLATES)
        raise UserError(f'PersonalizedBase: there are no templates "{templates}"{hint}; give object, style or a list')
    texts = tuple(templates)
    if not texts or not all(isinstance(text, str) and "{}" in text for text in texts):
        raise UserError("PersonalizedBase: templates must be a list of texts with {}, such as [a photo of a {}]")
    return texts
