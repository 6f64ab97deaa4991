"""Measure how well a text-to-image model reproduces the emoji data, and print a table of scores with their protocols.

python scripts/evaluate_emoji.py --model emoji64
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import _checkout  # noqa: F401 (imports the code beside this script)
from _evaluation import EvaluatedModel, add_options, check_finite, choose, table, write_scores

from ldm.cli.command import Parser, command, example
from ldm.cli.options import finite_float, model_options

if TYPE_CHECKING:
    import numpy as np

    from ldm.data.emoji import Drawings, EmojiValidation
    from ldm.pipelines.text import TextToImage

DEFAULT_MODEL = "emoji64"
CELLS = 8  # images are compared as CELLS × CELLS mean colours
BORDER = 2  # pixels at each edge; their median is the background
SHOWN = 32  # images of each split in the grid
LIMIT = 120.0  # PSNR of equal images, in dB


@dataclass(frozen=True)
class Row:
    """One score, its value for a random guess, and its protocol."""

    quality: str
    value: float
    unit: str
    chance: str
    protocol: str


@dataclass(frozen=True)
class Samples:
    """Images (N, H, W, 3) in [-1, 1] that the model sampled for pairs of a drawing and a background colour."""

    pairs: list[tuple[int, str]]
    captions: list[str]
    images: np.ndarray


def make_parser() -> Parser:
    """Return the parser."""
    parser = Parser(
        description="Measure how well a text-to-image model reproduces the emoji data.",
        epilog=example("evaluate_emoji", "--model emoji64 --json scores.json"),
        parents=[model_options()],
    )
    add_options(
        parser, "captions of each split", 50, f"write {SHOWN} samples of each split with their captions to this file"
    )
    parser.add_argument("--scale", type=finite_float, default=5.0, help="guidance scale (default: %(default)s)")
    return parser


def cell_means(images: np.ndarray) -> np.ndarray:
    """Average images (N, H, W, C) over CELLS × CELLS equal cells: (N, CELLS, CELLS, C)."""
    count, height, width, channels = images.shape
    return images.reshape(count, CELLS, height // CELLS, CELLS, width // CELLS, channels).mean(axis=(2, 4))


def border_colour(images: np.ndarray) -> np.ndarray:
    """Return the median of the pixels at the edges of images (N, H, W, 3), channel by channel: (N, 3)."""
    import numpy as np

    frame = np.zeros(images.shape[1:3], bool)
    frame[:BORDER] = frame[-BORDER:] = frame[:, :BORDER] = frame[:, -BORDER:] = True
    return np.median(images[:, frame], axis=1)


def backgrounds_match(samples: Samples) -> np.ndarray:
    """Return for each sample, (N,) bool, whether its background is nearest to the requested colour."""
    import numpy as np

    from ldm.data.emoji import BACKGROUNDS

    known = np.array(list(BACKGROUNDS.values())) / 127.5 - 1
    nearest = np.linalg.norm(border_colour(samples.images)[:, None] - known, axis=-1).argmin(axis=1)
    return nearest == [list(BACKGROUNDS).index(colour) for _, colour in samples.pairs]


def drawings_match(samples: Samples, drawings: Drawings) -> np.ndarray:
    """Return for each sample, (N,) bool, whether the nearest drawing on the requested colour is the requested one.

    Drawings with the same name, or with the same pixels, count as the same.
    """
    import numpy as np

    from ldm.data.emoji import over, place

    size = samples.images.shape[1]
    # Compositing over a background is linear, so it can follow the averaging.
    cells = np.concatenate([cell_means(place(rgba, 1.0, 0.0, 0.0, size)[None]) for rgba in drawings.rgba])
    means = cell_means(samples.images).reshape(len(samples.images), -1)
    matches = np.zeros(len(means), bool)
    for colour in {colour for _, colour in samples.pairs}:
        known = over(cells, colour).reshape(len(cells), -1)
        for i in (i for i, pair in enumerate(samples.pairs) if pair[1] == colour):
            nearest = int(np.linalg.norm(known - means[i], axis=1).argmin())
            matches[i] = is_same(drawings, nearest, samples.pairs[i][0])
    return matches


def is_same(drawings: Drawings, a: int, b: int) -> bool:
    """Return whether two drawings share a name or all their pixels."""
    same_name = any(names[a] == names[b] for names in (drawings.cldr_names, drawings.unicode_names))
    return same_name or bool((drawings.rgba[a] == drawings.rgba[b]).all())


def reconstruct(model: Any, dataset: EmojiValidation, batch_size: int) -> np.ndarray:
    """Return the PSNR in dB, (N,), of the reconstruction of each image by the first stage; of a posterior the mode."""
    import numpy as np
    import torch
    from tqdm import tqdm

    from ldm.pipelines.metrics import psnr
    from ldm.pipelines.sampling import decode, encode

    scores = []
    for start in tqdm(range(0, len(dataset), batch_size), desc="first stage", unit="batch"):
        images = [dataset[i]["image"] for i in range(start, min(start + batch_size, len(dataset)))]
        outputs = check_finite(decode(model, encode(model, torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))))
        pairs = zip(images, outputs.permute(0, 2, 3, 1).numpy(), strict=True)
        scores += [psnr(image, output, data_range=2.0, limit=LIMIT) for image, output in pairs]
    return np.array(scores)


def sample(model: Any, dataset: EmojiValidation, pipeline: TextToImage, args: argparse.Namespace) -> Samples:
    """Sample `args.n` captions of a data set; `args.seed` alone determines which, and the start noise."""
    import torch

    from ldm.config.model_info import ModelInfo
    from ldm.pipelines.pipeline import latent_size
    from ldm.pipelines.run import run
    from ldm.pipelines.sampling import decode

    chosen = choose(len(dataset), args)
    captions = [dataset[i]["caption"] for i in chosen]
    size = ModelInfo.of(model).size
    shape = (len(chosen), model.channels, *latent_size(model, size.height, size.width))
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(args.seed))
    options = {"latents": noise, "seed": args.seed, "batch_size": args.batch_size, "output_type": "latent"}
    latents = torch.stack(run(pipeline, model, captions, **options))
    images = torch.cat([check_finite(decode(model, batch)) for batch in latents.split(args.batch_size)])
    return Samples([dataset.pairs[i] for i in chosen], captions, images.permute(0, 2, 3, 1).numpy())


def score(fidelity: np.ndarray, seen: Samples, unseen: Samples, drawings: Drawings, steps: int) -> list[Row]:
    """Return the rows of the table."""
    import numpy as np

    both = np.concatenate([backgrounds_match(seen), backgrounds_match(unseen)])
    rule = (
        f"the drawing nearest to the sample ({CELLS}×{CELLS} mean colours, on the requested background) is the "
        "requested one; drawings with the same name or the same pixels count as the same"
    )
    rows = [
        Row(
            "first stage, PSNR",
            float(fidelity.mean()),
            "dB",
            "",
            f"mean over {len(fidelity)} held-out pairs",
        )
    ]
    for name, samples in (("seen pairs", seen), ("held-out pairs", unseen)):
        share = 100 * float(drawings_match(samples, drawings).mean())
        protocol = f"{len(samples.pairs)} captions, {steps} DDIM steps: {rule}"
        rows.append(Row(f"right drawing, {name}", share, "%", f"{100 / len(drawings):.1f} %", protocol))
    protocol = (
        f"all {len(both)} samples: of the eight colours, the one nearest to the median edge colour is the requested one"
    )
    return [*rows, Row("right background", 100 * float(both.mean()), "%", "12.5 %", protocol)]


def score_table(rows: Sequence[Row]) -> str:
    """Return the rows in Markdown."""
    heads = {"quality": "---", "score": "---:", "chance": "---:", "protocol": "---"}
    return table(heads, [(row.quality, f"{row.value:.1f} {row.unit}", row.chance, row.protocol) for row in rows])


def captioned_grid(*groups: Samples) -> np.ndarray:
    """Return the first images of each group, enlarged, each above its caption, (H, W, 3) uint8."""
    import numpy as np

    from ldm.io.grids import log_txt_as_img, make_grid
    from ldm.io.pixels import to_uint8

    cells = []
    for samples in groups:
        images = to_uint8(samples.images[:SHOWN]).repeat(2, axis=1).repeat(2, axis=2)
        strips = to_uint8(log_txt_as_img((images.shape[2], 40), samples.captions[:SHOWN]))
        cells.append(np.concatenate([images, strips], axis=1))
    return make_grid(np.concatenate(cells), nrow=8)


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = make_parser().parse_args(argv)
    chosen = EvaluatedModel.chosen(args, DEFAULT_MODEL)
    name, info = chosen.files.name, chosen.info

    from ldm.pipelines.text import TextToImage

    settings = {"sampler": "ddim", "steps": args.steps, "eta": 0.0, "scale": args.scale}
    pipeline = TextToImage(**settings)
    pipeline.check(info)

    from ldm.data.emoji import EmojiValidation

    unseen_pairs, seen_pairs = (EmojiValidation(info.size.height, split=split) for split in ("held_out", "seen"))
    model, precision = chosen.load(args)
    fidelity = reconstruct(model, unseen_pairs, args.batch_size)
    seen, unseen = (sample(model, pairs, pipeline, args) for pairs in (seen_pairs, unseen_pairs))
    rows = score(fidelity, seen, unseen, seen_pairs.drawings, args.steps)
    print(score_table(rows))
    if args.json:
        run = {"model": name, "n": args.n, "seed": args.seed, "precision": str(precision)}
        write_scores(args.json, {**run, **settings}, rows)
    if args.grid:
        from ldm.io.images import save_png

        save_png(captioned_grid(seen, unseen), args.grid)


if __name__ == "__main__":
    sys.exit(main())
