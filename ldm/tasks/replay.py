"""Drawing a picture again from what it says of itself."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.config.assets import locate
from ldm.config.model_files import ModelFiles, find_model
from ldm.errors import UserError
from ldm.tasks.metadata import Origin, Record
from ldm.tasks.registry import find_task

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Comparison:
    """A picture and the same drawn again."""

    path: Path
    again: np.ndarray
    shape: tuple[int, ...]  # of the picture in the file
    different: int  # pixels
    largest: int  # difference of a channel, in levels of 255

    @property
    def identical(self) -> bool:
        return self.different == 0 and self.shape == self.again.shape

    def __str__(self) -> str:
        if self.identical:
            return f"{self.path}: identical"
        if self.shape != self.again.shape:
            return f"{self.path}: DIFFERENT, {self.shape} in the file, {self.again.shape} drawn again"
        pixels = self.shape[0] * self.shape[1]
        return f"{self.path}: DIFFERENT in {self.different} of {pixels} pixels, by {self.largest}/255 at most"


def model_of(origin: Origin, name: str | None, config: str | None, ckpt: str | None) -> ModelFiles:
    """The model that drew a picture, or the one that the options name instead.

    Raises:
        UserError: it is not there.
    """
    files = find_model(name, config, ckpt)
    if files is not None:
        return files
    config, checkpoint = locate(origin.config), locate(origin.checkpoint)
    for path in (config, checkpoint):
        if not path.is_file():
            raise UserError(
                f'the model "{origin.model}" was at "{path}" and is not there; name it with --model or --ckpt'
            )
    return ModelFiles(origin.model, config, checkpoint)


def replay(record: Record, path: Path, load: Callable[[Origin], Any]) -> Comparison:
    """Draw the picture of `record` again and compare it with `path`, from which the record was read.

    Args:
        load: gives the model for an origin, ready to sample.

    Raises:
        UserError: an input is missing or has changed, or the record is damaged.
    """
    import numpy as np
    from tqdm import tqdm

    from ldm.io.images import open_image
    from ldm.pipelines.sampling import prepared
    from ldm.tasks.run import Picture, draw_batch

    task, settings = find_task(record.origin.task), dict(record.origin.settings)
    model = load(record.origin)
    try:
        loaded = task.load(record.inputs, settings)
        # Copies fill the batch, because the size of a batch decides the last bits of its results.
        batch = [Picture(0, record.seed, record.inputs, loaded)] * record.place.batch
        with prepared(model), tqdm(desc=path.name, unit="step", total=task.steps(settings, loaded)) as progress:
            again = draw_batch(task, model, batch, settings, progress)[record.place.position]
    except (KeyError, TypeError, ValueError) as error:  # something that the task wrote is missing or is something else
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f'what "{path}" says of its drawing is damaged, or needs another version: {reason}') from error
    before = np.asarray(open_image(path))
    if before.shape != again.shape:
        return Comparison(path, again, before.shape, 0, 0)
    difference = np.abs(before.astype(int) - again).max(axis=-1)
    return Comparison(path, again, before.shape, int((difference > 0).sum()), int(difference.max()))
