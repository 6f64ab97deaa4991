"""Count the GPU memory of sampling an image from text; no GPU is needed.

python -m benchmarks.memory --H 512 --W 1024

The model is built and run in the requested precision on fake tensors of torch, which have shapes but no values. A
dispatch mode adds up the live storages after every operation, and keeps the largest sum. The phases are those of a run:
the text encoder, one DDIM step with guidance, the decoder. All sums include the weights. Attention counts as one
operation, as in fused kernels on GPUs; `--plain_attention` stores all its products. The count omits memory that no
tensor holds: workspaces of kernels, gaps of the allocator and the CUDA context, together some hundred megabytes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.command import Parser, command
from ldm.cli.options import positive_int
from ldm.config.assets import locate
from ldm.config.model_config import ImageSize, read_config
from ldm.io.files import atomic_path

if TYPE_CHECKING:
    import torch

PRECISIONS = ("bfloat16", "float16", "float32")


def make_parser() -> Parser:
    """Return the parser."""
    parser = Parser(
        prog="python -m benchmarks.memory", description="Count the GPU memory of sampling from text, without a GPU."
    )
    parser.add_argument(
        "--config",
        default="configs/latent-diffusion/txt2img-1p4B-eval.yaml",
        metavar="YAML",
        help="configuration (default: that of the published model of 1.45 billion parameters)",
    )
    parser.add_argument("--H", type=positive_int, default=512, metavar="PIXELS", help="height (default: %(default)s)")
    parser.add_argument("--W", type=positive_int, default=1024, metavar="PIXELS", help="width (default: %(default)s)")
    parser.add_argument("--n", type=positive_int, default=1, metavar="N", help="batch size (default: 1)")
    parser.add_argument("--precision", choices=PRECISIONS, default=PRECISIONS[0], help="default: %(default)s")
    parser.add_argument("--plain_attention", action="store_true", help="count attention without fused kernels")
    parser.add_argument("--json", metavar="FILE", help="write the counts to this file too")
    return parser


def count(
    config: dict[str, Any], height: int, width: int, images: int, dtype: torch.dtype, plain: bool = False
) -> dict[str, int]:
    """Return the bytes of the weights, and those at the peak of each phase.

    Args:
        config: `target` and `params` of a text-to-image model.
        height, width: image size in pixels.
        images: batch size.
        dtype: the precision.
        plain: store the products of attention, instead of fused kernels.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.nn.attention import SDPBackend, sdpa_kernel

    attention = sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()
    with torch.no_grad(), FakeTensorMode(), attention:
        return _count(config, height, width, images, dtype)


def _count(config: dict[str, Any], height: int, width: int, images: int, dtype: torch.dtype) -> dict[str, int]:
    import torch

    from benchmarks.timing import default_dtype
    from ldm.config.instantiate import instantiate_from_config
    from ldm.modules.attention import cached_contexts
    from ldm.modules.live_bytes import LiveBytes
    from ldm.pipelines.loading import for_inference, skip_init

    with skip_init(), default_dtype(dtype):  # fake weights cannot be converted afterwards
        model = instantiate_from_config(for_inference(config))
    model.eval().requires_grad_(False)
    memory, peaks = LiveBytes(), {}
    for tensor in (*model.parameters(), *model.buffers()):
        memory.add(tensor)
    peaks["weights"] = memory.live
    with memory.watching():
        cond, uncond = (encoded_prompts(model.cond_stage_model, images) for _ in range(2))
    peaks["text encoder"] = memory.peak
    with memory.watching(), cached_contexts(model.model):
        x = torch.empty(images, model.channels, height // model.downsampling, width // model.downsampling)
        for _ in range(2):  # the second step has the cached keys of the context
            x = guided_step(model, x, cond, uncond)
    peaks["guided step"] = memory.peak
    with memory.watching():
        # `decode_first_stage` also looks at the values, of which fake tensors have none.
        model.differentiable_decode_first_stage(x).float()
    peaks["decoder"] = memory.peak
    return peaks


def encoded_prompts(stage: Any, count: int) -> torch.Tensor:
    """Return the features of `count` prompts of full length."""
    import torch

    from ldm.modules.encoders.text import TextEncoder

    if isinstance(stage, TextEncoder):
        stage.has_weights = True  # there are none to download
        return stage(torch.zeros(count, stage.max_length, dtype=torch.int64))
    tokens = torch.zeros(count, stage.transformer.max_seq_len, dtype=torch.int64)
    return stage.transformer(tokens, return_embeddings=True)


def guided_step(model: Any, x: torch.Tensor, cond: torch.Tensor, uncond: torch.Tensor) -> torch.Tensor:
    """Return the result of one DDIM step with guidance, in the middle of a run."""
    import numpy as np

    from ldm.models.diffusion.ddim import DDIMSampler
    from ldm.models.diffusion.sampler import SamplingOptions

    sampler = DDIMSampler(model)
    sampler.options = SamplingOptions(unconditional_guidance_scale=5.0, unconditional_conditioning=uncond)
    sampler.timesteps = np.array([model.num_timesteps // 2])
    # Fake tables have no values.
    sampler.ddim_sigmas, sampler.ddim_alphas, sampler.ddim_alphas_prev = [0.0], [0.25], [0.5]
    return sampler.step(x, 0, cond)[0]


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = make_parser().parse_args(argv)
    config = read_config(locate(args.config))
    size = ImageSize.of(config)
    size.check("--H", args.H)
    size.check("--W", args.W)

    import torch

    peaks = count(config, args.H, args.W, args.n, getattr(torch, args.precision), args.plain_attention)
    print(f"{args.config}: {args.n} × {args.H} × {args.W} pixels, {args.precision}")
    print()
    print("| phase | GB at its peak | GB beside the weights |")
    print("|---|---:|---:|")
    for phase, peak in peaks.items():
        print(f"| {phase} | {peak / 1e9:.2f} | {(peak - peaks['weights']) / 1e9:.2f} |")
    if args.json:
        with atomic_path(Path(args.json)) as temporary:
            temporary.write_text(json.dumps({"benchmark": "memory", "options": vars(args), "bytes": peaks}, indent=2))


if __name__ == "__main__":
    sys.exit(main())
