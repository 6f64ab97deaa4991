"""Measure how well a model fills parts of the emoji drawings, or enlarges them: a table against simple methods.

python scripts/evaluate_restoration.py --model emoji64-inpaint
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a bare clone too

from ldm.cli.command import Parser, command
from ldm.cli.options import model_options, non_negative_float, positive_int, seed
from ldm.config.model_config import ImageSize, check_steps, read_config
from ldm.config.model_files import ModelFiles, find_model, named_model
from ldm.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from ldm.tasks.task import Task

logger = logging.getLogger("ldm")

SHOWN = 16  # pictures in the sheet


@dataclass(frozen=True)
class Row:
    """How near a method comes to the originals: means over the pictures."""

    method: str
    psnr: float  # in dB
    error: float  # mean absolute difference, in levels of 255


@dataclass(frozen=True)
class Problem:
    """What is to be restored: `loaded` is what the task draws from, `originals` and `where` are (N, H, W, …)."""

    task: Task
    settings: dict[str, Any]
    loaded: list[Any]
    originals: np.ndarray  # (N, H, W, 3) uint8
    where: np.ndarray  # (N, H, W) bool, what counts
    rivals: dict[str, np.ndarray]  # method → (N, H, W, 3) uint8


def make_parser() -> Parser:
    """The options."""
    parser = Parser(
        description="Measure how well a model fills parts of the emoji drawings, or enlarges them.",
        epilog="example: python scripts/evaluate_restoration.py --model emoji64-inpaint --json scores.json",
        parents=[model_options()],
    )
    parser.add_argument("--n", type=positive_int, default=200, help="pictures never shown (default: %(default)s)")
    parser.add_argument("--steps", type=positive_int, default=50, help="DDIM steps (default: %(default)s)")
    parser.add_argument("--eta", type=non_negative_float, default=0.0, help="noise of DDIM (default: %(default)s)")
    parser.add_argument("--seed", type=seed, default=0, help="chooses pictures and noise (default: %(default)s)")
    parser.add_argument("--batch_size", type=positive_int, default=25, help="pictures at once (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the scores and settings here too")
    parser.add_argument("--grid", metavar="PNG", help=f"write {SHOWN} pictures, restored by each method, here")
    return parser


def inpainting_problem(args: argparse.Namespace, files: ModelFiles, config: Mapping[str, Any]) -> Problem:
    """Held-out drawings with the fixed masks of validation; the masked pixels count."""
    import numpy as np

    from ldm.io.pixels import to_uint8
    from ldm.tasks.inpainting import Inpainting, MaskedImage

    items = chosen_items(args, "ldm.data.inpainting.MaskedPictures", {"fixed": True}, config)
    originals = np.stack([to_uint8(item["image"]) for item in items])
    masks = np.stack([item["mask"][..., 0] > 0 for item in items])
    loaded = [MaskedImage(image, mask) for image, mask in zip(originals, masks, strict=True)]
    rivals = {"mean colour of the rest": np.stack([mean_filling(each) for each in loaded])}
    telea = telea_filling()
    if telea is not None:
        rivals["Telea (OpenCV)"] = np.stack([telea(each) for each in loaded])
    settings = {"feather": 0, "tile": 0, **sampling(args)}
    return Problem(Inpainting(), settings, loaded, originals, masks, rivals)


def superresolution_problem(args: argparse.Namespace, files: ModelFiles, config: Mapping[str, Any]) -> Problem:
    """Held-out drawings, made smaller by bicubic interpolation; every pixel counts."""
    import numpy as np

    from ldm.io.pixels import to_uint8
    from ldm.tasks.superresolution import Small, SuperResolution, enlargement

    factor, task = enlargement(files.name, config), SuperResolution()
    items = chosen_items(args, "ldm.data.superresolution.SmallerPictures", {"downscale_f": factor}, config)
    originals = np.stack([to_uint8(item["image"]) for item in items])
    loaded = [Small(to_uint8(item["LR_image"]), factor) for item in items]
    rivals = {"bicubic": np.stack([task.panels(each)[0] for each in loaded])}
    settings = {"factor": factor, "tile": 0, **sampling(args)}
    return Problem(task, settings, loaded, originals, np.ones(originals.shape[:3], bool), rivals)


PROBLEMS: dict[str, Callable[..., Problem]] = {
    "masked_image": inpainting_problem,
    "LR_image": superresolution_problem,
}


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of `SamplerSettings`."""
    return {"sampler": "ddim", "steps": args.steps, "eta": args.eta, "scale": 1.0}


def chosen_items(
    args: argparse.Namespace, wrapper: str, params: Mapping[str, Any], config: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """`args.n` items of the wrapped pairs that are never shown in training; the seed decides which."""
    import numpy as np

    from ldm.config.instantiate import instantiate_from_config

    source = {"target": "ldm.data.emoji.EmojiValidation", "params": {"size": ImageSize.of(config).height}}
    dataset = instantiate_from_config({"target": wrapper, "params": {"dataset": source, **params}})
    chosen = np.random.RandomState(args.seed % 2**32).permutation(len(dataset))[: args.n]
    return [dataset[int(i)] for i in chosen]


def mean_filling(holed: Any) -> np.ndarray:
    """The picture with the mean colour of what is known in place of the rest."""
    import numpy as np

    mean = holed.image[~holed.mask].mean(axis=0).round().astype(np.uint8)
    return np.where(holed.mask[..., None], mean, holed.image)


def telea_filling() -> Callable[[Any], np.ndarray] | None:
    """OpenCV's in-painting (Telea, 2004), or None where it is not installed."""
    try:
        import cv2
    except ImportError:
        logger.warning('without OpenCV the row of Telea\'s method is left out; pip install -e ".[evaluation]" adds it')
        return None
    import numpy as np

    return lambda holed: cv2.inpaint(
        np.ascontiguousarray(holed.image), holed.mask.astype(np.uint8), 3, cv2.INPAINT_TELEA
    )


def restore(model: Any, problem: Problem, args: argparse.Namespace) -> np.ndarray:
    """What the model makes of every picture, each with a seed of its own: (N, H, W, 3) uint8."""
    import numpy as np
    from tqdm import tqdm

    from ldm.pipelines.sampling import prepared
    from ldm.tasks.run import SEED_RANGE, Picture, draw_batch

    pictures = [Picture(i, (args.seed + i) % SEED_RANGE, {}, each) for i, each in enumerate(problem.loaded)]
    batches = [pictures[start : start + args.batch_size] for start in range(0, len(pictures), args.batch_size)]
    with prepared(model), tqdm(desc="restoring", unit="step", total=len(batches) * args.steps) as progress:
        return np.concatenate([draw_batch(problem.task, model, b, problem.settings, progress) for b in batches])


def compare(method: str, originals: np.ndarray, results: np.ndarray, where: np.ndarray) -> Row:
    """Peak signal-to-noise ratio and mean absolute error of each picture where it counts, averaged over pictures."""
    import numpy as np

    scores = []
    for original, result, counts in zip(originals.astype(float), results.astype(float), where, strict=True):
        difference = (original - result)[counts]
        squared = max((difference**2).mean(), 255**2 * 1e-10)  # at most 100 dB
        scores.append((10 * np.log10(255**2 / squared), np.abs(difference).mean()))
    psnr, error = np.mean(scores, axis=0)
    return Row(method, float(psnr), float(error))


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown."""
    lines = ["| method | PSNR | mean error of 255 |", "|---|---:|---:|"]
    return "\n".join([*lines, *(f"| {row.method} | {row.psnr:.1f} dB | {row.error:.1f} |" for row in rows)])


def sheet(problem: Problem, methods: Mapping[str, np.ndarray]) -> np.ndarray:
    """A row for each of the first pictures: what is given, what each method makes of it, the original."""
    from ldm.io.grids import make_sheet

    panels = [problem.task.panels(each) for each in problem.loaded[:SHOWN]]
    results = [[pictures[i] for pictures in methods.values()] for i in range(len(panels))]
    if "bicubic" in methods:  # which is how the task shows what is given
        panels = [[]] * len(panels)
    return make_sheet([[*panels[i], *results[i], problem.originals[i]] for i in range(len(panels))])


@command
def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    args = make_parser().parse_args(argv)
    files = find_model(args.model, args.config, args.ckpt) or named_model("emoji64-inpaint")
    config = read_config(files.config)
    check_steps(config, args.steps)
    key = config["params"].get("cond_stage_key", "image")
    if key not in PROBLEMS:
        raise UserError(
            f'the model "{files.name}" draws from "{key}"; choose one that fills parts ("masked_image") or enlarges '
            '("LR_image")'
        )

    from ldm.io.files import atomic_path
    from ldm.io.images import save_png
    from ldm.modules.precision import choose_precision
    from ldm.pipelines.loading import choose_device, load_model

    problem = PROBLEMS[key](args, files, config)
    device = choose_device(args.device)
    precision = choose_precision(args.precision, device)
    model = load_model(files.config, files.checkpoint, device, precision)
    methods = {**problem.rivals, files.name: restore(model, problem, args)}
    rows = [compare(name, problem.originals, results, problem.where) for name, results in methods.items()]
    print(table(rows))
    if args.json:
        run = {"model": files.name, "n": len(problem.loaded), "seed": args.seed, "precision": str(precision)}
        content = {"settings": {**run, **problem.settings}, "scores": [asdict(row) for row in rows]}
        with atomic_path(args.json) as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n")
    if args.grid:
        save_png(sheet(problem, methods), args.grid)


if __name__ == "__main__":
    sys.exit(main())
