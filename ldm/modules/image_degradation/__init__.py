"""Random degradations of photographs, for the training of super-resolution on real images."""

from ldm.modules.image_degradation.bsrgan import degradation_fn_bsr, degradation_fn_bsr_light

__all__ = ["degradation_fn_bsr", "degradation_fn_bsr_light"]
