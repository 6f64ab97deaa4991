"""Published names of the learning-rate schedules, re-exported from `ldm.training.lr_scheduler`."""

from ldm.training.lr_scheduler import (
    LambdaLinearScheduler,
    LambdaWarmUpCosineScheduler,
    LambdaWarmUpCosineScheduler2,
)

__all__ = ["LambdaLinearScheduler", "LambdaWarmUpCosineScheduler", "LambdaWarmUpCosineScheduler2"]
