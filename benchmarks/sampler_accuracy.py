"""Measure how near to the solution each sampler comes in few steps: prints a table for each guidance scale.

python benchmarks/sampler_accuracy.py --model emoji64

Protocol. The reference for a prompt is DDIM at eta 0 on every step of the model (1,000 of them). Every sampler starts
from the reference's noise, is given the same prompts and the same guidance, and computes in float32 unless told
otherwise. The noise depends on --seed alone, not on the device or the order of runs. Per prompt

    distance   ‖latent - reference‖ / ‖reference‖; the table has the mean over prompts, and the largest
    PSNR       of the decoded pictures, clipped to their range, against the reference's, in dB; mean over prompts
    closer     the number of prompts whose distance is smaller than DDIM's in 50 steps

Grids: "exact" is the one that DDIM and PLMS use unless told otherwise. It starts below the model's last step and stops
at its first, as published, which the reference does not: a part of the distance that no number of steps removes.
"logsnr", DPM-Solver++'s own, spans all steps and goes to the data. DDIM and PLMS are measured on it too, so that the
gain of the grid and that of the method can be told apart. The reference is itself a first-order solution;
DPM-Solver++ in 200 steps shows how far it is from the ODE's: distances below that one mean nothing more.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a bare clone too

from ldm.cli.command import Parser, command
from ldm.cli.options import finite_float, model_options, positive_int, seed
from ldm.config.model_files import find_model, named_model
from ldm.config.model_info import ModelInfo
from ldm.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

DEFAULT_MODEL = "emoji64"
DRAWINGS = ("rocket", "fox", "rainbow", "red heart", "tiger", "cherries", "crescent moon", "wolf")
COLOURS = ("blue", "white", "yellow", "black", "green", "purple")
# Sampler, grid, steps; the first of all is what the others are compared with.
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
    """The accuracy of one sampler at one guidance scale."""

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
    """What every sampler is given."""

    conditioning: Any
    unconditional: Any
    noise: Tensor


def make_parser() -> Parser:
    """The options."""
    parser = Parser(description="Measure how near each sampler comes to the solution.", parents=[model_options()])
    parser.add_argument("--from-file", metavar="FILE", help="a prompt a line (default: sentences of the emoji data)")
    parser.add_argument("--n", type=positive_int, default=16, help="at most so many prompts (default: %(default)s)")
    parser.add_argument("--scales", type=finite_float, nargs="+", default=[1.0, 3.0], help="guidance (default: 1 3)")
    parser.add_argument("--seed", type=seed, default=0, help="chooses the noise (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the rows and settings here too")
    return parser


def read_prompts(path: str | None, n: int) -> list[str]:
    """The first `n` prompts of the file, or of the script's own."""
    if path is None:
        prompts = [f"{drawing} on a {colour} background" for colour in COLOURS for drawing in DRAWINGS]
    else:
        try:
            text = Path(path).read_text(encoding="utf-8-sig")  # some editors begin a file with a mark
            prompts = [line.strip() for line in text.splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f'cannot read the prompts "{path}": {error}; give UTF-8 text') from None
    if not prompts:
        raise UserError(f'the prompt file "{path}" is empty; write one prompt a line')
    return prompts[:n]


def solve(model: Any, task: Task, scale: float, sampler: str, grid: str, steps: int) -> Tensor:
    """Latents (B, C, h, w) by one sampler."""
    from ldm.pipelines.sampling import make_sampler

    latents, _ = make_sampler(sampler, model).sample(
        S=steps,
        batch_size=len(task.noise),
        shape=task.noise.shape[1:],
        conditioning=task.conditioning,
        x_T=task.noise,
        ddim_discretize=grid,
        unconditional_guidance_scale=scale,
        unconditional_conditioning=task.unconditional,
        verbose=False,
    )
    return latents


def distances(latents: Tensor, reference: Tensor) -> Tensor:
    """‖latent - reference‖ / ‖reference‖ of each item, (B,)."""
    return (latents - reference).flatten(1).norm(dim=1) / reference.flatten(1).norm(dim=1)


def psnr(pictures: Tensor, reference: Tensor) -> float:
    """Mean over pictures (B, C, H, W) in [-1, 1] of the peak signal-to-noise ratio in dB."""
    error = ((pictures - reference) / 2).square().flatten(1).mean(dim=1)
    return float((-10 * error.clamp_min(1e-12).log10()).mean())


def measure(model: Any, task: Task, scale: float) -> list[Row]:
    """The rows of one guidance scale, nearest first."""
    from tqdm import tqdm

    def pictures(latents: Tensor) -> Tensor:
        return model.decode_first_stage(latents).float().clamp(-1.0, 1.0)

    reference = solve(model, task, scale, "ddim", "exact", model.num_timesteps)
    shown, rows, baseline = pictures(reference), [], None
    for sampler, grid, steps in tqdm(RUNS, desc=f"scale {scale:g}", unit="run"):
        if steps > model.num_timesteps:
            continue
        latents = solve(model, task, scale, sampler, grid, steps)
        away = distances(latents, reference)
        baseline = away if baseline is None else baseline
        accuracy = (float(away.mean()), float(away.max()), psnr(pictures(latents), shown))
        rows.append(Row(scale, sampler, grid, steps, *accuracy, int((away < baseline).sum())))
    return sorted(rows, key=lambda row: row.distance)


def table(rows: Sequence[Row], prompts: int) -> str:
    """The rows in Markdown."""
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
    """The command."""
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
