"""Measure how near each sampler comes to the solution in few steps, and print a table for each guidance scale.

python -m benchmarks.sampler_accuracy --model emoji64

Protocol. The reference for a prompt is DDIM with eta 0 on all timesteps of the model (1,000 of them). All samplers use
the start noise of the reference, the same prompts and the same guidance scale, and compute in float32 by default. The
noise depends on --seed alone, not on the device or the order of runs. The columns are

    distance   ‖latent - reference‖ / ‖reference‖: the mean over prompts, and the largest
    PSNR       of the decoded images, clipped to their range, relative to the reference, in dB: the mean over prompts
    closer     the number of prompts with a smaller distance than that of DDIM in 50 steps

Grids. "exact" is the default of DDIM and PLMS. As published, it starts below the last timestep and stops at the first,
while the reference does not. This part of the distance remains with any number of steps. "logsnr", the default of
DPM-Solver++, spans all timesteps and ends at the data. DDIM and PLMS are measured on both, to separate the gain of the
grid from that of the method. The reference is itself a first-order solution. DPM-Solver++ in 200 steps shows its
distance from the solution of the ODE: smaller distances mean nothing.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ldm.cli.command import Parser, command
from ldm.cli.input_files import read_prompts as read_prompt_file
from ldm.cli.options import finite_float, model_options, positive_int, seed
from ldm.config.model_files import find_model, named_model
from ldm.config.model_info import ModelInfo

if TYPE_CHECKING:
    from torch import Tensor

DEFAULT_MODEL = "emoji64"
DRAWINGS = ("rocket", "fox", "rainbow", "red heart", "tiger", "cherries", "crescent moon", "wolf")
COLOURS = ("blue", "white", "yellow", "black", "green", "purple")
LIMIT = 120.0  # PSNR of equal images, in dB
# Sampler, grid, steps; the column "closer" compares with the baseline.
BASELINE = ("ddim", "exact", 50)
RUNS = (
    BASELINE,
    ("ddim", "exact", 20),
    ("ddim", "exact", 200),
    ("ddim", "logsnr", 20),
    ("ddim", "logsnr", 50),
    ("plms", "exact", 20),
    ("plms", "exact", 50),
    ("plms", "logsnr", 20),
    ("dpm", "exact", 20),
    ("dpm", "logsnr", 10),
    ("dpm", "logsnr", 15),
    ("dpm", "logsnr", 20),
    ("dpm", "logsnr", 50),
    ("dpm", "logsnr", 200),
)


@dataclass(frozen=True)
class Row:
    """Accuracy of one sampler at one guidance scale."""

    scale: float
    sampler: str
    grid: str
    steps: int
    distance: float
    largest: float
    psnr: float
    closer: int


@dataclass(frozen=True)
class Task:
    """Inputs of every sampler: conditioning, and start noise (B, C, h, w)."""

    cond: Any
    uncond: Any
    noise: Tensor


def make_parser() -> Parser:
    """Return the parser."""
    parser = Parser(
        prog="python -m benchmarks.sampler_accuracy",
        description="Measure how near each sampler comes to the solution in few steps.",
        parents=[model_options()],
    )
    parser.add_argument("--from-file", metavar="FILE", help="file of prompts, one per line (default: emoji captions)")
    parser.add_argument("--n", type=positive_int, default=16, help="largest number of prompts (default: %(default)s)")
    parser.add_argument(
        "--scales", type=finite_float, nargs="+", default=[1.0, 3.0], help="guidance scales (default: 1 3)"
    )
    parser.add_argument("--seed", type=seed, default=0, help="seed of the noise (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the rows and the settings to this file too")
    return parser


def read_prompts(path: str | None, n: int) -> list[str]:
    """Return the first `n` prompts of the file, or of the default ones.

    Raises:
        UserError: The file cannot be read, or is empty.
    """
    if path is None:
        prompts = [f"{drawing} on a {colour} background" for colour in COLOURS for drawing in DRAWINGS]
    else:
        prompts = read_prompt_file(path)
    return prompts[:n]


def solve(model: Any, task: Task, scale: float, sampler: str, grid: str, steps: int) -> Tensor:
    """Sample latents (B, C, h, w) with one sampler."""
    from ldm.pipelines.sampling import make_sampler

    latents, _ = make_sampler(sampler, model).sample(
        S=steps,
        batch_size=len(task.noise),
        shape=task.noise.shape[1:],
        conditioning=task.cond,
        x_T=task.noise,
        ddim_discretize=grid,
        unconditional_guidance_scale=scale,
        unconditional_conditioning=task.uncond,
        verbose=False,
    )
    return latents


def distances(latents: Tensor, reference: Tensor) -> Tensor:
    """Return ‖latent - reference‖ / ‖reference‖ of each item, (B,)."""
    return (latents - reference).flatten(1).norm(dim=1) / reference.flatten(1).norm(dim=1)


def mean_psnr(images: Tensor, reference: Tensor) -> float:
    """Return the mean PSNR of images (B, C, H, W) in [-1, 1], in dB."""
    from ldm.pipelines.metrics import psnr

    pairs = zip(reference.cpu().numpy(), images.cpu().numpy(), strict=True)
    return statistics.mean(psnr(original, image, data_range=2.0, limit=LIMIT) for original, image in pairs)


def measure(model: Any, task: Task, scale: float) -> list[Row]:
    """Return the rows of one guidance scale, the nearest first."""
    from tqdm import tqdm

    def decoded(latents: Tensor) -> Tensor:
        return model.decode_first_stage(latents).float().clamp(-1.0, 1.0)

    reference = solve(model, task, scale, "ddim", "exact", model.num_timesteps)
    expected, rows, baseline = decoded(reference), [], None
    for sampler, grid, steps in tqdm(RUNS, desc=f"scale {scale:g}", unit="run"):
        if steps > model.num_timesteps:
            continue
        latents = solve(model, task, scale, sampler, grid, steps)
        distance = distances(latents, reference)
        baseline = distance if baseline is None else baseline
        accuracy = (float(distance.mean()), float(distance.max()), mean_psnr(decoded(latents), expected))
        rows.append(Row(scale, sampler, grid, steps, *accuracy, int((distance < baseline).sum())))
    return sorted(rows, key=lambda row: row.distance)


def table(rows: Sequence[Row], prompts: int) -> str:
    """Return the rows in Markdown."""
    lines = [
        "| scale | sampler | grid | steps | distance | largest | PSNR, dB | closer |",
        "|---:|---|---|" + "---:|" * 5,
    ]
    for row in rows:
        numbers = f"{row.distance:.4f} | {row.largest:.4f} | {row.psnr:.1f} | {row.closer} of {prompts}"
        lines.append(f"| {row.scale:g} | {row.sampler} | {row.grid} | {row.steps} | {numbers} |")
    return "\n".join(lines)


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = make_parser().parse_args(argv)
    files = find_model(args.model, args.config, args.ckpt) or named_model(DEFAULT_MODEL)
    info = ModelInfo.read(files)
    info.check_reads_text()
    info.check_steps(BASELINE[2])
    prompts = read_prompts(args.from_file, args.n)
    size = info.size

    import torch

    from ldm.io.files import atomic_path
    from ldm.modules.precision import choose_precision
    from ldm.pipelines.loading import choose_device, load_model

    device = choose_device(args.device)
    model = load_model(files.config, files.checkpoint, device, choose_precision(args.precision, device))
    shape = (len(prompts), model.channels, size.height // size.factor, size.width // size.factor)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(args.seed))
    with torch.no_grad():
        encode = model.get_learned_conditioning
        task = Task(encode(prompts), encode([""] * len(prompts)), noise)
        rows = [row for scale in args.scales for row in measure(model, task, scale)]
    print(table(rows, len(prompts)))
    if args.json:
        run = {"model": files.name, "prompts": prompts, "seed": args.seed, "precision": args.precision}
        with atomic_path(args.json) as temporary:
            text = {"settings": {**run, "device": str(model.device)}, "rows": [asdict(row) for row in rows]}
            temporary.write_text(json.dumps(text, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
