"""Count the memory that drawing from text takes on a GPU, without one.

python benchmarks/memory.py --H 512 --W 1024

The model is built and run on torch's fake tensors, which have shapes and no values, in the precision asked for. A
dispatch mode sees every operation, adds up the storages that are alive after it, and keeps the highest sum. Phases are
those of a run: the text encoder, one step of DDIM with guidance, the decoder. The sum holds the weights throughout.
Attention counts as one operation, as in torch's fused kernels on GPUs; `--plain_attention` writes all its products out.
Not counted is what no tensor holds: workspaces of kernels, the allocator's gaps and the CUDA context, which together
come to some hundred megabytes.
"""

from __future__ import annotations

import json
import sys
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a bare clone too

from ldm.cli.command import Parser, command
from ldm.cli.options import positive_int
from ldm.config.assets import locate
from ldm.config.model_config import ImageSize, read_config
from ldm.io.files import atomic_path

if TYPE_CHECKING:
    import torch

PRECISIONS = ("bfloat16", "float16", "float32")


class LiveBytes:
    """Bytes of the storages that are alive, and the most that were at once. Copies and views share a storage."""

    def __init__(self) -> None:
        self.live = self.peak = 0
        self._known: dict[int, int] = {}

    def add(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage until nothing holds it any more."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known[key] = storage.nbytes()
        self.live += self._known[key]
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.live -= self._known.pop(key)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count what operations in the block make; `peak` starts anew."""
        import torch
        from torch.utils._python_dispatch import TorchDispatchMode
        from torch.utils._pytree import tree_leaves

        add = self.add

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                result = func(*args, **(kwargs or {}))
                for leaf in tree_leaves(result):
                    if isinstance(leaf, torch.Tensor):
                        add(leaf)
                return result

        self.peak = self.live
        with Watch():
            yield


def make_parser() -> Parser:
    """The options."""
    parser = Parser(description="Count the memory that drawing from text takes on a GPU, without one.")
    parser.add_argument(
        "--config",
        default="configs/latent-diffusion/txt2img-1p4B-eval.yaml",
        metavar="YAML",
        help="the model (default: the published one of 1.45 billion weights)",
    )
    parser.add_argument("--H", type=positive_int, default=512, metavar="PIXELS", help="height (default: %(default)s)")
    parser.add_argument("--W", type=positive_int, default=1024, metavar="PIXELS", help="width (default: %(default)s)")
    parser.add_argument("--n", type=positive_int, default=1, metavar="N", help="pictures at once (default: 1)")
    parser.add_argument("--precision", choices=PRECISIONS, default=PRECISIONS[0], help="default: %(default)s")
    parser.add_argument("--plain_attention", action="store_true", help="attention without fused kernels")
    parser.add_argument("--json", metavar="FILE", help="write the counts here, too")
    return parser


def count(
    config: dict[str, Any], height: int, width: int, pictures: int, dtype: torch.dtype, plain: bool = False
) -> dict[str, int]:
    """Bytes at the peak of each phase, and of the weights alone.

    Args:
        config: a text-to-image model's `target` and `params`.
        height, width: of a picture, in pixels.
        plain: write the products of attention out.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.nn.attention import SDPBackend, sdpa_kernel

    attention = sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()
    with torch.no_grad(), FakeTensorMode(), attention:
        return _count(config, height, width, pictures, dtype)


def _count(config: dict[str, Any], height: int, width: int, pictures: int, dtype: torch.dtype) -> dict[str, int]:
    import torch

    from benchmarks.timing import default_dtype
    from ldm.config.instantiate import instantiate_from_config
    from ldm.modules.attention import cached_contexts
    from ldm.pipelines.loading import for_inference, skip_init

    with skip_init(), default_dtype(dtype):  # fake weights cannot be cast afterwards
        model = instantiate_from_config(for_inference(config))
    model.eval().requires_grad_(False)
    memory, peaks = LiveBytes(), {}
    for tensor in (*model.parameters(), *model.buffers()):
        memory.add(tensor)
    peaks["weights"] = memory.live
    with memory.watching():
        transformer = model.cond_stage_model.transformer
        tokens = torch.zeros(pictures, transformer.max_seq_len, dtype=torch.int64)
        told, away = (transformer(tokens, return_embeddings=True) for _ in range(2))
    peaks["text encoder"] = memory.peak
    with memory.watching(), cached_contexts(model.model):
        x = torch.empty(pictures, model.channels, height // model.downsampling, width // model.downsampling)
        for _ in range(2):  # in the second, the keys of the context are there
            x = guided_step(model, x, told, away)
    peaks["guided step"] = memory.peak
    with memory.watching():
        model.decode_first_stage(x).float()
    peaks["decoder"] = memory.peak
    return peaks


def guided_step(model: Any, x: torch.Tensor, told: torch.Tensor, away: torch.Tensor) -> torch.Tensor:
    """One step of DDIM, as the sampler makes it, in the middle of a run."""
    import numpy as np

    from ldm.models.diffusion.ddim import DDIMSampler
    from ldm.models.diffusion.sampler import SamplingOptions

    sampler = DDIMSampler(model)
    sampler.options = SamplingOptions(unconditional_guidance_scale=5.0, unconditional_conditioning=away)
    sampler.timesteps = np.array([model.num_timesteps // 2])
    sampler.ddim_sigmas, sampler.ddim_alphas_prev = [0.0], [0.5]  # fake tables have no values to take these from
    return sampler.step(x, 0, told)[0]


@command
def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
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
