"""Classes of the training data in the configuration of a model: their number, their names, and the null class.

The last label of a model that is trained with `cond_dropout` is the null class, which stands for "no class". It is
never a class of the data: a configuration that counts only these gets one label more. The configuration that a run
saves states the number and the names, so that sampling needs no data.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ldm.data.unreadable import shown_names, wrapped
from ldm.errors import UserError
from ldm.models.diffusion.batch_keys import CLASS_KEY, LAYOUT_KEY
from ldm.pipelines.class_names import DEFAULT_CLASSES, read_class_names

logger = logging.getLogger(__name__)

OWN_PACKAGE = "ldm."
EMBEDDER = "ClassEmbedder"


def has_classes(model: DictConfig) -> bool:
    """Return whether the configuration of a model is one of this package with classes or labelled boxes."""
    params = model.get("params")
    if not isinstance(params, DictConfig) or not str(model.get("target")).startswith(OWN_PACKAGE):
        return False
    return params.get("cond_stage_key") in (CLASS_KEY, LAYOUT_KEY) and params.get("conditioning_key") is not None


def add_classes(model: DictConfig, dataset: Any) -> None:
    """Set the number and the names of the classes in the configuration of a model, as the training data has them.

    Args:
        model: the configuration; it is changed.
        dataset: the training data, or a wrapper of it. Nothing changes if its classes are not known.

    Raises:
        UserError: the data has more classes than the model.
    """
    names, count = class_names_of(dataset), class_count(dataset)
    if model.params.cond_stage_key == CLASS_KEY and count:
        _set_count(model.params, count, is_complete=bool(names))
    if names:
        _set_names(model.params, names)


def class_names_of(dataset: Any) -> list[str]:
    """Return the class names of a data set or of one that it wraps; empty if they are not known."""
    for each in wrapped(dataset):
        names = getattr(each, "class_names", None)
        if isinstance(names, Sequence) and not isinstance(names, str) and len(names):
            return [str(name) for name in names]
    return []


def class_count(dataset: Any) -> int:
    """Return the number of classes of a data set or of one that it wraps; 0 if it is not known."""
    highest = -1
    for each in wrapped(dataset):
        labels = getattr(each, "labels", None)
        values = labels.get(CLASS_KEY) if isinstance(labels, Mapping) else None
        if values is not None and len(values):
            highest = max(highest, max(int(value) for value in values))
    return max(highest + 1, len(class_names_of(dataset)))


def check_same_classes(datasets: Mapping[str, Any]) -> None:
    """Check that the data sets number their classes alike.

    Args:
        datasets: name, such as "validation" → data set.

    Raises:
        UserError: the class names of two data sets differ.
    """
    known = {name: names for name, dataset in datasets.items() if (names := class_names_of(dataset))}
    for name, names in known.items():
        first = next(iter(known))
        if names != known[first]:
            different = [each for each in dict.fromkeys([*known[first], *names]) if each not in names] or names
            raise UserError(
                f"data.params.{name} has other classes than data.params.{first} "
                f"({len(names)} and {len(known[first])}; {shown_names(different)}); set class_names of both to one file"
            )


def _set_count(params: DictConfig, count: int, is_complete: bool) -> None:
    """Set the number of labels of the model, so that the null class is none of the `count` classes of the data.

    Args:
        params: parameters of the model.
        count: number of classes of the data.
        is_complete: whether the data set states all of its classes; then a default number is replaced as well.
    """
    owner, key = _owner_of_count(params)
    if owner is None:
        return
    dropout = bool(params.get("cond_dropout"))
    needed, present = count + dropout, owner.get(key)
    if present is None and not is_complete:
        present = DEFAULT_CLASSES
    if present is None or (dropout and present == count):
        OmegaConf.update(owner, key, needed)
        null_class = " and the null class of cond_dropout" if dropout else ""
        logger.info("%s of the model is %d: the %d classes of the data%s", key, needed, count, null_class)
    elif isinstance(present, int) and present < needed:
        raise UserError(f"{key} of the model is {present}, and the data has {count} classes; set {key} to {needed}")


def _owner_of_count(params: DictConfig) -> tuple[DictConfig | None, str]:
    """Return the parameters that state the number of labels, and its name."""
    stage, unet = params.get("cond_stage_config"), params.get("unet_config")
    if isinstance(stage, DictConfig) and str(stage.get("target")).rpartition(".")[2] == EMBEDDER:
        if stage.get("params") is None:
            stage.params = {}
        return stage.params, "n_classes"
    unet_params = unet.get("params") if isinstance(unet, DictConfig) else None
    if isinstance(unet_params, DictConfig) and unet_params.get("num_classes") is not None:
        return unet_params, "num_classes"
    return None, ""


def _set_names(params: DictConfig, names: Sequence[str]) -> None:
    """Set the names of the classes of the model, or warn if it has others."""
    source = params.get("class_names")
    if not source:
        params.class_names = list(names)
        return
    present = [each[0] for each in read_class_names(source if isinstance(source, str) else list(source))]
    if present != list(names):
        logger.warning(
            "class_names of the model differ from those of the data (%s and %s); sampling would mix up the classes, so "
            "remove class_names of the model, or set it to the same file",
            *(shown_names(present), shown_names(names)),
        )
