"""Warnings about training captions that the model does not read completely."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from ldm.data.unreadable import wrapped
from ldm.modules.encoders.caption_statistics import CaptionStatistics
from ldm.modules.encoders.truncation import describe, find_truncation
from ldm.training.latents import CachedLatents

log = logging.getLogger(__name__)

SAMPLED = 2000  # captions of a data set that the report at the start covers


class CaptionWarning:
    """Warning about the first caption of a run whose end the model does not read.

    Long captions are usual in training data, so the run logs one line and not one for each of them.
    """

    def __init__(self) -> None:
        self.is_logged = False

    def check(self, model: Any, batch: Any) -> None:
        """Log the first such caption of `batch`, unless one was logged before."""
        if self.is_logged:
            return
        stage, captions = getattr(model, "cond_stage_model", None), _captions(model, batch)
        for text in captions:
            found = find_truncation(stage, text)
            if found is not None:
                self.is_logged = True
                log.warning("%s; other captions are cut without a message", describe(text, found, "training caption"))
                return


def report_captions(model: Any, dataset: Any) -> bool:
    """Log the shares of the training captions that are cut, and of their words that the vocabulary lacks.

    It covers up to `SAMPLED` captions, in equal distances, of a data set that returns them without its images.

    Returns:
        Whether the data set returns its captions in that way.
    """
    stage, key = getattr(model, "cond_stage_model", None), getattr(model, "cond_stage_key", None)
    if not callable(getattr(stage, "truncation", None)):
        return False
    captions = sampled_captions(dataset, key)
    if captions is None:
        return False
    for message in CaptionStatistics.of(stage, captions).messages(len(dataset)):
        log.warning("%s", message)
    return True


def sampled_captions(dataset: Any, key: Any, count: int = SAMPLED) -> list[str] | None:
    """Return up to `count` captions of a data set, without reading its images; None if it cannot return them alone.

    Args:
        dataset: a data set with a method `entries`, one of cached latents, or a wrapper of one.
        key: entry of an item that holds its caption.
        count: number of captions.
    """
    source = next(filter(_returns_entries, wrapped(dataset)), None)
    if source is None:
        return None
    step = max(1, -(-len(source) // count))
    captions = [_entry(source, index, key) for index in range(0, len(source), step)]
    return captions if all(isinstance(caption, str) for caption in captions) else None


def _returns_entries(dataset: Any) -> bool:
    """Return whether a data set returns the texts of an item without its image."""
    return isinstance(dataset, CachedLatents) or callable(getattr(dataset, "entries", None))


def _entry(dataset: Any, index: int, key: Any) -> Any:
    if isinstance(dataset, CachedLatents):
        return dataset.fields[key][index] if key in dataset.fields else None
    return dataset.entries(index).get(key)


def _captions(model: Any, batch: Any) -> list[str]:
    """Return the texts that `batch` holds for the conditioning stage of `model`; empty if there are none."""
    values = batch.get(getattr(model, "cond_stage_key", None)) if isinstance(batch, Mapping) else None
    return [value for value in values if isinstance(value, str)] if isinstance(values, list | tuple) else []
