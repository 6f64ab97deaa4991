from ldm.modules.losses.lpips import LPIPS, ScalingLayer

__all__ = ["LPIPS", "ScalingLayer"]
