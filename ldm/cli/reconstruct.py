"""The command `reconstruct`: encode and decode images with a first stage."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ldm.cli.command import Parser, say
from ldm.cli.input_files import file_input, unchanged
from ldm.cli.options import add_count, image_side, model_options
from ldm.cli.outputs import ImageFolder
from ldm.cli.run import command_of
from ldm.cli.task import Inputs, Task
from ldm.config.assets import locate
from ldm.config.model_files import FIRST_STAGES, MODELS, ModelFiles, find_model, named_model
from ldm.config.model_info import ModelInfo
from ldm.errors import UserError
from ldm.io.files import check_writable, folded_name, variants
from ldm.io.folders import list_files_below
from ldm.io.image_formats import image_suffixes

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ldm.cli.metadata import RunInfo
    from ldm.modules.losses.lpips import LPIPS
    from ldm.pipelines.generation import Sample
    from ldm.pipelines.pipeline import Pipeline
    from ldm.pipelines.reconstruction import Reconstruction

logger = logging.getLogger(__name__)

PLACES = (FIRST_STAGES, MODELS)
DEFAULT_MODEL = "emoji64"
DRAWINGS, DRAWING_SIZE = 8, 128  # images without other input, and their largest size in pixels
SMALLEST = 16  # side in pixels, which LPIPS needs


class Reconstruct(Task["Reconstruction"]):
    """Encode and decode images with a first stage, and measure the difference."""

    name = "reconstruct"
    arguments = "--indir data/superres_examples --no-psim"
    outdir = "outputs/reconstruct"
    progress = "reconstructing"
    pipeline_path = "ldm.pipelines.reconstruction.Reconstruction"

    def parents(self) -> list[argparse.ArgumentParser]:
        """Return the options of the model."""
        return [model_options(f"{FIRST_STAGES} or {MODELS}")]

    def add_options(self, parser: Parser) -> None:
        """Add the images, their size, and the scores."""
        parser.add_argument("files", nargs="*", metavar="FILE", help="images (default: some of the emoji drawings)")
        parser.add_argument("--indir", metavar="DIR", help="use all images in this folder and below")
        parser.add_argument("--outdir", metavar="DIR", default=self.outdir, help="default: %(default)s")
        parser.add_argument(
            "--size",
            type=image_side,
            metavar="PIXELS",
            help="use the centred square, resized (default: whole images)",
        )
        add_count(parser, "--batch_size", 8, "images of one size at once")
        parser.add_argument(
            "--no-psim", action="store_true", help="leave out PSIM, whose network is downloaded on first use"
        )
        parser.add_argument("--json", metavar="FILE", help="write the table here too")
        parser.set_defaults(seed=0, skip_grid=False)  # nothing is random

    # -- the model -----------------------------------------------------------------------------------------------

    def choose_model(self, args: argparse.Namespace) -> ModelFiles:
        """Return the model that the options name, else the bundled one."""
        files = find_model(args.model, args.config, args.ckpt, PLACES) or named_model(DEFAULT_MODEL, PLACES)
        logger.info("first stage: %s, from %s", files.name, files.checkpoint)
        return files

    def load_model(self, files: ModelFiles, info: ModelInfo, device: torch.device, precision: torch.dtype) -> Any:
        """Load the first stage alone."""
        from ldm.pipelines.loading import load_first_stage

        return load_first_stage(files.config, files.checkpoint, device, precision)

    # -- what to reconstruct -------------------------------------------------------------------------------------

    def pipeline(self, args: argparse.Namespace, info: ModelInfo) -> Reconstruction:
        """See `Task.pipeline`."""
        from ldm.pipelines.reconstruction import Reconstruction

        return Reconstruction(size=args.size)

    def inputs(self, args: argparse.Namespace, info: ModelInfo) -> list[Inputs]:
        """Return the images that the options name, else some drawings that the bundled model has not seen."""
        found = find_files(args.files, args.indir)
        if not found:
            own = info.size.height if "unet_config" in info.params else DRAWING_SIZE
            return drawing_inputs(args.size or min(own, DRAWING_SIZE))
        names = unique([name for _, name in found])
        return [{**file_input("image", path), "name": name} for name, (path, _) in zip(names, found, strict=True)]

    def read(self, inputs: Inputs, pipeline: Reconstruction) -> np.ndarray:
        """Return the image."""
        if "drawing" in inputs:
            return read_drawing(inputs["drawing"], inputs["size"])
        return read_image(unchanged("image", inputs), pipeline.size)

    def default_batch_size(self, args: argparse.Namespace) -> int:
        """Return the number that the options ask for."""
        return args.batch_size

    # -- files ---------------------------------------------------------------------------------------------------

    def output(self, args: argparse.Namespace, files: ModelFiles, info: ModelInfo) -> ReconstructionFolder:
        """See `Task.output`."""
        return ReconstructionFolder(self, args)

    def path(self, outdir: Path, inputs: Inputs, number: int) -> Path:
        """Return a path with the name of the image."""
        return outdir / "images" / inputs["name"]

    def panels(self, sample: Sample, pipeline: Pipeline) -> list[np.ndarray]:
        """Return the original."""
        return [sample.item.request]

    def new_paths(self, outdir: Path, inputs: Inputs, number: int) -> Iterator[Path]:
        """Yield the name of the image, then `name-1.png` and so on."""
        return variants(self.path(outdir, inputs, number))

    def grid_paths(self, outdir: Path, args: argparse.Namespace, inputs: Sequence[Inputs]) -> Iterator[Path]:
        """Yield paths for the grid."""
        return variants(outdir / "grid.png")


def find_files(files: Sequence[str], indir: str | None) -> list[tuple[Path, str]]:
    """Return the paths and names of the images that the options name; empty if they name none.

    Raises:
        UserError: The folder is missing or holds no image.
    """
    found = [(locate(file), Path(file).name) for file in files]
    if indir is not None:
        indir = str(locate(indir))
        if not Path(indir).is_dir():
            raise UserError(f'there is no folder "{indir}"; check --indir')
        listing = list_files_below(indir, image_suffixes())
        if not listing.files:
            raise UserError(f'there is no image in "{indir}"; give --indir a folder with PNG, JPEG or WebP files')
        listing.log_others("images")
        found += zip(listing.paths, listing.files, strict=True)
    return found


def unique(names: Sequence[str]) -> list[str]:
    """Return names of PNG files: `a.jpg` becomes `a.png`, or `a.jpg.png`, `a.jpg-2.png` if that is taken."""
    taken: set[str] = set()
    made = []
    for name in names:
        candidates = [f"{Path(name).with_suffix('')}.png", f"{name}.png"]
        candidates += [f"{name}-{number}.png" for number in range(2, len(names) + 2)]
        made.append(next(each for each in candidates if folded_name(each) not in taken))
        taken.add(folded_name(made[-1]))
    return made


def read_image(path: Path, size: int | None) -> np.ndarray:
    """Read an image, or with `size` its centred square.

    Raises:
        UserError: It cannot be read, or is smaller than 16 pixels.
    """
    from ldm.io.images import load_image
    from ldm.io.pixels import to_uint8

    pixels = to_uint8(load_image(path, size))[0]
    if min(pixels.shape[:2]) < SMALLEST:
        raise UserError(f'the image "{path}" is smaller than {SMALLEST} pixels; enlarge it with --size')
    return pixels


def drawing_inputs(size: int) -> list[Inputs]:
    """Return the inputs of some emoji drawings, named after their captions."""
    from ldm.data.emoji import EmojiValidation

    pairs = EmojiValidation(size)
    captions = [pairs[index * len(pairs) // DRAWINGS]["caption"] for index in range(DRAWINGS)]
    return [
        {"drawing": index, "size": size, "name": f"{caption.replace(' ', '-')}.png"}
        for index, caption in enumerate(captions)
    ]


def read_drawing(index: int, size: int) -> np.ndarray:
    """Return one of `DRAWINGS` emoji drawings on a background that the bundled model has not seen it on."""
    from ldm.data.emoji import EmojiValidation
    from ldm.io.pixels import to_uint8

    pairs = EmojiValidation(size)
    return to_uint8(pairs[index * len(pairs) // DRAWINGS]["image"])


@dataclass(frozen=True)
class Score:
    """Difference of one image and its reconstruction. `psim` is LPIPS, 0 for equal images; None if not measured."""

    image: str
    width: int
    height: int
    psnr: float
    ssim: float
    psim: float | None


class ReconstructionFolder(ImageFolder):
    """Folder of reconstructions, beside their originals in a grid, and a table of scores."""

    def __init__(self, task: Reconstruct, args: argparse.Namespace) -> None:
        super().__init__(task, args)
        if args.json:
            check_writable(Path(args.json).parent, "--json")
        self.scores: list[Score] = []
        self.lpips: LPIPS | None = None

    def plan(self, inputs: Sequence[Inputs], seed: int, batch_size: int) -> Sequence[int]:
        """See `Output.plan`.

        Raises:
            UserError: A reconstruction would replace an image to read.
        """
        outputs = {self.task.path(self.outdir, each, 0).resolve() for each in inputs}
        outputs.add((self.outdir / "grid.png").resolve())
        for each in inputs:
            if "image" in each and Path(each["image"]).resolve() in outputs:
                raise UserError(f'"{each["image"]}" would be overwritten; choose another --outdir')
        return super().plan(inputs, seed, batch_size)

    def open(self, run: RunInfo, pipeline: Pipeline) -> None:
        """See `Output.open`."""
        super().open(run, pipeline)
        self.lpips = None if self.args.no_psim else load_lpips()

    def save(self, sample: Sample) -> None:
        """Write one reconstruction, and measure it."""
        from ldm.io.pixels import to_uint8

        super().save(replace(sample, pixels=to_uint8(sample.image)))
        name = self.paths[-1].relative_to(self.outdir / "images")
        if self.lpips is not None:
            self.lpips.to(sample.latents.device)
        self.scores.append(measure(str(name), sample.item.request, sample.image, self.lpips))

    def close(self, seconds: float, finished: bool) -> None:
        """Write the grid and the scores."""
        if self.scores:
            say(table(self.scores))
        super().close(seconds, finished)
        if self.args.json and self.scores:
            self._write_json()

    def _write_json(self) -> None:
        from ldm.io.files import atomic_path

        settings = {"model": self.run.model, "size": self.args.size, "precision": self.run.precision}
        rows = [asdict(score) for score in self.scores]
        with atomic_path(self.args.json) as temporary:
            content = {"settings": settings, "images": rows, "mean": mean(self.scores)}
            temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def measure(name: str, original: np.ndarray, output: np.ndarray, lpips: LPIPS | None) -> Score:
    """Return the scores of a reconstruction (H, W, 3) in [-1, 1] of an original (H, W, 3) uint8."""
    import torch
    from torchmetrics.functional.image import structural_similarity_index_measure

    from ldm.pipelines.metrics import psnr

    pair = original / 127.5 - 1.0, output
    wanted, got = (torch.from_numpy(each).permute(2, 0, 1)[None].float() for each in pair)
    psim = None
    if lpips is not None:
        device = lpips.scaling_layer.shift.device
        with torch.inference_mode():
            psim = float(lpips(wanted.to(device), got.to(device)))
    ssim = cast(torch.Tensor, structural_similarity_index_measure(got, wanted, data_range=2.0))
    return Score(name, original.shape[1], original.shape[0], psnr(*pair, data_range=2.0), float(ssim), psim)


def load_lpips() -> LPIPS | None:
    """Return the network of PSIM; None, with a log line, if it cannot be downloaded."""
    from ldm.modules.losses.lpips import LPIPS

    try:
        lpips = LPIPS()
        with redirect_stdout(sys.stderr):  # torch prints there what it downloads; stdout is for the table
            lpips.prepare()
        return lpips
    except UserError as error:
        logger.warning("PSIM is left out, as with --no-psim: %s", error)
        return None


def mean(scores: Sequence[Score]) -> dict[str, float | None]:
    """Return the mean of each score over the images."""
    columns = {key: [getattr(score, key) for score in scores] for key in ("psnr", "ssim", "psim")}
    return {key: None if None in values else sum(values) / len(values) for key, values in columns.items()}


def table(scores: Sequence[Score]) -> str:
    """Return the scores in Markdown, a row for each image and one for the mean."""
    heads = ["image", "size", "PSNR, dB", "SSIM"] + (["PSIM"] if scores[0].psim is not None else [])
    rows = [(score.image, f"{score.width} × {score.height}", asdict(score)) for score in scores]
    lines = [heads, ["---", *(len(heads) - 1) * ["---:"]]]
    for name, size, values in [*rows, ("mean", "", mean(scores))]:
        psim = [] if values["psim"] is None else [f"{values['psim']:.3f}"]
        lines.append([name, size, f"{values['psnr']:.2f}", f"{values['ssim']:.3f}", *psim])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


main = command_of(Reconstruct())
