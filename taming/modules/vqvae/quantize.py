from ldm.modules.quantize import VectorQuantizer2

# VectorQuantizer computes the same result as VectorQuantizer2.
VectorQuantizer = VectorQuantizer2

__all__ = ["VectorQuantizer", "VectorQuantizer2"]
