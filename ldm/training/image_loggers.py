"""Images in Lightning's loggers, whose interfaces differ."""

from __future__ import annotations

from typing import Any

import numpy as np


def log_image(run_logger: Any, key: str, image: np.ndarray, step: int) -> None:
    """Log an image (H, W, 3) uint8 under `key`. A logger that has no method for images is left out.

    Args:
        run_logger: a logger with `log_image` such as `WandbLogger`; or one whose `experiment` has `add_image` or
            `add_images` as that of `TensorBoardLogger`, or `log_image` as those of `CometLogger` and `MLFlowLogger`.
        key: name of the image.
        image: the image.
        step: step of the training.
    """
    if hasattr(run_logger, "log_image"):
        run_logger.log_image(key, [image], step=step)
        return
    experiment: Any = getattr(run_logger, "experiment", None)
    if hasattr(experiment, "add_image"):
        experiment.add_image(key, image, global_step=step, dataformats="HWC")
    elif hasattr(experiment, "add_images"):
        experiment.add_images(key, image[None], global_step=step, dataformats="NHWC")
    elif hasattr(experiment, "log_image") and hasattr(run_logger, "run_id"):  # MLflow
        experiment.log_image(run_logger.run_id, image, key=key, step=step)
    elif hasattr(experiment, "log_image"):  # Comet
        experiment.log_image(image, name=key, step=step)
