"""Send pictures through a first stage and back, and measure what is lost.

python scripts/reconstruct.py photo.jpg --model kl-f8
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a bare clone too

from ldm.cli.command import Parser, command, say
from ldm.cli.options import image_side, model_options, positive_int
from ldm.config.model_config import ImageSize, read_config
from ldm.config.model_files import FIRST_STAGES, MODELS, find_model, named_model
from ldm.errors import UserError
from ldm.io.files import check_writable

if TYPE_CHECKING:
    import numpy as np

    from ldm.models.autoencoder import Autoencoder
    from ldm.modules.losses.lpips import LPIPS

logger = logging.getLogger("ldm.reconstruct")

DEFAULT_MODEL = "emoji64"
DRAWINGS, DRAWING_SIZE = 8, 128  # how many without other pictures, and their largest size in pixels
SMALLEST = 16  # pixels of a side, which LPIPS needs
SHOWN, COLUMNS, CELL = 32, 8, 256  # the sheet: pictures, pictures in a row, largest side of one in pixels


@dataclass(frozen=True)
class Source:
    """A picture to come: what its reconstruction is called, how to read it, as `(H, W, 3)` uint8, and where it is."""

    name: str
    read: Callable[[], np.ndarray]
    path: Path | None = None


@dataclass(frozen=True)
class Score:
    """What one picture lost. `psim` is LPIPS, which is 0 for equal pictures; None where it was not measured."""

    picture: str
    width: int
    height: int
    psnr: float
    ssim: float
    psim: float | None


def make_parser() -> Parser:
    """The options."""
    parser = Parser(
        description="Send pictures through a first stage and back, and measure what is lost.",
        epilog="example: python scripts/reconstruct.py --indir data/superres_examples --no-psim",
        parents=[model_options(f"{FIRST_STAGES} or {MODELS}")],
    )
    parser.add_argument("files", nargs="*", metavar="FILE", help="pictures (default: some of the emoji drawings)")
    parser.add_argument("--indir", metavar="DIR", help="take all pictures in this folder and below")
    parser.add_argument("--outdir", metavar="DIR", default="outputs/reconstruct", help="default: %(default)s")
    parser.add_argument(
        "--size", type=image_side, metavar="PIXELS", help="take the centred square, resized (default: whole pictures)"
    )
    parser.add_argument(
        "--batch_size",
        type=positive_int,
        default=8,
        metavar="N",
        help="pictures of one size at once (default: %(default)s)",
    )
    parser.add_argument("--no-psim", action="store_true", help="leave out PSIM, whose network is fetched on first use")
    parser.add_argument("--json", metavar="FILE", help="write the table here too")
    return parser


def read_file(path: Path, size: int | None) -> np.ndarray:
    """A picture's pixels, with `size` those of its centred square; at least `SMALLEST` a side.

    Raises:
        UserError: it cannot be read, or is smaller.
    """
    from ldm.io.images import load_image
    from ldm.io.pixels import to_uint8

    pixels = to_uint8(load_image(path, size))[0]
    if min(pixels.shape[:2]) < SMALLEST:
        raise UserError(f'the picture "{path}" is smaller than {SMALLEST} pixels; enlarge it with --size')
    return pixels


def find_files(files: Sequence[str], indir: str | None, size: int | None) -> list[Source]:
    """The pictures that were asked for; none when nothing was.

    Raises:
        UserError: the folder is missing or holds no picture.
    """
    from ldm.data.image_files import images_below

    found = [(Path(file), Path(file).name) for file in files]
    if indir is not None:
        if not Path(indir).is_dir():
            raise UserError(f'there is no folder "{indir}"; check --indir')
        inside = [name for name in images_below(Path(indir)) if not name.endswith(".npy")]
        if not inside:
            raise UserError(f'there is no picture in "{indir}"; give --indir a folder with PNG, JPEG or WebP files')
        found += [(Path(indir, name), name) for name in inside]
    names = unique([name for _, name in found])
    return [Source(name, partial(read_file, path, size), path) for name, (path, _) in zip(names, found, strict=True)]


def unique(names: Sequence[str]) -> list[str]:
    """Names of PNG files for these pictures: `a.jpg` gives `a.png`, or `a.jpg.png`, `a.jpg-2.png` if that is taken."""
    taken: set[str] = set()
    made = []
    for name in names:
        candidates = [f"{Path(name).with_suffix('')}.png", f"{name}.png"]
        candidates += [f"{name}-{number}.png" for number in range(2, len(names) + 2)]
        made.append(next(each for each in candidates if each.lower() not in taken))
        taken.add(made[-1].lower())
    return made


def check_outputs(sources: Sequence[Source], outdir: Path) -> None:
    """Whether the reconstructions can be written without taking the place of a picture to read.

    Raises:
        UserError: they cannot.
    """
    check_writable(outdir, "--outdir")
    outputs = {(outdir / "pictures" / source.name).resolve() for source in sources} | {(outdir / "sheet.png").resolve()}
    for source in sources:
        if source.path is not None and source.path.resolve() in outputs:
            raise UserError(f'"{source.path}" would be written over; choose another --outdir')


def drawings(size: int) -> list[Source]:
    """Some of the emoji drawings, on backgrounds that the bundled model was never shown them on."""
    from ldm.data.emoji import EmojiValidation
    from ldm.io.pixels import to_uint8

    pairs = EmojiValidation(size)
    chosen = [pairs[index * len(pairs) // DRAWINGS] for index in range(DRAWINGS)]
    return [Source(f"{c['caption'].replace(' ', '-')}.png", partial(to_uint8, c["image"])) for c in chosen]


def padding(shape: Sequence[int], factor: int) -> tuple[int, int]:
    """Rows and columns that a picture `(H, W, ...)` lacks to a multiple of `factor`."""
    return -shape[0] % factor, -shape[1] % factor


def batches(
    sources: Sequence[Source], count: int, factor: int, unread: list[str]
) -> Iterator[list[tuple[str, np.ndarray]]]:
    """Neighbours of one padded size, at most `count` together; what cannot be read is told and goes to `unread`."""
    batch: list[tuple[str, np.ndarray]] = []
    shape = None
    for source in sources:
        try:
            pixels = source.read()
        except UserError as error:
            logger.error("%s", error)
            unread.append(source.name)
            continue
        padded = [side + more for side, more in zip(pixels.shape, padding(pixels.shape, factor), strict=False)]
        if batch and (padded != shape or len(batch) == count):
            yield batch
            batch = []
        shape = padded
        batch.append((source.name, pixels))
    if batch:
        yield batch


def reconstruct(model: Autoencoder, pictures: Sequence[np.ndarray], factor: int) -> list[np.ndarray]:
    """Pictures `(H, W, 3)` uint8 of one padded size, through `model` and back: `(H, W, 3)` float32 in [-1, 1].

    Where `factor` does not divide a side, the picture is mirrored at its edge and the result cut back. Of posteriors
    the mode is decoded.
    """
    import numpy as np
    import torch

    from ldm.io.pixels import to_batch
    from ldm.models.autoencoder import AutoencoderKL

    padded = [np.pad(p, (*((0, more) for more in padding(p.shape, factor)), (0, 0)), "reflect") for p in pictures]
    x = to_batch(padded).to(model.device)
    options = {"sample_posterior": False} if isinstance(model, AutoencoderKL) else {}
    with torch.inference_mode():
        output = model(x.to(model.get_last_layer().dtype), **options)[0].float().clamp(-1.0, 1.0)
    whole = output.permute(0, 2, 3, 1).cpu().numpy()
    return [y[: p.shape[0], : p.shape[1]] for y, p in zip(whole, pictures, strict=True)]


def measure(name: str, original: np.ndarray, output: np.ndarray, lpips: LPIPS | None) -> Score:
    """The scores of a reconstruction `(H, W, 3)` in [-1, 1] of an original in uint8."""
    import torch
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    wanted, got = (torch.from_numpy(each).permute(2, 0, 1)[None].float() for each in (original / 127.5 - 1.0, output))
    psim = None
    if lpips is not None:
        device = lpips.scaling_layer.shift.device
        with torch.inference_mode():
            psim = float(lpips(wanted.to(device), got.to(device)))
    psnr = peak_signal_noise_ratio(got, wanted, data_range=2.0)
    ssim = structural_similarity_index_measure(got, wanted, data_range=2.0)
    return Score(name, original.shape[1], original.shape[0], float(psnr), float(ssim), psim)


def prepare_lpips(device: Any) -> LPIPS | None:
    """The network of PSIM, or None with a line that says why not."""
    from ldm.modules.losses.lpips import LPIPS

    try:
        lpips = LPIPS()
        with redirect_stdout(sys.stderr):  # torch tells there what it fetches, where the table belongs
            lpips.prepare()
        return lpips.to(device)
    except UserError as error:
        logger.warning("PSIM is left out: %s", error)
        return None


def sheet(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Originals above their reconstructions, `COLUMNS` a row, each at most `CELL` pixels wide and high."""
    import numpy as np
    from PIL import Image

    from ldm.io.grids import make_grid

    side = max(min(CELL, side) for pixels, _ in pairs for side in pixels.shape[:2])
    columns = min(COLUMNS, len(pairs))

    def cell(pixels: np.ndarray) -> np.ndarray:
        image, canvas = Image.fromarray(pixels), Image.new("RGB", (side, side))
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return np.asarray(canvas)

    rows = []
    for start in range(0, len(pairs), columns):
        for line in zip(*pairs[start : start + columns], strict=True):
            empty = columns - len(line)
            rows += [cell(pixels) for pixels in line] + empty * [np.zeros((side, side, 3), np.uint8)]
    return make_grid(np.stack(rows), nrow=columns)


def mean(scores: Sequence[Score]) -> dict[str, float | None]:
    """The mean of each score over the pictures."""
    columns = {key: [getattr(score, key) for score in scores] for key in ("psnr", "ssim", "psim")}
    return {key: None if None in values else sum(values) / len(values) for key, values in columns.items()}


def table(scores: Sequence[Score]) -> str:
    """The scores in Markdown, a row for each picture and one for the mean."""
    heads = ["picture", "size", "PSNR, dB", "SSIM"] + (["PSIM"] if scores[0].psim is not None else [])
    rows = [(score.picture, f"{score.width} × {score.height}", asdict(score)) for score in scores]
    lines = [heads, ["---", *(len(heads) - 1) * ["---:"]]]
    for name, size, values in [*rows, ("mean", "", mean(scores))]:
        psim = [] if values["psim"] is None else [f"{values['psim']:.3f}"]
        lines.append([name, size, f"{values['psnr']:.2f}", f"{values['ssim']:.3f}", *psim])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def run(args: argparse.Namespace, model: Autoencoder, sources: Sequence[Source], unread: list[str]) -> list[Score]:
    """Reconstruct all sources and write the pictures and the sheet; gives the scores of those that could be read."""
    from tqdm import tqdm

    from ldm.io.images import save_png
    from ldm.io.pixels import to_uint8
    from ldm.modules.packing import packed_weights

    lpips = None if args.no_psim else prepare_lpips(model.device)
    factor = 2 ** (len(model.encoder.down) - 1)
    outdir = Path(args.outdir)
    scores: list[Score] = []
    shown = []
    with packed_weights(*model.children()), tqdm(total=len(sources), desc="reconstructing", unit="picture") as progress:
        for batch in batches(sources, args.batch_size, factor, unread):
            outputs = reconstruct(model, [pixels for _, pixels in batch], factor)
            for (name, pixels), output in zip(batch, outputs, strict=True):
                scores.append(measure(name, pixels, output, lpips))
                result = to_uint8(output)
                save_png(result, outdir / "pictures" / name)
                shown += [(pixels, result)] if len(shown) < SHOWN else []
            progress.update(len(batch))
    if shown:
        save_png(sheet(shown), outdir / "sheet.png")
    return scores


@command
def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    args = make_parser().parse_args(argv)
    places = (FIRST_STAGES, MODELS)
    files = find_model(args.model, args.config, args.ckpt, places) or named_model(DEFAULT_MODEL, places)
    config = read_config(files.config)
    sources = find_files(args.files, args.indir, args.size)
    check_outputs(sources, Path(args.outdir))
    if args.json:
        check_writable(Path(args.json).parent, "--json")
    if not sources:
        own = ImageSize.of(config).height if "unet_config" in config["params"] else DRAWING_SIZE
        sources = drawings(args.size or min(own, DRAWING_SIZE))

    from ldm.io.files import atomic_path
    from ldm.modules.precision import choose_precision
    from ldm.pipelines.loading import choose_device, load_first_stage

    device = choose_device(args.device)
    precision = choose_precision(args.precision, device)
    model = load_first_stage(files.config, files.checkpoint, device, precision)
    logger.info("first stage: %s, from %s", files.name, files.checkpoint)
    unread: list[str] = []
    scores = run(args, model, sources, unread)
    if scores:
        say(table(scores))
        beside = f"the first {SHOWN}" if len(scores) > SHOWN else "all"
        say(f"reconstructions: {args.outdir}/pictures; {beside} below their originals: {args.outdir}/sheet.png")
    if args.json and scores:
        settings = {"model": files.name, "size": args.size, "precision": str(precision).removeprefix("torch.")}
        content = {"settings": settings, "pictures": [asdict(score) for score in scores], "mean": mean(scores)}
        with atomic_path(args.json) as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if unread:
        raise UserError(f"{len(unread)} of {len(sources)} pictures could not be read; the lines above say why")


if __name__ == "__main__":
    sys.exit(main())
