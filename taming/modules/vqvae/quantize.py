from ldm.modules.quantize import VectorQuantizer2

# The older quantizer computed the same with more memory.
VectorQuantizer = VectorQuantizer2

__all__ = ["VectorQuantizer", "VectorQuantizer2"]
