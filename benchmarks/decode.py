"""Time the decoder with factor 8: one picture from its latent, here and in diffusers.

python benchmarks/decode.py --json decode.json
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a bare clone too

from benchmarks.options import make_parser
from ldm.cli.command import command

if TYPE_CHECKING:  # torch and diffusers take seconds to import; mistakes are told before
    import torch

    from benchmarks import architectures as nets


def contestants(
    size: nets.Sizes, dtype: torch.dtype, device: torch.device, prepared: ExitStack
) -> dict[str, Callable[[], object]]:
    """The decoders by name, each as a call without arguments."""
    import torch

    from benchmarks import architectures as nets
    from benchmarks.timing import PREPARED, default_dtype, networks_to_compare
    from ldm.modules.packing import packed_weights

    with default_dtype(dtype), device:
        ours, theirs = nets.autoencoder(size), nets.diffusers_autoencoder(size)
    networks = networks_to_compare(ours, theirs)
    prepared.enter_context(packed_weights(*networks[PREPARED].children()))
    z = torch.randn(1, nets.LATENT_CHANNELS, size.latent, size.latent, device=device).to(dtype)
    return {name: lambda network=network: network.decode(z) for name, network in networks.items()}


@command
def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    args = make_parser("Time the decoder with factor 8, here and in diffusers.").parse_args(argv)

    import torch

    from benchmarks import architectures as nets
    from benchmarks.timing import Report, begin, compare, flops_of

    device, size, report = begin(args), nets.sizes(args.tiny), Report("decode", args)
    with torch.device("meta"):
        decoder = nets.autoencoder(size).decoder
    flops = flops_of(decoder, (1, nets.LATENT_CHANNELS, size.latent, size.latent))
    for name in args.precision:
        dtype = getattr(torch, name)
        with torch.no_grad(), ExitStack() as prepared:
            compare(report, contestants(size, dtype, device, prepared), device, dtype, flops)
    report.finish()


if __name__ == "__main__":
    sys.exit(main())
