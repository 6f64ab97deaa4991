"""Time a training step of an unconditional U-Net: loss, gradients, AdamW and moving average, here and in diffusers.

python -m benchmarks.train_step --json train_step.json
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.options import make_parser
from ldm.cli.command import command
from ldm.cli.options import positive_int

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from benchmarks import architectures as nets
    from ldm.models.diffusion.ddpm import DDPM

RATE = 1e-6


def ours(size: nets.Sizes, device: torch.device, dtype: torch.dtype, x: Tensor) -> tuple[DDPM, Callable[[], object]]:
    """Return the model, and its training step as in `ldm.training`."""
    from torch.optim import AdamW

    from benchmarks import architectures as nets
    from ldm.models.diffusion.ddpm import DDPM
    from ldm.training.optimizers import fused

    target = "ldm.modules.diffusionmodules.openaimodel.UNetModel"
    model = DDPM({"target": target, "params": nets.unconditional_params(size)}, image_size=size.unconditional_size)
    model = nets.random_weights(model).to(device)
    optimizer = fused(AdamW, model.optimizer_parameters(), lr=RATE)

    def step() -> None:
        with autocast(device, dtype):
            loss, _ = model(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.update_ema()

    return model, step


def theirs(
    size: nets.Sizes, device: torch.device, dtype: torch.dtype, x: Tensor, is_fused: bool
) -> tuple[nn.Module, Callable[[], object]]:
    """Return the network of diffusers and its training step, with AdamW of torch, fused or not."""
    import diffusers
    import torch
    from diffusers.training_utils import EMAModel
    from torch.nn.functional import mse_loss
    from torch.optim import AdamW

    from benchmarks import architectures as nets

    unet = nets.diffusers_unconditional_unet(size).to(device)
    optimizer = AdamW(unet.parameters(), lr=RATE, fused=is_fused)
    average = EMAModel(unet.parameters())
    scheduler: Any = diffusers.DDPMScheduler()  # for a type checker, diffusers declares an empty class

    def step() -> None:
        noise = torch.randn_like(x)
        t = torch.randint(0, 1000, (len(x),), device=device)
        with autocast(device, dtype):
            loss = mse_loss(unet(scheduler.add_noise(x, noise, t), t).sample, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.step(unet.parameters())

    return unet, step


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Return a context in which float32 weights are multiplied in `dtype`."""
    import torch

    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = make_parser("train_step", "Time a training step of an unconditional U-Net, here and in diffusers.")
    parser.add_argument("--batch_size", type=positive_int, default=2, metavar="N", help="default: %(default)s")
    args = parser.parse_args(argv)

    import torch

    from benchmarks import architectures as nets
    from benchmarks.timing import Report, begin, compare, flops_of, same_size
    from ldm.modules.diffusionmodules.openaimodel import UNetModel

    device, size, report = begin(args), nets.sizes(args.tiny), Report("train_step", args)
    shape = (args.batch_size, 3, size.unconditional_size, size.unconditional_size)
    with torch.device("meta"):
        network = UNetModel(**nets.unconditional_params(size))
    flops = 3 * flops_of(network, shape, (args.batch_size,))  # the backward pass costs twice the forward pass
    x = torch.randn(shape, device=device)
    for name in args.precision:
        dtype = getattr(torch, name)
        (unet, plain), (_, fused) = (theirs(size, device, dtype, x, is_fused) for is_fused in (False, True))
        model, step = ours(size, device, dtype, x)
        same_size(model.model, unet)
        runs = {"diffusers": plain, "diffusers, fused AdamW": fused, "ldm": step}
        compare(report, runs, device, dtype, flops)
    report.finish()


if __name__ == "__main__":
    sys.exit(main())
