from collections.abc import Iterable

from ldm.data.imagenet import ImageNetBase, parse_indices
from ldm.data.imagenet_files import read_index_of_synsets
from taming.data.base import ImagePaths
from taming.data.imagenet_depth import (
    BaseWithDepth,
    DRINExamples,
    ImageNetTrainWithDepth,
    ImageNetValidationWithDepth,
    RINTrainWithDepth,
    RINValidationWithDepth,
    rgba_to_depth,
)
from taming.data.imagenet_scale import (
    ImageNetEdges,
    ImageNetEdgesTrain,
    ImageNetEdgesValidation,
    ImageNetScale,
    ImageNetScaleTrain,
    ImageNetScaleValidation,
)
from taming.data.imagenet_splits import ImageNetTrain, ImageNetValidation
from taming.data.preprocessing import get_preprocessor, imscale
from taming.util import download, retrieve

__all__ = [
    "BaseWithDepth",
    "DRINExamples",
    "ImageNetBase",
    "ImageNetEdges",
    "ImageNetEdgesTrain",
    "ImageNetEdgesValidation",
    "ImageNetScale",
    "ImageNetScaleTrain",
    "ImageNetScaleValidation",
    "ImageNetTrain",
    "ImageNetTrainWithDepth",
    "ImageNetValidation",
    "ImageNetValidationWithDepth",
    "ImagePaths",
    "RINTrainWithDepth",
    "RINValidationWithDepth",
    "download",
    "get_preprocessor",
    "give_synsets_from_indices",
    "imscale",
    "retrieve",
    "rgba_to_depth",
    "str_to_indices",
]


def give_synsets_from_indices(
    indices: Iterable[int], path_to_yaml: str = "data/imagenet_idx_to_synset.yaml"
) -> list[str]:
    """Return the synsets of the indices, from a YAML file with lines such as `0: n01440764`.

    Raises:
        UserError: the file is missing, or is not such a list.
        KeyError: it does not list an index.
    """
    synsets = read_index_of_synsets(path_to_yaml)
    return [synsets[index] for index in indices]


def str_to_indices(string: str) -> list[int]:
    """Return the sorted indices in a text such as "32-123, 256", the last one of a range included.

    Raises:
        UserError: the text is not a list of indices and ranges.
    """
    return parse_indices(string, 2**63)
