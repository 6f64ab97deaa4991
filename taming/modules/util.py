from typing import Any

import torch
from torch import Tensor

from ldm.modules.encoders.modules import AbstractEncoder
from ldm.modules.losses.discriminator import ActNorm
from ldm.util import count_params

__all__ = ["AbstractEncoder", "ActNorm", "Labelator", "SOSProvider", "count_params"]


class Labelator(AbstractEncoder):
    """Encoder of class labels (B,) as tokens (B, 1).

    Args:
        n_classes: number of classes.
        quantize_interface: return the tokens as a first stage returns its indices.
    """

    def __init__(self, n_classes: int, quantize_interface: bool = True) -> None:
        super().__init__()
        self.n_classes = n_classes
        self.quantize_interface = quantize_interface

    def encode(self, c: Tensor) -> Any:
        """Return the tokens, or `(tokens, None, [None, None, int64 tokens])` with `quantize_interface`."""
        tokens = c[:, None]
        return (tokens, None, [None, None, tokens.long()]) if self.quantize_interface else tokens


class SOSProvider(AbstractEncoder):
    """Encoder that returns the start token for every item: (B, 1).

    Args:
        sos_token: the token.
        quantize_interface: return the tokens as a first stage returns its indices.
    """

    def __init__(self, sos_token: int, quantize_interface: bool = True) -> None:
        super().__init__()
        self.sos_token = sos_token
        self.quantize_interface = quantize_interface

    def encode(self, x: Tensor) -> Any:
        """Return the tokens, or `(tokens, None, [None, None, tokens])` with `quantize_interface`."""
        tokens = torch.full((len(x), 1), self.sos_token, dtype=torch.long, device=x.device)
        return (tokens, None, [None, None, tokens]) if self.quantize_interface else tokens
