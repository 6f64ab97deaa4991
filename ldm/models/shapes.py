"""Checks of images and latents against the shapes that the networks of a model accept."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ldm.errors import UserError


def check_channels(x: Tensor, channels: int, network: str, option: str) -> None:
    """Raise UserError if `x` (B, C, H, W) has another number of channels than `network`, which `option` sets."""
    if x.shape[1] != channels:
        raise UserError(
            f"{network} takes {channels} channels and gets {x.shape[1]}; "
            f"change {option} or the channels of the data set"
        )


def check_sides(x: Tensor, multiple: int, network: str, pixels: int = 1) -> None:
    """Raise UserError if the sides of `x` (B, C, H, W) are not multiples of `multiple`, as `network` needs.

    Args:
        x: images or latents.
        multiple: number that height and width must be multiples of.
        network: name of the network.
        pixels: pixels per position of `x` in each direction.
    """
    height, width = x.shape[2:]
    if height % multiple or width % multiple:
        raise UserError(
            f"images of {height * pixels} x {width * pixels} pixels do not fit {network}, which halves their sides: "
            f"these must be multiples of {multiple * pixels}; change the size of the data set"
        )


def check_same_sides(x: Tensor, concat: Sequence[Tensor]) -> None:
    """Raise UserError if a map of the conditioning, which is concatenated with `x`, has other sides."""
    for c in concat:
        if c.shape[2:] != x.shape[2:]:
            (h, w), (height, width) = c.shape[2:], x.shape[2:]
            raise UserError(
                f"the conditioning is a map of {h} x {w} and the model works on {height} x {width}; "
                "change the size of the images or of the conditioning in the data set"
            )


def check_network_input(network: nn.Module, x: Tensor, concat: Sequence[Tensor], pixels: int) -> None:
    """Raise UserError if `x` (B, C, H, W), concatenated with maps, does not fit a denoising network.

    Args:
        network: a `UNetModel`, or a network that states neither its channels nor its downsampling.
        x: images or latents.
        concat: the maps.
        pixels: pixels per position of `x` in each direction.
    """
    check_same_sides(x, concat)
    channels = getattr(network, "in_channels", None)
    if channels is not None:
        check_channels(x, channels - sum(c.shape[1] for c in concat), "the U-Net", "in_channels of unet_config")
    check_sides(x, getattr(network, "downsampling", 1), "the U-Net", pixels)
