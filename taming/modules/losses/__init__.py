from ldm.modules.losses.contperceptual import DummyLoss

__all__ = ["DummyLoss"]
