"""Time the text-conditional U-Net on two latents, the work of a guided step, here and in diffusers.

python -m benchmarks.unet_forward --json unet_forward.json
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

from benchmarks.options import add_stable_diffusion, make_parser
from ldm.cli.command import command

if TYPE_CHECKING:
    import torch

    from benchmarks import architectures as nets

BATCH = 2  # one image with guidance


def contestants(
    size: nets.Sizes, dtype: torch.dtype, device: torch.device, preparation: ExitStack
) -> dict[str, Callable[[], object]]:
    """Return the networks by name, each as a function without arguments.

    Args:
        preparation: gets the packed weights and the cached contexts.
    """
    import torch

    from benchmarks import architectures as nets
    from benchmarks.timing import AS_SAMPLED, default_dtype, networks_to_compare
    from ldm.modules.attention import cached_contexts
    from ldm.modules.packing import packed_weights

    with default_dtype(dtype), device:
        ours, theirs = nets.text_unet(size), nets.diffusers_text_unet(size)
    networks = networks_to_compare(ours, theirs)
    preparation.enter_context(packed_weights(networks[AS_SAMPLED]))
    preparation.enter_context(cached_contexts(networks[AS_SAMPLED]))
    x = torch.randn(BATCH, nets.LATENT_CHANNELS, size.latent, size.latent, device=device).to(dtype)
    t, context = torch.tensor([500] * BATCH, device=device), torch.randn(BATCH, *size.context, device=device).to(dtype)
    return {name: partial(network, x, t, context) for name, network in networks.items()}


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = make_parser("unet_forward", "Time the text-conditional U-Net, here and in diffusers.")
    add_stable_diffusion(parser)
    args = parser.parse_args(argv)

    import torch

    from benchmarks import architectures as nets
    from benchmarks.timing import Report, begin, compare, flops_of

    device, size, report = begin(args), nets.sizes(args.tiny, args.stable_diffusion), Report("unet_forward", args)
    with torch.device("meta"):
        unet = nets.text_unet(size)
    latents = (BATCH, nets.LATENT_CHANNELS, size.latent, size.latent)
    flops = flops_of(unet, latents, (BATCH,), (BATCH, *size.context))
    for name in args.precision:
        dtype = getattr(torch, name)
        with torch.no_grad(), ExitStack() as preparation:
            compare(report, contestants(size, dtype, device, preparation), device, dtype, flops)
    report.finish()


if __name__ == "__main__":
    sys.exit(main())
