from ldm.data.faceshq import (
    CelebAHQTrain,
    CelebAHQValidation,
    ConcatDatasetWithIndex,
    FacesBase,
    FacesHQTrain,
    FacesHQValidation,
    FFHQTrain,
    FFHQValidation,
)
from taming.data.base import ImagePaths, NumpyPaths

__all__ = [
    "CelebAHQTrain",
    "CelebAHQValidation",
    "ConcatDatasetWithIndex",
    "FFHQTrain",
    "FFHQValidation",
    "FacesBase",
    "FacesHQTrain",
    "FacesHQValidation",
    "ImagePaths",
    "NumpyPaths",
]
