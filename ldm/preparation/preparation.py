"""Preparation of a folder of images: from the files to lists, a vocabulary and configurations that train on them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from ldm.config.model_config import ImageSize
from ldm.config.targets import shown
from ldm.data.row_captions import FROM_NAME, FROM_TEXT_FILE, add_captions, caption_file
from ldm.data.row_labels import FROM_FOLDER, add_labels, found_names
from ldm.data.rows import Rows, find_rows
from ldm.data.tables import METADATA_FILES, is_text
from ldm.data.unreadable import shown_names
from ldm.errors import UserError
from ldm.io.files import check_writable
from ldm.preparation.inspection import ImageFacts, Inspection
from ldm.preparation.machine import Machine
from ldm.preparation.networks import Denoiser, FirstStage, known_first_stage, make_denoiser, new_first_stage
from ldm.preparation.recipes import Data, Recipe, cached_variants, text_weights
from ldm.preparation.results import (
    CACHE,
    CLASS_NAMES,
    FIRST_STAGE,
    RUNS,
    TRAIN,
    VALIDATION,
    VOCABULARY,
    write_results,
)
from ldm.preparation.sizing import denoiser_schedule, first_stage_schedule
from ldm.preparation.splits import split
from ldm.preparation.vocabulary import Vocabulary, make_vocabulary

NAME = "ldm prepare"  # in messages
SIZES = (32, 64, 128, 256)
LARGEST_WITHOUT_GPU = 64  # of the sizes that are chosen automatically
SMALL_SHARE = 0.1  # of the images may be smaller than the size that is chosen automatically
CAPTION_COLUMNS = ("caption", "text")
LABEL_COLUMNS = ("label", "class")
FEWEST, FEW = 2, 500  # images
QUICK_STEPS = 100

Report = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """Options of a preparation.

    Attributes:
        folder: folder of the images.
        outdir: folder of the results.
        task: one of `recipes.TASKS`.
        size: side of the images; None chooses it.
        table: table of the images; None uses the folder.
        captions: source of the captions, see `Folder`; None chooses it.
        labels: source of the classes, see `Folder`; None chooses it.
        fraction: share of the images for validation.
        first_stage: model whose first stage is fine-tuned; None trains a new one.
        keeps_first_stage: use that first stage as it is.
        vocabulary: known vocabulary; None builds one.
        with_losses: train the first stage with a discriminator and LPIPS; None does so on a GPU.
        degradation: degradation for super-resolution.
        steps: steps of each training run; None chooses them.
        quick: use tiny networks and few steps.
    """

    folder: Path
    outdir: Path
    task: str
    size: int | None = None
    table: Path | None = None
    captions: str | None = None
    labels: str | None = None
    fraction: float = 0.05
    first_stage: str | None = None
    keeps_first_stage: bool = False
    vocabulary: str | None = None
    with_losses: bool | None = None
    degradation: str = "pil_bicubic"
    steps: int | None = None
    quick: bool = False

    @property
    def step_limit(self) -> int | None:
        """Steps of each run, if they do not depend on the images."""
        return self.steps or (QUICK_STEPS if self.quick else None)


@dataclass(frozen=True)
class Preparation:
    """Result of a preparation.

    Attributes:
        recipe: the configurations.
        files: the files that were written.
        captions: captions of the validation images, or of training images without these.
        classes: names of the classes.
    """

    recipe: Recipe
    files: tuple[Path, ...]
    captions: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()


def check_paths(options: Options, force: bool) -> None:
    """Check the folders of a preparation, before any work.

    Raises:
        UserError: the folder of the images is missing, or the results cannot be written to their folder.
    """
    folder, out = options.folder, options.outdir
    if not folder.is_dir():
        raise UserError(f'{NAME}: there is no folder "{folder}"; name the folder of your images')
    for path in (folder.resolve(), out.resolve()):
        if not is_text(str(path)) or re.search(r"[*\n]|\$\{", str(path)):
            raise UserError(
                f"{NAME}: the path {shown(str(path))} has characters that a configuration cannot hold; rename it"
            )
    if out.resolve() == folder.resolve() or folder.resolve() in out.resolve().parents:
        raise UserError(f'--outdir "{out}" lies inside the folder of the images; name another folder')
    check_writable(out, "--outdir")
    if out.is_dir() and any(out.iterdir()) and not force:
        raise UserError(f'--outdir "{out}" exists; name another folder, or replace its files with --force')


def find_images(options: Options, report: Report) -> tuple[Rows, Inspection]:
    """Find and inspect the images, and report what they are like.

    Raises:
        UserError: there is no image, or none can be read.
    """
    rows = find_rows(NAME, options.folder, options.table, needs_table=_needs_table(options))
    rows.remove_duplicates()
    inspection = Inspection.of(rows.files, rows.paths)
    for line in inspection.lines():
        report(line)
    if others := sorted(rows.others.difference(map(caption_file, rows.files))):
        found = "1 file is neither an image nor a caption"
        found = found if len(others) == 1 else f"{len(others):,} files are neither images nor captions"
        report(f"{found}: {shown_names(others)}")
    if len(inspection.damaged) == len(rows):
        raise UserError(f"{NAME}: none of {len(rows)} images can be read (the first: {inspection.facts[0].fault})")
    return rows, inspection


def inspect(options: Options, report: Report) -> None:
    """Report what the images, and their captions or classes, are like; write nothing.

    Raises:
        UserError: there is no image, or the images do not suit the task.
    """
    rows, inspection = find_images(options, report)
    rows.keep(index for index in range(len(rows)) if index not in set(inspection.damaged))
    _add_entries(rows, options, report)
    if options.task == "text":
        with TemporaryDirectory() as folder:
            _vocabulary(rows, range(len(rows)), options, Path(folder), report)


def _needs_table(options: Options) -> bool:
    """Return whether captions or classes may come from a table in the folder."""
    has_table = any((options.folder / name).is_file() for name in METADATA_FILES)
    if options.task == "text":
        return (options.captions is None and has_table) or options.captions not in (None, FROM_TEXT_FILE, FROM_NAME)
    if options.task == "class":
        return options.labels not in (None, FROM_FOLDER)
    return False


def prepare(options: Options, machine: Machine, report: Report) -> Preparation:
    """Inspect images, and write lists, a vocabulary and configurations for them.

    Args:
        options: the options.
        machine: the machine that trains.
        report: function that prints a line.

    Raises:
        UserError: the images do not suit the task, or an option is invalid.
    """
    stage = known_first_stage(options.first_stage) if options.first_stage else None
    rows, inspection = find_images(options, report)
    size = options.size or _choose_size(inspection.readable, machine)
    stage = stage or new_first_stage(size, machine, options.quick)
    multiple = _check_size(size, options.task, stage, machine)
    facts = _leave_out(rows, inspection, size, multiple, report)
    classes = _add_entries(rows, options, report)
    groups = [facts[file].digest for file in rows.files]
    train, validation = split(groups, options.fraction, rows.entries.get("class_label"))
    out = options.outdir.resolve()
    vocabulary = _vocabulary(rows, train, options, out, report) if options.task == "text" else None
    data = Data(
        root=options.folder.resolve(),
        train=out / TRAIN,
        validation=out / VALIDATION if validation else None,
        size=size,
        task=options.task,
        count=len(train),
        class_names=out / CLASS_NAMES if classes else None,
        classes=len(classes),
        vocabulary=vocabulary,
        degradation=options.degradation,
    )
    recipe = _recipe(data, stage, options, machine)
    files = write_results(rows, (train, validation), classes, recipe, out)
    captions = rows.entries.get("caption", [])
    shown = tuple(captions[index] for index in (validation or train)) if captions else ()
    return Preparation(recipe, files, shown, tuple(classes))


# -- images ----------------------------------------------------------------------------------------------------------


def _choose_size(facts: Sequence[ImageFacts], machine: Machine) -> int:
    """Return the largest usual size that most images have."""
    sides = sorted(each.side for each in facts)
    side = sides[int(SMALL_SHARE * len(sides))]
    fitting = [size for size in SIZES if size <= side and (machine.has_gpu or size <= LARGEST_WITHOUT_GPU)]
    return max(fitting, default=SIZES[0])


def _check_size(size: int, task: str, stage: FirstStage, machine: Machine) -> int:
    """Return the number that the size of the images must be a multiple of.

    Raises:
        UserError: it is not.
    """
    multiple = make_denoiser(task, size, stage, 1, machine).multiple * stage.factor
    ImageSize(size, size, stage.factor, multiple).check("--size", size)
    return multiple


def _leave_out(rows: Rows, inspection: Inspection, size: int, multiple: int, report: Report) -> dict[str, ImageFacts]:
    """Remove images that cannot be read, or are smaller than `size`, and return the facts about all by their files.

    Raises:
        UserError: too few images are left.
    """
    small = set(inspection.smaller_than(size))
    readable = len(rows) - len(inspection.damaged)
    if small:
        if len(small) == readable:
            largest = max(facts.side for facts in inspection.readable) // multiple * multiple
            remedy = f"give --size {largest}, or larger images" if largest else "give larger images"
            raise UserError(f"all {readable} images are smaller than {size} pixels; {remedy}")
        names = shown_names([inspection.files[index] for index in sorted(small)])
        report(f"left out: {len(small):,} smaller than {size} pixels, which a smaller --size keeps: {names}")
    left_out = small | set(inspection.damaged)
    rows.keep(index for index in range(len(rows)) if index not in left_out)
    if len(rows) < FEWEST:
        raise UserError(f'"{rows.listed}" has {len(rows)} usable image, and at least {FEWEST} are needed; add images')
    if len(rows) < FEW:
        report(f"{len(rows):,} images are few: a model will repeat them, instead of generating new ones")
    return dict(zip(inspection.files, inspection.facts, strict=True))


# -- captions and classes --------------------------------------------------------------------------------------------


def _add_entries(rows: Rows, options: Options, report: Report) -> list[str]:
    """Add captions or classes to the rows, and return the names of the classes.

    Raises:
        UserError: no image has a caption, or there is only one class.
    """
    if options.task == "text":
        source = options.captions or _column(rows, CAPTION_COLUMNS) or FROM_TEXT_FILE
        _check_source(rows, "--captions", source, (FROM_TEXT_FILE, FROM_NAME))
        add_captions(rows, source)
        words = sorted(len(caption.split()) for caption in rows.entries["caption"])
        report(
            f"captions: {len(words):,} from {_describe_source(source)}, {words[0]} to {words[-1]} words, "
            f"median {words[len(words) // 2]}"
        )
        return []
    if options.task != "class":
        return []
    source = options.labels or _column(rows, LABEL_COLUMNS) or FROM_FOLDER
    _check_source(rows, "--labels", source, (FROM_FOLDER,))
    names = _class_names(rows, add_labels(rows, source, None))
    if len(names) < 2:
        raise UserError(
            f'all {len(rows)} images are of one class, "{names[0]}"; move the images of each class to a folder of its '
            "own, or train an unconditional model with --task unconditional"
        )
    counts = [rows.entries["human_label"].count(name) for name in names]
    report(f"classes: {len(names):,} from {_describe_source(source)}, with {min(counts):,} to {max(counts):,} images")
    return names


def _check_source(rows: Rows, option: str, source: str, words: Sequence[str]) -> None:
    """Raise an error if a source is the name of a column, and there is no table."""
    if rows.table is None and source not in words:
        raise UserError(
            f'{option} {source}: there is no table with the column "{source}"; give --table, or {option} '
            f"{' or '.join(words)}"
        )


def _column(rows: Rows, names: Sequence[str]) -> str | None:
    """Return the first of some columns that the table of the rows has."""
    return next((name for name in names if rows.table is not None and name in rows.table.columns), None)


def _describe_source(source: str) -> str:
    known = {FROM_TEXT_FILE: "text files", FROM_NAME: "file names", FROM_FOLDER: "the names of folders"}
    return known.get(source, f'the column "{source}"')


def _class_names(rows: Rows, names: list[str]) -> list[str]:
    """Return the names of the classes; numbers that are not 0, 1, 2, … become names such as "class 7"."""
    names = names or [name[0] for name in found_names(rows.entries["human_label"])]
    if any(name.isdecimal() for name in names) and names != [str(number) for number in range(len(names))]:
        renamed = {name: f"class {name}" if name.isdecimal() else name for name in names}
        rows.entries["human_label"] = [renamed[name] for name in rows.entries["human_label"]]
        names = list(renamed.values())
    return names


def _vocabulary(rows: Rows, train: Sequence[int], options: Options, out: Path, report: Report) -> Vocabulary:
    captions = [rows.entries["caption"][index] for index in train]
    found = make_vocabulary(captions, options.vocabulary, out / VOCABULARY)
    for line in found.lines():
        report(line)
    return found


# -- results ---------------------------------------------------------------------------------------------------------


def _recipe(data: Data, stage: FirstStage, options: Options, machine: Machine) -> Recipe:
    """Return the configurations for the data."""
    denoiser = make_denoiser(data.task, data.size, stage, data.count, machine, options.quick)
    with_losses = machine.has_gpu and not options.quick if options.with_losses is None else options.with_losses
    variants = cached_variants(data, stage, denoiser, machine)
    steps, trained = options.step_limit, not options.keeps_first_stage
    plan = first_stage_schedule(stage, data.size, data.count, machine, steps, with_losses) if trained else None
    out = data.train.parent
    pattern = out / RUNS / f"*_{Path(FIRST_STAGE).stem}" / "checkpoints" / "last.ckpt"
    return Recipe(
        data=data,
        stage=stage,
        denoiser=denoiser,
        machine=machine,
        stage_plan=plan,
        plan=denoiser_schedule(
            denoiser, data.count * max(1, variants), machine, steps, _encoder_weights(data, denoiser)
        ),
        stage_weights=str(pattern) if trained else str(stage.weights),
        cache=out / CACHE if variants else None,
        with_losses=with_losses,
        workers=min(16, max(1, machine.cores - 1)),
    )


def _encoder_weights(data: Data, denoiser: Denoiser) -> int:
    return text_weights(data.vocabulary, denoiser, data.count) if data.vocabulary is not None else 0
