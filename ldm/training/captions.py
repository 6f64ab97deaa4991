"""Warning about training captions with more tokens than the model reads."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from ldm.modules.encoders.truncation import describe, find_truncation

log = logging.getLogger(__name__)


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


def _captions(model: Any, batch: Any) -> list[str]:
    """Return the texts that `batch` holds for the conditioning stage of `model`; empty if there are none."""
    values = batch.get(getattr(model, "cond_stage_key", None)) if isinstance(batch, Mapping) else None
    return [value for value in values if isinstance(value, str)] if isinstance(values, list | tuple) else []
