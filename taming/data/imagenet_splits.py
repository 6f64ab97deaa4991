from ldm.data.imagenet import ImageNetBase
from ldm.data.imagenet_files import TRAIN, VALIDATION

__all__ = ["ImageNetTrain", "ImageNetValidation"]


class ImageNetTrain(ImageNetBase):
    """Training images of ImageNet; the first parameter is `config`."""

    split = TRAIN
    random_crop = True


class ImageNetValidation(ImageNetBase):
    """Validation images of ImageNet; the first parameter is `config`."""

    split = VALIDATION
