import torch.nn.functional as F
from torch import Tensor, nn


class BCELoss(nn.Module):
    """Binary cross-entropy of logits, with an empty log."""

    def forward(self, prediction: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, averaged over all elements, and the values to log."""
        return F.binary_cross_entropy_with_logits(prediction, target), {}


class BCELossWithQuant(nn.Module):
    """Binary cross-entropy of logits plus the loss of a quantizer, weighted by `codebook_weight`."""

    def __init__(self, codebook_weight: float = 1.0) -> None:
        super().__init__()
        self.codebook_weight = codebook_weight

    def forward(
        self, qloss: Tensor, target: Tensor, prediction: Tensor, split: str
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, and the values to log under names that begin with `split`."""
        bce_loss = F.binary_cross_entropy_with_logits(prediction, target)
        loss = bce_loss + self.codebook_weight * qloss
        log = {"total_loss": loss.detach().mean(), "bce_loss": bce_loss.detach().mean(), "quant_loss": qloss.detach()}
        return loss, {f"{split}/{name}": value for name, value in log.items()}
