from collections.abc import Iterable

from ldm.data.imagenet import ImageNetBase, parse_indices, read_index_of_synsets
from taming.data.base import ImagePaths
from taming.util import download, retrieve

__all__ = [
    "ImageNetBase",
    "ImageNetTrain",
    "ImageNetValidation",
    "ImagePaths",
    "download",
    "give_synsets_from_indices",
    "retrieve",
    "str_to_indices",
]


class ImageNetTrain(ImageNetBase):
    """Training images of ImageNet; the first parameter is `config`."""

    name = "ILSVRC2012_train"
    random_crop = True


class ImageNetValidation(ImageNetBase):
    """Validation images of ImageNet; the first parameter is `config`."""

    name = "ILSVRC2012_validation"


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
