"""Folder of a run of thousands of samples: its files, continuing it after an interruption, and the array of them all.

A sample is finished if its file is in the folder `img`: files are written whole or not at all. Sample i has the seed
s + i and always the same class, so a run continues with the missing samples. The array is made from these files at the
end, one after the other, so that the samples are never in memory together.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.command import say
from ldm.cli.outputs import Output
from ldm.config.model_files import ModelFiles
from ldm.config.model_info import ModelInfo
from ldm.config.values import SEED_RANGE
from ldm.errors import UserError
from ldm.io.files import atomic_path, check_writable, reserve_folder

if TYPE_CHECKING:
    import numpy as np

    from ldm.cli.metadata import RunInfo
    from ldm.cli.task import Inputs
    from ldm.pipelines.generation import Sample
    from ldm.pipelines.pipeline import Pipeline

logger = logging.getLogger(__name__)

OPTIONS_FILE = "sampling_config.yaml"
GRID_SAMPLES = 64
GRID_COLUMNS = 8
# Options that samples depend on: each is the same in all parts of a run.
FIXED: Mapping[str, type | tuple[type, ...]] = {
    "custom_steps": int,
    "eta": (int, float),
    "timestep_spacing": (str, type(None)),
    "vanilla_sample": bool,
    "sampler": str,
    "scale": (int, float),
    "classes": (list, type(None)),
    "seed": int,
    "precision": str,
    "overrides": list,
}
# Values of options that the files of earlier versions lack.
EARLIER: Mapping[str, Any] = {"timestep_spacing": None}
# Further entries of the file of options.
NEEDED: Mapping[str, type] = {"n_samples": int, "batch_size": int, "resume": str, "config": str, "global_step": int}


def read_options(folder: Path) -> dict[str, Any]:
    """Read the options of the run in `folder`.

    Raises:
        UserError: The folder holds no run.
    """
    import yaml

    path = folder / OPTIONS_FILE
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or "it is damaged"
        raise UserError(f'--continue: cannot read "{path}": {reason}; name the folder of a run') from None
    options = {**EARLIER, **options} if isinstance(options, dict) else options
    for name, kind in {**FIXED, **NEEDED}.items():
        if not isinstance(options, dict) or not isinstance(options.get(name, ...), kind):
            raise UserError(f'--continue: "{path}" has no valid "{name}"; name the folder of a run')
    return options


class SampleFolder(Output):
    """Folder of a run: `img/sample_000000.png …`, an array of them all, their grid and the options.

    Args:
        args: options of the command; `args.recorded` are those of a run to continue.
        files: the model.
        info: its configuration.
        base: the folder of the run to continue, else the folder of all samples of the model.

    Raises:
        UserError: The folder cannot be written to, or the weights differ from those of the run to continue.
    """

    def __init__(self, args: argparse.Namespace, files: ModelFiles, info: ModelInfo, base: Path) -> None:
        from ldm.io.checkpoint.reading import training_step

        self.args, self.files, self.info = args, files, info
        check_writable(base, "--logdir" if args.recorded is None else "--continue")
        self.step = training_step(files.checkpoint)
        if args.recorded is not None and args.recorded["global_step"] != self.step:
            was = args.recorded["global_step"]
            raise UserError(
                f'--continue: "{files.checkpoint}" is from step {self.step}, the run from {was}; start a new run'
            )
        # The folder of a new run is created in `open`, under another name if this one is taken by then.
        new = base / f"{self.step:08}" / time.strftime("%Y-%m-%d-%H-%M-%S")
        self.folder = base if args.recorded is not None else new
        self.wanted: set[int] = set()
        self.count = 0

    def path(self, index: int) -> Path:
        """Return the file of sample `index`."""
        return self.folder / "img" / f"sample_{index:06}.png"

    def _absent(self, count: int) -> list[int]:
        """Return the indices of the first `count` samples that have no file."""
        folder = self.folder / "img"
        present = set(os.listdir(folder)) if folder.is_dir() else set()
        return [i for i in range(count) if self.path(i).name not in present]

    # -- sampling ------------------------------------------------------------------------------------------------

    def plan(self, inputs: Sequence[Inputs], seed: int, batch_size: int) -> list[int]:
        """Return the indices of all incomplete batches. A whole batch is sampled again: its size affects rounding."""
        super().plan(inputs, seed, batch_size)
        self.count = count = len(inputs)
        self.wanted = set(range(count) if self.args.recorded is None else self._absent(count))
        blocks = sorted({i // batch_size for i in self.wanted})
        return [i for block in blocks for i in range(block * batch_size, min((block + 1) * batch_size, count))]

    def open(self, run: RunInfo, pipeline: Pipeline) -> None:
        """Write the options of the run, and its configuration if values were given; a new run gets a new folder."""
        if self.args.recorded is None:
            self.folder = reserve_folder(self.folder)
        if self.args.overrides and self.args.recorded is None:
            config = self.folder / "config.yaml"
            _save_yaml(config, {"model": self.info.config})
            changed = ModelFiles(self.files.name, config, self.files.checkpoint)
            run = type(run).of(run.task, changed, run.precision, run.settings)
        super().open(run, pipeline)
        _save_yaml(self.folder / OPTIONS_FILE, self._options())
        logger.info("sampling %d images of %d into %s", len(self.wanted), self.count, self.folder)

    def _options(self) -> dict[str, Any]:
        """Return the content of the file of options."""
        args, settings = self.args, self.pipeline.settings()
        size = {"n_samples": args.n_samples, "batch_size": args.batch_size}
        if args.recorded is not None:
            return {**args.recorded, **size}
        model = {
            "resume": self.run.checkpoint,
            "config": self.run.config,
            "model": self.run.model,
            "global_step": self.step,
        }
        fixed = {
            "custom_steps": args.steps,
            "eta": settings["eta"],
            "timestep_spacing": args.timestep_spacing,
            "vanilla_sample": args.vanilla_sample,
            "sampler": args.sampler,
            "scale": args.scale,
            "classes": args.classes,
            "seed": self.seed,
            "precision": args.precision,
            "overrides": args.overrides,
        }
        return {**model, **fixed, **size, "logdir": args.logdir, "version": self.run.version}

    def save(self, sample: Sample) -> None:
        """Write one sample, unless its file exists."""
        from ldm.io.images import save_new_png

        item = sample.item
        if item.index in self.wanted:
            text = self.run.text(self.inputs[item.index], item.seed, sample.position)
            with suppress(FileExistsError):  # a second process that continues the run has sampled the same
                save_new_png(sample.image, [self.path(item.index)], text)

    # -- results -------------------------------------------------------------------------------------------------

    def close(self, seconds: float, finished: bool) -> None:
        """Write the array of all samples and the grid of the first ones."""
        if not finished:
            there = self.count - len(self._absent(self.count))
            say(f"{there} of {self.count} samples are finished; continue with --continue {self.folder}")
            return
        if self.wanted:
            say(f"{len(self.wanted)} samples in {seconds:.1f} s: {self.folder / 'img'}")
        self._join()

    def _join(self) -> None:
        """Write the array of all samples, in the form that tools for FID read, and the grid of the first ones.

        `arr_0` is (N, H, W, C) uint8, `arr_1` (N,) the labels if there are any, `seeds` (N,) the seeds.
        """
        import numpy as np

        from ldm.cli.metadata import Record
        from ldm.io.grids import ContactSheet
        from ldm.io.images import open_image, save_png
        from ldm.io.npz import Rows, write_npz

        paths = [self.path(i) for i in range(self.count)]
        shape = (self.count, *_pixels(paths[0]).shape)
        target = self.folder / "numpy" / f"{'x'.join(map(str, shape))}-samples.npz"
        grid = self.folder / "grid.png"
        if not self.wanted and target.is_file() and grid.is_file():
            say(f"all {self.count} samples are finished: {target}")
            return
        arrays = {"arr_0": Rows(shape, np.dtype(np.uint8), _read_all(paths, shape[1:]))}
        if "class_label" in self.inputs[0]:
            arrays["arr_1"] = Rows.of(np.array([each["class_label"] for each in self.inputs], np.int64))
        seeds = [(self.seed + i) % SEED_RANGE for i in range(self.count)]
        arrays["seeds"] = Rows.of(np.array(seeds, np.int64))
        write_npz(target, arrays)
        say(f"array: {target}")
        sheet = ContactSheet(min(self.count, GRID_SAMPLES), GRID_COLUMNS)
        for path in paths[:GRID_SAMPLES]:
            sheet.add([np.asarray(open_image(path))])
        text = Record.read(paths[0]).run.sheet_text(self.inputs[:GRID_SAMPLES])
        save_png(sheet.image(), grid, text)
        say(f"grid: {grid}")


def _save_yaml(path: Path, content: Mapping[str, Any]) -> None:
    from omegaconf import OmegaConf

    with atomic_path(path) as temporary:
        OmegaConf.save(OmegaConf.create(dict(content)), temporary)


def _read_all(paths: Sequence[Path], shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Yield the pixels of each sample, one after the other.

    Raises:
        UserError: A sample is damaged or has another shape.
    """
    from tqdm import tqdm

    for path in tqdm(paths, desc="joining", unit="sample"):
        pixels = _pixels(path)
        if pixels.shape != shape:
            raise UserError(
                f'the sample "{path}" has the shape {pixels.shape}, not {shape}; delete it and use --continue'
            )
        yield pixels


def _pixels(path: Path) -> np.ndarray:
    """Return a sample as (H, W, C) uint8."""
    import numpy as np

    from ldm.io.images import decode_image

    pixels = np.asarray(decode_image(path, "sample", "delete it and use --continue"))
    return pixels if pixels.ndim == 3 else pixels[..., None]
