"""Time the decoder with factor 8 on one image, here and in diffusers.

python -m benchmarks.decode --json decode.json
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

from benchmarks.options import make_parser
from ldm.cli.command import command

if TYPE_CHECKING:
    import torch

    from benchmarks import architectures as nets


def contestants(
    size: nets.Sizes, dtype: torch.dtype, device: torch.device, preparation: ExitStack
) -> dict[str, Callable[[], object]]:
    """Return the decoders by name, each as a function without arguments.

    Args:
        preparation: gets the packed weights.
    """
    import torch

    from benchmarks import architectures as nets
    from benchmarks.timing import AS_SAMPLED, default_dtype, networks_to_compare
    from ldm.modules.packing import packed_weights

    with default_dtype(dtype), device:
        ours, theirs = nets.autoencoder(size), nets.diffusers_autoencoder(size)
    networks = networks_to_compare(ours, theirs)
    preparation.enter_context(packed_weights(*networks[AS_SAMPLED].children()))
    z = torch.randn(1, nets.LATENT_CHANNELS, size.latent, size.latent, device=device).to(dtype)
    return {name: partial(network.decode, z) for name, network in networks.items()}


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = make_parser("decode", "Time the decoder with factor 8, here and in diffusers.").parse_args(argv)

    import torch

    from benchmarks import architectures as nets
    from benchmarks.timing import Report, begin, compare, flops_of

    device, size, report = begin(args), nets.sizes(args.tiny), Report("decode", args)
    with torch.device("meta"):
        decoder = nets.autoencoder(size).decoder
    flops = flops_of(decoder, (1, nets.LATENT_CHANNELS, size.latent, size.latent))
    for name in args.precision:
        dtype = getattr(torch, name)
        with torch.no_grad(), ExitStack() as preparation:
            compare(report, contestants(size, dtype, device, preparation), device, dtype, flops)
    report.finish()


if __name__ == "__main__":
    sys.exit(main())
