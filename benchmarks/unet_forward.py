"""Time one step's work: the text-conditional U-Net on two latents, here and in diffusers.

python benchmarks/unet_forward.py --json unet_forward.json
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

BATCH = 2  # one picture, guided


def contestants(
    size: nets.Sizes, dtype: torch.dtype, device: torch.device, prepared: ExitStack
) -> dict[str, Callable[[], object]]:
    """The networks by name, each as a call without arguments."""
    import torch

    from benchmarks import architectures as nets
    from benchmarks.timing import PREPARED, default_dtype, networks_to_compare
    from ldm.modules.attention import cached_contexts
    from ldm.modules.packing import packed_weights

    with default_dtype(dtype), device:
        ours, theirs = nets.text_unet(size), nets.diffusers_text_unet(size)
    networks = networks_to_compare(ours, theirs)
    prepared.enter_context(packed_weights(networks[PREPARED]))
    prepared.enter_context(cached_contexts(networks[PREPARED]))
    x = torch.randn(BATCH, nets.LATENT_CHANNELS, size.latent, size.latent, device=device).to(dtype)
    t, context = torch.tensor([500] * BATCH, device=device), torch.randn(BATCH, *size.context, device=device).to(dtype)
    return {name: lambda network=network: network(x, t, context) for name, network in networks.items()}


@command
def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    args = make_parser("Time the text-conditional U-Net, here and in diffusers.").parse_args(argv)

    import torch

    from benchmarks import architectures as nets
    from benchmarks.timing import Report, begin, compare, flops_of

    device, size, report = begin(args), nets.sizes(args.tiny), Report("unet_forward", args)
    with torch.device("meta"):
        unet = nets.text_unet(size)
    latents = (BATCH, nets.LATENT_CHANNELS, size.latent, size.latent)
    flops = flops_of(unet, latents, (BATCH,), (BATCH, *size.context))
    for name in args.precision:
        dtype = getattr(torch, name)
        with torch.no_grad(), ExitStack() as prepared:
            compare(report, contestants(size, dtype, device, prepared), device, dtype, flops)
    report.finish()


if __name__ == "__main__":
    sys.exit(main())
