from ldm.modules.diffusionmodules.model import (
    AttnBlock,
    Decoder,
    Downsample,
    Encoder,
    Normalize,
    ResnetBlock,
    Upsample,
    make_attn,
    nonlinearity,
)
from ldm.modules.diffusionmodules.published import Model, SimpleDecoder, UpsampleDecoder, get_timestep_embedding

__all__ = [
    "AttnBlock",
    "Decoder",
    "Downsample",
    "Encoder",
    "Model",
    "Normalize",
    "ResnetBlock",
    "SimpleDecoder",
    "Upsample",
    "UpsampleDecoder",
    "get_timestep_embedding",
    "make_attn",
    "nonlinearity",
]
