"""Measure how well a model draws the emoji data: prints a table of scores, each with its protocol.

python scripts/evaluate_emoji.py --model emoji64
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a bare clone too

from ldm.cli.command import Parser, command
from ldm.cli.options import finite_float, model_options, positive_int, seed
from ldm.config.model_config import ImageSize, check_steps, check_text_model, read_config
from ldm.config.model_files import find_model, named_model

if TYPE_CHECKING:
    import numpy as np

    from ldm.data.emoji import Drawings, EmojiValidation
    from ldm.pipelines.sampling import SamplerSettings

DEFAULT_MODEL = "emoji64"
CELLS = 8  # pictures are compared as CELLS × CELLS mean colours
BORDER = 2  # pixels at each edge whose median is the background
SHOWN = 32  # pictures of each split in the grid


@dataclass(frozen=True)
class Row:
    """One score."""

    quality: str
    value: float
    unit: str
    chance: str
    protocol: str


@dataclass(frozen=True)
class Samples:
    """What the model drew for some pairs: `images` is (N, H, W, 3) in [-1, 1]."""

    pairs: list[tuple[int, str]]
    captions: list[str]
    images: np.ndarray


def make_parser() -> Parser:
    """The options."""
    parser = Parser(description="Measure how well a model draws the emoji data.", parents=[model_options()])
    parser.add_argument("--n", type=positive_int, default=200, help="captions of each split (default: %(default)s)")
    parser.add_argument("--steps", type=positive_int, default=50, help="DDIM steps (default: %(default)s)")
    parser.add_argument("--scale", type=finite_float, default=5.0, help="guidance (default: %(default)s)")
    parser.add_argument("--seed", type=seed, default=0, help="chooses captions and noise (default: %(default)s)")
    parser.add_argument("--batch_size", type=positive_int, default=50, help="pictures at once (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the scores and settings here too")
    parser.add_argument("--grid", metavar="PNG", help=f"write {SHOWN} samples of each split with their captions here")
    return parser


def psnr(inputs: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of each picture, in dB; `(N, ...)` in [-1, 1], measured in the pixel range [0, 1]."""
    import numpy as np

    error = ((inputs.astype(np.float64) - outputs) / 2) ** 2
    return -10 * np.log10(error.reshape(len(error), -1).mean(axis=1).clip(1e-12))


def cell_means(images: np.ndarray) -> np.ndarray:
    """`(N, H, W, C)` to the means of CELLS × CELLS equal cells, `(N, CELLS, CELLS, C)`."""
    count, height, width, channels = images.shape
    return images.reshape(count, CELLS, height // CELLS, CELLS, width // CELLS, channels).mean(axis=(2, 4))


def border_colour(images: np.ndarray) -> np.ndarray:
    """`(N, H, W, 3)` to the median of the pixels at the edges, channel by channel, `(N, 3)`."""
    import numpy as np

    frame = np.zeros(images.shape[1:3], bool)
    frame[:BORDER] = frame[-BORDER:] = frame[:, :BORDER] = frame[:, -BORDER:] = True
    return np.median(images[:, frame], axis=1)


def backgrounds_right(samples: Samples) -> np.ndarray:
    """Whether the background of each sample is nearest to the colour asked for, `(N,)` bool."""
    import numpy as np

    from ldm.data.emoji import BACKGROUNDS

    known = np.array(list(BACKGROUNDS.values())) / 127.5 - 1
    nearest = np.linalg.norm(border_colour(samples.images)[:, None] - known, axis=-1).argmin(axis=1)
    return nearest == [list(BACKGROUNDS).index(colour) for _, colour in samples.pairs]


def drawings_right(samples: Samples, drawings: Drawings) -> np.ndarray:
    """Whether the drawing nearest to each sample, on the colour asked for, is the one asked for, `(N,)` bool.

    Drawings with the same name, or with the same pixels, count as the same.
    """
    import numpy as np

    from ldm.data.emoji import over, place

    size = samples.images.shape[1]
    # Laying over a background is linear, so it may follow the averaging.
    cells = np.concatenate([cell_means(place(rgba, 1.0, 0.0, 0.0, size)[None]) for rgba in drawings.rgba])
    looks = cell_means(samples.images).reshape(len(samples.images), -1)
    right = np.zeros(len(looks), bool)
    for colour in {colour for _, colour in samples.pairs}:
        known = over(cells, colour).reshape(len(cells), -1)
        for at in (at for at, pair in enumerate(samples.pairs) if pair[1] == colour):
            nearest = int(np.linalg.norm(known - looks[at], axis=1).argmin())
            right[at] = is_same(drawings, nearest, samples.pairs[at][0])
    return right


def is_same(drawings: Drawings, a: int, b: int) -> bool:
    """Whether two drawings share a name or all their pixels."""
    named = any(names[a] == names[b] for names in (drawings.cldr_names, drawings.unicode_names))
    return named or bool((drawings.rgba[a] == drawings.rgba[b]).all())


def reconstruct(model: Any, dataset: EmojiValidation, batch_size: int) -> np.ndarray:
    """The PSNR in dB of the first stage's reconstruction of each picture of `dataset`; posteriors give their mode."""
    import numpy as np
    import torch
    from tqdm import tqdm

    scores = []
    for start in tqdm(range(0, len(dataset), batch_size), desc="first stage", unit="batch"):
        images = np.stack([dataset[i]["image"] for i in range(start, min(start + batch_size, len(dataset)))])
        with torch.no_grad():
            x = torch.from_numpy(images).permute(0, 3, 1, 2).to(model.device, model.dtype)
            encoded = model.encode_first_stage(x)
            latents = encoded.mode() if hasattr(encoded, "mode") and not torch.is_tensor(encoded) else encoded
            outputs = model.decode_first_stage(model.scale_factor * latents).float().clamp(-1, 1)
        scores.append(psnr(images, outputs.permute(0, 2, 3, 1).cpu().numpy()))
    return np.concatenate(scores)


def draw(
    model: Any, dataset: EmojiValidation, args: argparse.Namespace, settings: SamplerSettings, latent: tuple[int, int]
) -> Samples:
    """Draw `args.n` of the data set's captions; seed, not batch size or device, decides which and from what noise."""
    import numpy as np
    import torch
    from tqdm import tqdm

    from ldm.pipelines.sampling import text_to_images

    chosen = np.random.RandomState(args.seed).permutation(len(dataset))[: args.n]
    items = [dataset[int(i)] for i in chosen]
    captions = [item["caption"] for item in items]
    generator = torch.Generator().manual_seed(args.seed)
    noise = torch.randn((len(items), model.channels, *latent), generator=generator)
    batches = range(0, len(items), args.batch_size)
    images = []
    with tqdm(total=len(batches) * settings.steps, desc="drawing", unit="step") as progress:
        for start in batches:
            part = slice(start, start + args.batch_size)
            images.append(text_to_images(model, captions[part], latent, settings, noise=noise[part], progress=progress))
    pixels = torch.cat(images).permute(0, 2, 3, 1).numpy()
    return Samples([dataset.pairs[int(i)] for i in chosen], captions, pixels)


def score(fidelity: np.ndarray, seen: Samples, unseen: Samples, drawings: Drawings, steps: int) -> list[Row]:
    """The table's rows."""
    import numpy as np

    both = np.concatenate([backgrounds_right(seen), backgrounds_right(unseen)])
    rule = (
        f"the drawing nearest to the sample ({CELLS}×{CELLS} mean colours, on the background asked for) is the named "
        "one; drawings with the same name or the same pixels count as the same"
    )
    rows = [
        Row(
            "first stage, PSNR",
            float(fidelity.mean()),
            "dB",
            "",
            f"mean over {len(fidelity)} pairs never shown in training",
        )
    ]
    for name, samples in (("seen pairs", seen), ("never-shown pairs", unseen)):
        share = 100 * float(drawings_right(samples, drawings).mean())
        protocol = f"{len(samples.pairs)} captions, {steps} DDIM steps: {rule}"
        rows.append(Row(f"right drawing, {name}", share, "%", f"{100 / len(drawings):.1f} %", protocol))
    protocol = (
        f"all {len(both)} samples: of the eight colours, the one nearest to the median edge colour is the one asked for"
    )
    return [*rows, Row("right background", 100 * float(both.mean()), "%", "12.5 %", protocol)]


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown."""
    lines = ["| quality | score | chance | protocol |", "|---|---:|---:|---|"]
    return "\n".join([*lines, *(f"| {r.quality} | {r.value:.1f} {r.unit} | {r.chance} | {r.protocol} |" for r in rows)])


def captioned_grid(*groups: Samples) -> np.ndarray:
    """The first pictures of each group, enlarged, each above its caption: (H, W, 3) uint8."""
    import numpy as np

    from ldm.io.grids import log_txt_as_img, make_grid
    from ldm.io.pixels import to_uint8

    cells = []
    for samples in groups:
        pictures = to_uint8(samples.images[:SHOWN]).repeat(2, axis=1).repeat(2, axis=2)
        strips = to_uint8(log_txt_as_img((pictures.shape[2], 40), samples.captions[:SHOWN]))
        cells.append(np.concatenate([pictures, strips], axis=1))
    return make_grid(np.concatenate(cells), nrow=8)


@command
def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    args = make_parser().parse_args(argv)
    files = find_model(args.model, args.config, args.ckpt) or named_model(DEFAULT_MODEL)
    config = read_config(files.config)
    check_text_model(files.name, config)
    check_steps(config, args.steps)
    size = ImageSize.of(config)

    from ldm.data.emoji import EmojiValidation
    from ldm.io.files import atomic_path
    from ldm.io.images import save_png
    from ldm.modules.precision import choose_precision
    from ldm.pipelines.loading import choose_device, load_model
    from ldm.pipelines.sampling import SamplerSettings, prepared

    unseen_pairs, seen_pairs = (EmojiValidation(size.height, split=split) for split in ("held_out", "seen"))
    device = choose_device(args.device)
    precision = choose_precision(args.precision, device)
    model = load_model(files.config, files.checkpoint, device, precision)
    settings = SamplerSettings("ddim", args.steps, 0.0, args.scale)
    latent = (size.height // size.factor, size.width // size.factor)

    with prepared(model):
        fidelity = reconstruct(model, unseen_pairs, args.batch_size)
        seen, unseen = (draw(model, pairs, args, settings, latent) for pairs in (seen_pairs, unseen_pairs))
    rows = score(fidelity, seen, unseen, seen_pairs.drawings, args.steps)
    print(table(rows))
    if args.json:
        run = {"model": files.name, "n": args.n, "seed": args.seed, "precision": str(precision), **asdict(settings)}
        with atomic_path(args.json) as temporary:
            temporary.write_text(
                json.dumps({"settings": run, "scores": [asdict(row) for row in rows]}, indent=2) + "\n"
            )
    if args.grid:
        save_png(captioned_grid(seen, unseen), args.grid)


if __name__ == "__main__":
    sys.exit(main())
