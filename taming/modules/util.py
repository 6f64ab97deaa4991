from ldm.modules.losses.discriminator import ActNorm
from ldm.util import count_params

__all__ = ["ActNorm", "count_params"]
