"""Random degradations of photographs, to train super-resolution that works outside the laboratory."""

from ldm.modules.image_degradation.bsrgan import degradation_fn_bsr, degradation_fn_bsr_light

__all__ = ["degradation_fn_bsr", "degradation_fn_bsr_light"]
