from ldm.data.faceshq import CelebAHQTrain, CelebAHQValidation, FacesBase, FFHQTrain, FFHQValidation
from taming.data.base import ConcatDatasetWithIndex, ImagePaths, NumpyPaths

__all__ = [
    "CelebAHQTrain",
    "CelebAHQValidation",
    "ConcatDatasetWithIndex",
    "FFHQTrain",
    "FFHQValidation",
    "FacesBase",
    "ImagePaths",
    "NumpyPaths",
]
