"""Measure how well a model fills masked parts of the emoji drawings, or enlarges them, compared with simple methods.

python scripts/evaluate_restoration.py --model emoji64-inpaint
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import _checkout  # noqa: F401 (imports the code beside this script)
from _evaluation import EvaluatedModel, add_options, choose, table, validation_set, write_scores

from ldm.cli.command import Parser, command, example
from ldm.cli.options import model_options, non_negative_float
from ldm.config.model_info import ModelInfo
from ldm.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from ldm.pipelines.inpainting import MaskedImage
    from ldm.pipelines.pipeline import Pipeline


DEFAULT_MODEL = "emoji64-inpaint"
SHOWN = 16  # images in the grid
LIMIT = 100.0  # PSNR of equal images, in dB


@dataclass(frozen=True)
class Row:
    """Scores of a method, means over all images: PSNR in dB, and mean absolute error in levels of 255."""

    method: str
    psnr: float
    error: float


@dataclass(frozen=True)
class Problem:
    """Images to restore, and their restorations by simple methods.

    Attributes:
        pipeline: the task of the model.
        requests: a request for each image.
        originals: (N, H, W, 3) uint8.
        where: (N, H, W) bool; the scores count these pixels.
        baselines: restorations by simple methods, each (N, H, W, 3) uint8.
        inputs: the images that a grid shows to the left of the restorations of each request.
    """

    pipeline: Pipeline
    requests: list[Any]
    originals: np.ndarray
    where: np.ndarray
    baselines: dict[str, np.ndarray]
    inputs: list[list[np.ndarray]]


def make_parser() -> Parser:
    """Return the parser."""
    parser = Parser(
        description="Measure how well a model fills masked parts of the emoji drawings, or enlarges them.",
        epilog=example("evaluate_restoration", "--model emoji64-inpaint --json scores.json"),
        parents=[model_options()],
    )
    add_options(
        parser,
        "held-out images to restore",
        25,
        f"write the restorations of {SHOWN} images by each method to this file",
    )
    parser.add_argument(
        "--eta", type=non_negative_float, default=0.0, help="noise of DDIM steps (default: %(default)s)"
    )
    parser.add_argument(
        "--data",
        metavar="YAML",
        help="configuration whose validation set has the images, such as configs/emoji/scenes_inpaint.yaml (default: "
        "the held-out drawings)",
    )
    return parser


def inpainting_problem(args: argparse.Namespace, info: ModelInfo) -> Problem:
    """Return held-out drawings with the fixed masks of validation; the scores count the masked pixels."""
    import numpy as np

    from ldm.io.pixels import to_uint8
    from ldm.pipelines.inpainting import Inpainting, MaskedImage

    items = choose_items(args, "ldm.data.inpainting.MaskedPictures", {"fixed": True}, info)
    originals = np.stack([to_uint8(item["image"]) for item in items])
    masks = np.stack([item["mask"][..., 0] > 0 for item in items])
    requests = [MaskedImage(image, mask) for image, mask in zip(originals, masks, strict=True)]
    baselines = {
        "mean colour of the rest": np.stack([fill_with_mean(each) for each in requests]),
        "Telea (OpenCV)": np.stack([fill_by_telea(each) for each in requests]),
    }
    inputs = [[np.where(each.mask[..., None], np.uint8(255), each.image)] for each in requests]
    return Problem(Inpainting(steps=args.steps, eta=args.eta), requests, originals, masks, baselines, inputs)


def super_resolution_problem(args: argparse.Namespace, info: ModelInfo) -> Problem:
    """Return held-out drawings, made smaller by bicubic interpolation; the scores count every pixel."""
    import numpy as np

    from ldm.cli.superres import bicubic
    from ldm.io.pixels import to_uint8
    from ldm.pipelines.super_resolution import SuperResolution, upscaling_factor

    factor = upscaling_factor(info)
    items = choose_items(args, "ldm.data.superresolution.SmallerPictures", {"downscale_f": factor}, info)
    originals = np.stack([to_uint8(item["image"]) for item in items])
    requests = [to_uint8(item["LR_image"]) for item in items]
    enlarged = np.stack([bicubic(each, factor) for each in requests])
    pipeline = SuperResolution(steps=args.steps, eta=args.eta, factor=factor)
    where = np.ones(originals.shape[:3], bool)
    return Problem(pipeline, requests, originals, where, {"bicubic": enlarged}, [[] for _ in requests])


# Problems by the `cond_stage_key` of the model.
PROBLEMS: dict[str, Callable[..., Problem]] = {
    "masked_image": inpainting_problem,
    "LR_image": super_resolution_problem,
}


def choose_items(
    args: argparse.Namespace, wrapper: str, params: Mapping[str, Any], info: ModelInfo
) -> list[dict[str, Any]]:
    """Return `args.n` items of the held-out drawings, wrapped by the data set `wrapper`, or of the one of `args.data`.

    Raises:
        UserError: The items of `args.data` have another size than the images of the model, or lack its conditioning.
    """
    from ldm.config.instantiate import instantiate_from_config

    if args.data is not None:
        dataset = validation_set(args.data)
        items = [dataset[i] for i in choose(len(dataset), args)]
        side = items[0]["image"].shape[0]
        if info.cond_stage_key not in items[0] or side != info.size.height:
            raise UserError(
                f'the validation set of "{args.data}" has images of {side} px with {", ".join(items[0])}; the model '
                f'"{info.name}" needs {info.size.height} px and "{info.cond_stage_key}"'
            )
        return items
    drawings = {"target": "ldm.data.emoji.EmojiValidation", "params": {"size": info.size.height}}
    dataset = instantiate_from_config({"target": wrapper, "params": {"dataset": drawings, **params}})
    return [dataset[i] for i in choose(len(dataset), args)]


def fill_with_mean(request: MaskedImage) -> np.ndarray:
    """Return the image with its masked part filled with the mean colour of the other pixels."""
    import numpy as np

    mean = request.image[~request.mask].mean(axis=0).round().astype(np.uint8)
    return np.where(request.mask[..., None], mean, request.image)


def fill_by_telea(request: MaskedImage) -> np.ndarray:
    """Return the image with its masked part filled by OpenCV's in-painting (Telea, 2004)."""
    from ldm.evaluation import restorations

    return restorations.fill_by_telea(request.image, request.mask)


def restore(model: Any, problem: Problem, args: argparse.Namespace) -> np.ndarray:
    """Return the restorations by the model, (N, H, W, 3) uint8; image i uses the seed `args.seed` + i."""
    import numpy as np

    from ldm.pipelines.run import run

    options = {"seed": args.seed, "batch_size": args.batch_size, "output_type": "numpy"}
    return np.stack(run(problem.pipeline, model, problem.requests, **options))


def score(method: str, originals: np.ndarray, results: np.ndarray, where: np.ndarray) -> Row:
    """Return the mean over images of the PSNR and of the mean absolute error, of the pixels that count."""
    import numpy as np

    from ldm.pipelines.metrics import psnr

    images = list(zip(originals, results, where, strict=True))
    ratios = [psnr(original, result, where=counts, limit=LIMIT) for original, result, counts in images]
    errors = [np.abs(original.astype(float) - result)[counts].mean() for original, result, counts in images]
    return Row(method, float(np.mean(ratios)), float(np.mean(errors)))


def score_table(rows: Sequence[Row]) -> str:
    """Return the rows in Markdown."""
    heads = {"method": "---", "PSNR": "---:", "mean error of 255": "---:"}
    return table(heads, [(row.method, f"{row.psnr:.1f} dB", f"{row.error:.1f}") for row in rows])


def restoration_grid(problem: Problem, methods: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return a row for each of the first images: the input, the restoration by each method, the original."""
    from ldm.io.grids import make_sheet

    rows = [
        [*inputs, *(images[i] for images in methods.values()), problem.originals[i]]
        for i, inputs in enumerate(problem.inputs[:SHOWN])
    ]
    return make_sheet(rows)


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = make_parser().parse_args(argv)
    chosen = EvaluatedModel.chosen(args, DEFAULT_MODEL)
    name, info = chosen.files.name, chosen.info
    if info.cond_stage_key not in PROBLEMS:
        raise UserError(
            f'the model "{name}" is conditioned on "{info.cond_stage_key}"; choose an in-painting ("masked_image") or '
            'a super-resolution ("LR_image") model'
        )
    info.check_steps(args.steps)
    problem = PROBLEMS[info.cond_stage_key](args, info)
    problem.pipeline.check(info)
    model, precision = chosen.load(args)
    methods = {**problem.baselines, name: restore(model, problem, args)}
    rows = [score(method, problem.originals, results, problem.where) for method, results in methods.items()]
    print(score_table(rows))
    if args.json:
        run = {"model": name, "n": len(problem.requests), "seed": args.seed, "precision": str(precision)}
        write_scores(args.json, {**run, **problem.pipeline.settings()}, rows)
    if args.grid:
        from ldm.io.images import save_png

        save_png(restoration_grid(problem, methods), args.grid)


if __name__ == "__main__":
    sys.exit(main())
