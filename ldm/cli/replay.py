"""The command `replay`: sample images again from the settings in their files, and compare."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.command import Parser, command, example, say
from ldm.cli.options import model_options
from ldm.cli.recorded_files import RecordedFiles, check_folders
from ldm.cli.task import Task
from ldm.config.assets import locate
from ldm.config.model_files import MODEL_FOLDERS, ModelFiles, find_model, with_additions
from ldm.config.model_info import ModelInfo
from ldm.errors import DiskFullError, UserError, did_you_mean
from ldm.io.files import check_writable, variants

if TYPE_CHECKING:
    import numpy as np

    from ldm.cli.metadata import Record, RunInfo

logger = logging.getLogger("ldm")

# Tasks by the name in the metadata of their images.
TASKS = {
    "knn2img": "ldm.cli.knn2img.Knn2Img",
    "img2img": "ldm.cli.img2img.Img2Img",
    "layout2img": "ldm.cli.layout2img.Layout2Img",
    "semantic2img": "ldm.cli.semantic2img.Semantic2Img",
    "class2img": "ldm.cli.class2img.Class2Img",
    "sample_diffusion": "ldm.cli.sample_diffusion.SampleDiffusion",
    "inpaint": "ldm.cli.inpaint.Inpaint",
    "superres": "ldm.cli.superres.Superres",
    "txt2img": "ldm.cli.txt2img.Txt2Img",
    "reconstruct": "ldm.cli.reconstruct.Reconstruct",
}


@cache
def find_task(name: str) -> Task:
    """Return the task called `name`, always the same object: it may cache what several images need.

    Raises:
        UserError: There is no such task.
    """
    if name not in TASKS:
        raise UserError(f'there is no task "{name}"{did_you_mean(name, TASKS)}; this image needs a newer version')
    module, _, cls = TASKS[name].rpartition(".")
    return getattr(import_module(module), cls)()


@dataclass(frozen=True)
class Comparison:
    """Comparison of an image in a file with the same sampled again.

    Attributes:
        path: the file.
        again: the new image, (H, W, 3) uint8.
        shape: of the image in the file.
        different: number of pixels that differ.
        largest: largest difference of a channel, in levels of 255.
    """

    path: Path
    again: np.ndarray
    shape: tuple[int, ...]
    different: int
    largest: int

    @property
    def identical(self) -> bool:
        """True if all pixels are equal."""
        return self.different == 0 and self.shape == self.again.shape

    def __str__(self) -> str:
        if self.identical:
            return f"{self.path}: identical"
        if self.shape != self.again.shape:
            return f"{self.path}: DIFFERENT, {self.shape} in the file, {self.again.shape} sampled again"
        pixels = self.shape[0] * self.shape[1]
        return f"{self.path}: DIFFERENT in {self.different} of {pixels} pixels, by {self.largest}/255 at most"


def model_of(run: RunInfo, name: str | None, config: str | None, ckpt: str | None) -> ModelFiles:
    """Return the model of a run, or the one that the options name instead, with the additions of the run.

    Raises:
        UserError: It is missing.
    """
    files = find_model(name, config, ckpt, MODEL_FOLDERS) or _recorded_model(run)
    return with_additions(files, run.vae, run.loras, run.embeddings)


def _recorded_model(run: RunInfo) -> ModelFiles:
    config, checkpoint = locate(run.config), locate(run.checkpoint)
    for path in (config, checkpoint):
        if not path.exists():
            raise UserError(
                f'the model "{run.model}" was at "{path}", which is missing{_looked(path)}; name it with --model or '
                "--ckpt"
            )
    return ModelFiles(run.model, config, checkpoint)


def _looked(path: Path) -> str:
    return "" if path.is_absolute() else " in the current folder and in the folders above the image"


def replay(
    record: Record, path: Path, load: Callable[[RunInfo], Any], input_folders: Sequence[Path] = ()
) -> Comparison:
    """Sample the image of `record` again, and compare it with the file that the record comes from.

    Args:
        record: the record of the image.
        path: the file.
        load: returns the model of a run, ready to sample.
        input_folders: folders to look for input files in.

    Raises:
        UserError: An input is missing or has changed, or the record is damaged.
    """
    import numpy as np

    from ldm.io.images import open_image

    task = find_task(record.run.task)
    record = RecordedFiles(path, input_folders).find(record)
    model = load(record.run)
    try:
        again = _sampled_again(task, model, record, path.name)
    except (KeyError, TypeError, ValueError) as error:  # an entry of the record is missing or has another type
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f'the settings in "{path}" are damaged, or need another version: {reason}') from error
    before = np.asarray(open_image(path))
    if before.shape != again.shape:
        return Comparison(path, again, before.shape, 0, 0)
    difference = np.abs(before.astype(int) - again).max(axis=-1)
    return Comparison(path, again, before.shape, int((difference > 0).sum()), int(difference.max()))


def _sampled_again(task: Task, model: Any, record: Record, description: str) -> np.ndarray:
    from ldm.io.pixels import to_uint8
    from ldm.pipelines.generation import Item, generate

    pipeline, position = task.replayed(record.run.settings), record.position
    request = task.read(record.inputs, pipeline)
    # Copies fill the batch: the last bits of a sample depend on the size of its batch.
    start_seed = record.inputs.get("start_seed")
    items = [Item(index, record.seed, request, start_seed) for index in range(position.batch)]
    samples = generate(
        pipeline,
        model,
        items,
        count=len(items),
        batch_size=len(items),
        packed=position.packed,
        description=description,
    )
    sample = list(samples)[position.position]
    if sample.error is not None:
        raise sample.error
    return to_uint8(sample.image)


def make_parser() -> Parser:
    """Return the parser."""
    parser = Parser(
        description="Sample images again from the settings in their files, and report whether they are identical. "
        "The exit status is 1 if one is not.",
        epilog=example("replay", "outputs/txt2img-samples/samples/0000.png"),
        parents=[model_options()],
    )
    parser.add_argument("images", nargs="+", metavar="PNG", help="an image that a command of this project wrote")
    parser.add_argument(
        "--input-dir",
        action="append",
        default=[],
        metavar="DIR",
        help="look for input images and masks there too, by name and then by content; repeatable (default: look in the "
        "current folder, beside the PNG and above it)",
    )
    parser.add_argument("--outdir", metavar="DIR", help="write the new images there (default: only compare)")
    parser.set_defaults(precision=None)  # that of the image
    return parser


def _save_new(comparison: Comparison, record: Record, folder: Path) -> None:
    """Write the new image to `folder` under the name of the old one, or another name if that is taken."""
    from ldm.io.images import save_new_png

    wanted = folder / comparison.path.name
    text = record.run.text(record.inputs, record.seed, record.position)
    written = save_new_png(comparison.again, variants(wanted), text)
    if written != wanted:
        logger.info('"%s" exists; the new image is "%s"', wanted, written.name)


def _reported(error: UserError, paths: Sequence[Path]) -> UserError:
    """Log `error` if there are other images to continue with, else raise it."""
    if len(paths) == 1:
        raise error
    logger.error("%s", error)
    return error


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    args = make_parser().parse_args(argv)
    from ldm.cli.metadata import GridError, Record

    paths = [Path(path) for path in args.images]
    records: dict[Path, Record] = {}
    failures: list[UserError] = []
    for path in paths:
        try:
            records[path] = Record.read(path)
        except GridError as error:  # results of a folder often have their grid beside them
            if len(paths) == 1:
                raise
            logger.info("skipped: %s", error)
        except UserError as error:
            failures.append(_reported(error, paths))
    if not records:
        raise UserError("none of the images can be sampled again; see above")
    folders = check_folders("--input-dir", args.input_dir)
    if args.outdir:
        check_writable(Path(args.outdir), "--outdir")

    from ldm.modules.precision import choose_precision
    from ldm.pipelines.loading import choose_device

    device = choose_device(args.device)

    @lru_cache(maxsize=1)
    def loaded(task: str, files: ModelFiles, precision: str) -> Any:
        return find_task(task).load_model(files, ModelInfo.read(files), device, choose_precision(precision, device))

    def load(run: RunInfo) -> Any:
        return loaded(run.task, model_of(run, args.model, args.config, args.ckpt), args.precision or run.precision)

    identical = True
    for path, record in records.items():
        try:
            comparison = replay(record, path, load, folders)
            say(str(comparison))
            identical &= comparison.identical
            if args.outdir:
                _save_new(comparison, record, Path(args.outdir))
        except DiskFullError:
            raise
        except UserError as error:
            failures.append(_reported(error, paths))
    if failures:
        raise UserError(f"{len(failures)} of {len(paths)} could not be sampled again; see above")
    return 0 if identical else 1
