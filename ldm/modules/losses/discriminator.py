"""Patch discriminator (PatchGAN, arXiv:1611.07004) and its normalization."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ldm.errors import UserError


def weights_init(m: nn.Module) -> None:
    """Initialise a module for `Module.apply` (arXiv:1511.06434).

    Kernels are sampled from N(0, 0.02) and batch-norm scales from N(1, 0.02). Batch-norm shifts are 0.
    """
    if isinstance(m, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(m.weight, 0.0, 0.02)
    elif isinstance(m, nn.BatchNorm2d):
        nn.init.normal_(m.weight, 1.0, 0.02)
        nn.init.zeros_(m.bias)


class ActNorm(nn.Module):
    """Activation normalization: a shift and a scale per channel, initialised from a batch (arXiv:1807.03039).

    Args:
        num_features: number of channels.
        logdet: also return the log-determinant of the Jacobian.
        affine: must be True.
        allow_reverse_init: allow `reverse` to initialise the parameters.
    """

    initialized: Tensor

    def __init__(
        self, num_features: int, logdet: bool = False, affine: bool = True, allow_reverse_init: bool = False
    ) -> None:
        if not affine:
            raise ValueError("ActNorm is always affine")
        super().__init__()
        self.logdet = logdet
        self.allow_reverse_init = allow_reverse_init
        self.loc = nn.Parameter(torch.zeros(1, num_features, 1, 1))
        self.scale = nn.Parameter(torch.ones(1, num_features, 1, 1))
        self.register_buffer("initialized", torch.tensor(0, dtype=torch.uint8))

    @torch.no_grad()
    def initialize(self, input: Tensor) -> None:
        """Set the parameters so that the channels of `input` (B, C, H, W) are mapped to mean 0 and deviation 1.

        An input with values that are not finite is left for the next call.
        """
        std, mean = torch.std_mean(input, dim=(0, 2, 3), keepdim=True)
        if not std.isfinite().all():
            return
        self.loc.copy_(-mean)
        self.scale.copy_(1.0 / (std + 1e-6))
        self.initialized.fill_(1)

    def forward(self, input: Tensor, reverse: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Return `scale * (input + loc)`, and with `logdet` also the log-determinant (B,) of each image.

        Args:
            input: (B, C, H, W) or (B, C).
            reverse: see `reverse`.
        """
        if reverse:
            return self.reverse(input)
        x = _as_map(input)
        if self.training and not self.initialized:
            self.initialize(x)
        output = (self.scale * (x + self.loc)).view(input.shape)
        if not self.logdet:
            return output
        determinant = x.shape[2] * x.shape[3] * self.scale.abs().log().sum()
        return output, determinant.expand(x.shape[0])

    def reverse(self, output: Tensor) -> Tensor:
        """Return the input that `forward` maps to `output`, (B, C, H, W) or (B, C).

        Raises:
            RuntimeError: the parameters are not initialised, in training mode and without `allow_reverse_init`.
        """
        x = _as_map(output)
        if self.training and not self.initialized:
            if not self.allow_reverse_init:
                raise RuntimeError("ActNorm.reverse was called before the first forward pass; set allow_reverse_init")
            self.initialize(x)
        return (x / self.scale - self.loc).view(output.shape)


def _as_map(x: Tensor) -> Tensor:
    return x[:, :, None, None] if x.dim() == 2 else x


class NLayerDiscriminator(nn.Module):
    """Discriminator of overlapping image patches: positive logits for real images, negative for generated ones.

    Args:
        input_nc: channels of the image.
        ndf: channels after the first convolution, doubled by each layer up to `8 * ndf`.
        n_layers: convolutions between the first and the last; all except the last of them halve the resolution.
        use_actnorm: use `ActNorm` instead of batch normalization.
    """

    def __init__(self, input_nc: int = 3, ndf: int = 64, n_layers: int = 3, use_actnorm: bool = False) -> None:
        super().__init__()
        norm_layer = ActNorm if use_actnorm else nn.BatchNorm2d
        layers: list[nn.Module] = [
            nn.Conv2d(input_nc, ndf, kernel_size=4, stride=2, padding=1),
            nn.LeakyReLU(0.2, True),
        ]
        channels = ndf
        for n in range(1, n_layers + 1):
            width = ndf * min(2**n, 8)
            stride = 2 if n < n_layers else 1
            # The shift of batch normalization replaces the bias.
            layers += [
                nn.Conv2d(channels, width, kernel_size=4, stride=stride, padding=1, bias=use_actnorm),
                norm_layer(width),
                nn.LeakyReLU(0.2, True),
            ]
            channels = width
        layers.append(nn.Conv2d(channels, 1, kernel_size=4, stride=1, padding=1))
        self.main = nn.Sequential(*layers)
        self.in_channels = input_nc
        self.min_size = 3 * 2**n_layers  # the two convolutions without stride remove one row each

    def forward(self, input: Tensor) -> Tensor:
        """Map (B, input_nc, H, W) to one logit per patch, (B, 1, h, w).

        Raises:
            UserError: the images are too small for the number of layers.
        """
        if min(input.shape[2:]) < self.min_size:
            raise UserError(
                f"images of {input.shape[2]} x {input.shape[3]} pixels are too small for the discriminator, "
                f"which needs {self.min_size} x {self.min_size}; lower disc_num_layers"
            )
        return self.main(input)
