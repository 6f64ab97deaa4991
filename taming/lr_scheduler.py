from ldm.training.lr_scheduler import LambdaWarmUpCosineScheduler

__all__ = ["LambdaWarmUpCosineScheduler"]
