"""Time a whole sampling run without the text encoder: guided DDIM steps, then the decoder, here and in diffusers.

python -m benchmarks.sampling --json sampling.json
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.options import add_stable_diffusion, make_parser
from ldm.cli.command import command
from ldm.cli.options import positive_int

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from benchmarks import architectures as nets

SCALE = 5.0


def ours(
    size: nets.Sizes, dtype: torch.dtype, device: torch.device, steps: int, contexts: tuple[Tensor, Tensor]
) -> Callable[[], Tensor]:
    """Return a run as `ldm.pipelines` prepares it: long runs pack the weights and unpack them at the end."""
    from benchmarks import architectures as nets
    from benchmarks.timing import default_dtype
    from ldm.pipelines.preparation import packing_pays, prepared
    from ldm.pipelines.sampling import decode, sample_latents

    with default_dtype(dtype), device:
        model = nets.latent_diffusion(size).eval().requires_grad_(False)
    uncond, cond = contexts
    shape = (len(cond), nets.LATENT_CHANNELS, size.latent, size.latent)

    def run() -> Tensor:
        with prepared(model, packed=packing_pays(steps)):
            latents = sample_latents(model, shape, steps=steps, scale=SCALE, cond=cond, uncond=uncond)
            return decode(model, latents)

    return run


def theirs(
    size: nets.Sizes, dtype: torch.dtype, device: torch.device, steps: int, contexts: tuple[Tensor, Tensor]
) -> Callable[[], Tensor]:
    """Return a run with the networks and the scheduler of diffusers."""
    import diffusers
    import torch

    from benchmarks import architectures as nets
    from benchmarks.timing import default_dtype

    with default_dtype(dtype), device:
        unet, decoder = nets.diffusers_text_unet(size), nets.diffusers_autoencoder(size)
    for part in (unet, decoder):
        part.eval().requires_grad_(False)
    scheduler: Any = diffusers.DDIMScheduler(  # for a type checker, diffusers declares an empty class
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    scheduler.set_timesteps(steps)
    both, count = torch.cat(contexts), len(contexts[0])

    def run() -> Tensor:
        x = torch.randn(count, nets.LATENT_CHANNELS, size.latent, size.latent, device=device).to(dtype)
        for t in scheduler.timesteps:
            unconditional, conditional = unet(torch.cat([x, x]), t, both).sample.chunk(2)
            x = scheduler.step(unconditional + SCALE * (conditional - unconditional), t, x).prev_sample
        return decoder.decode(x / 0.18215).sample

    return run


def flops_of_run(size: nets.Sizes, steps: int, count: int) -> float:
    """Return the floating-point operations of all guided steps and the decoder."""
    import torch

    from benchmarks import architectures as nets
    from benchmarks.timing import flops_of

    with torch.device("meta"):
        unet, decoder = nets.text_unet(size), nets.autoencoder(size).decoder
    shape = (nets.LATENT_CHANNELS, size.latent, size.latent)
    step = flops_of(unet, (2 * count, *shape), (2 * count,), (2 * count, *size.context))
    return steps * step + flops_of(decoder, (count, *shape))


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = make_parser("sampling", "Time sampling runs, here and in diffusers.", rounds=3)
    parser.add_argument("--steps", type=positive_int, default=10, metavar="N", help="default: %(default)s")
    parser.add_argument("--images", type=positive_int, default=1, metavar="N", help="batch size (default: %(default)s)")
    add_stable_diffusion(parser)
    args = parser.parse_args(argv)

    import torch

    from benchmarks import architectures as nets
    from benchmarks.timing import Report, begin, compare

    device, size, report = begin(args), nets.sizes(args.tiny, args.stable_diffusion), Report("sampling", args)
    flops = flops_of_run(size, args.steps, args.images)
    for name in args.precision:
        dtype = getattr(torch, name)
        uncond, cond = (torch.randn(args.images, *size.context, device=device).to(dtype) for _ in range(2))
        setting = (size, dtype, device, args.steps, (uncond, cond))
        with torch.no_grad():
            runs = {"diffusers": theirs(*setting), "ldm": ours(*setting)}
            compare(report, runs, device, dtype, flops, args.images)
    report.finish()


if __name__ == "__main__":
    sys.exit(main())
