"""The command `sample_diffusion`: sample many images, to measure a model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.class_task import ClassTask
from ldm.cli.command import Parser
from ldm.cli.options import (
    add_count,
    add_sampler,
    add_seed,
    finite_float,
    model_options,
    positive_int,
    sampler_settings,
)
from ldm.cli.run import command_of
from ldm.cli.sample_folder import FIXED, SampleFolder, read_options
from ldm.cli.task import Inputs
from ldm.config.assets import locate
from ldm.config.model_files import ModelFiles, available_models, find_model, named_model
from ldm.config.model_info import ModelInfo
from ldm.config.overrides import options_with_value, split_overrides
from ldm.errors import UserError

if TYPE_CHECKING:
    from ldm.cli.outputs import Output
    from ldm.pipelines.classes import ClassToImage

OWN_FOLDER = "none"  # of --logdir: the samples go to the folder of the model


class SampleDiffusion(ClassTask):
    """Sample many images of an unconditional or class-conditional model, to measure it."""

    name = "sample_diffusion"
    arguments = "-r models/ldm/emoji64 -l outputs -n 64 -c 10 --classes 840-903 --scale 3"
    packed = True  # a run that continues another must pack as the other did

    # -- options -------------------------------------------------------------------------------------------------

    def parents(self) -> list[argparse.ArgumentParser]:
        """Return the options of the model; the published script has its own names for the others."""
        return [model_options()]

    def add_options(self, parser: Parser) -> None:
        """Add the options of the published script, with its names and defaults, and a few more."""
        add = parser.add_argument
        add("overrides", nargs="*", metavar="key=value", help="a value of the configuration, as model.key.sub=value")
        add("-r", "--resume", metavar="PATH", help="the model: its folder, a training run, or a checkpoint in either")
        add("-n", "--n_samples", type=positive_int, default=50_000, metavar="N", help="default: %(default)s")
        add("-l", "--logdir", default=OWN_FOLDER, metavar="DIR", help="default: the folder of the model, or outputs")
        add(
            "--continue",
            dest="run",
            metavar="RUN",
            help="continue an interrupted run, or extend it to a higher -n: the folder with its sampling_config.yaml",
        )
        samplers = add_sampler(parser, 50, eta=1.0, steps_flags=("-c", "--custom_steps"), eta_flags=("-e", "--eta"))
        samplers.add_argument(
            "-v", "--vanilla_sample", action="store_true", help="sample as DDPM, in all timesteps of the model"
        )
        self.add_class_option(parser, "all, evenly; sample i has the class i modulo their number")
        add(
            "--scale",
            type=finite_float,
            default=1.0,
            help="guidance scale for classes; 1 is none (default: %(default)s)",
        )
        add_seed(parser)
        add_count(parser, "--batch_size", 10, "samples at once")

    def parse(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Parse the command line; `recorded` holds the options of a run to continue, which are the defaults then.

        Raises:
            UserError: There is no such run, or it has other options.
        """
        words = list(sys.argv[1:] if argv is None else argv)
        parser = self.make_parser()
        args = _parse(parser, words)
        args.recorded = None
        if args.run is None:
            return args
        recorded = read_options(Path(args.run))
        names = {"custom_steps": "steps"}
        defaults = {names.get(name, name): recorded[name] for name in (*FIXED, "n_samples", "batch_size")}
        parser.set_defaults(**{name: value for name, value in defaults.items() if name != "overrides"})
        args = _parse(parser, words)
        for name in FIXED:
            given, before = getattr(args, names.get(name, name)), recorded[name]
            if given != before and (name, given) != ("overrides", []):
                raise UserError(f"--continue: {name} {given} differs from the run's {before}; leave it out")
        if args.n_samples < recorded["n_samples"]:
            raise UserError(f"--continue: the run has {recorded['n_samples']} samples; give as many or more, or none")
        if args.logdir != OWN_FOLDER:
            raise UserError("--continue names the folder; leave out --logdir")
        args.recorded = recorded
        return args

    # -- the model -----------------------------------------------------------------------------------------------

    def choose_model(self, args: argparse.Namespace) -> ModelFiles:
        """Return the model that `-r` or the options of the other commands name, or that of the run to continue."""
        if args.recorded is not None:
            return self._recorded_model(args)
        files = self._named_model(args)
        if files is None:
            known = ", ".join(available_models()) or "none"
            raise UserError(f"there is no model to sample from; name its folder with -r (in models/ldm: {known})")
        return files

    def _named_model(self, args: argparse.Namespace) -> ModelFiles | None:
        if args.resume is None:
            return find_model(args.model, args.config, args.ckpt)
        if args.model or args.ckpt:
            raise UserError("-r names the model; leave out --model and --ckpt")
        if locate(args.resume).is_file():
            return find_model(None, args.config, args.resume)
        files = named_model(args.resume)
        return files if args.config is None else find_model(None, args.config, str(files.checkpoint))

    def _recorded_model(self, args: argparse.Namespace) -> ModelFiles:
        """Return the model of the run to continue."""
        recorded = args.recorded
        config, checkpoint = locate(recorded["config"]), locate(recorded["resume"])
        if args.resume or args.model or args.ckpt:
            given = self._named_model(args)
            if given is not None and given.checkpoint.resolve() != checkpoint.resolve():
                raise UserError(
                    f'--continue: the run uses the model "{checkpoint}"; leave out the model, or start a new run'
                )
        for path in (config, checkpoint):
            if not path.exists():
                raise UserError(f'--continue: the run used "{path}", which is missing; restore it')
        return ModelFiles(str(recorded.get("model", checkpoint.parent.name)), config, checkpoint)

    def read_info(self, args: argparse.Namespace, files: ModelFiles) -> ModelInfo:
        """Read the configuration with the given values; a run to continue has kept them in its own."""
        return ModelInfo.read(files, args.overrides if args.recorded is None else ())

    # -- what to sample ------------------------------------------------------------------------------------------

    def pipeline(self, args: argparse.Namespace, info: ModelInfo) -> ClassToImage:
        """See `Task.pipeline`."""
        from ldm.pipelines.class_names import Classes
        from ldm.pipelines.classes import ClassToImage

        if Classes.of(info) is None and (args.classes or args.scale != 1):
            option = "--classes" if args.classes else "--scale"
            raise UserError(f'the model "{info.name}" is unconditional; leave out {option}')
        settings = sampler_settings(args)
        if args.vanilla_sample:
            settings |= {"sampler": "ddpm", "steps": info.timesteps, "eta": 1.0}
        return ClassToImage(**settings, height=info.size.height, width=info.size.width)

    def inputs(self, args: argparse.Namespace, info: ModelInfo) -> list[Inputs]:
        """Return the inputs, cycling through the classes, so that a run can be extended."""
        from ldm.pipelines.class_names import Classes

        classes = Classes.of(info)
        if classes is None:
            return [{}] * args.n_samples
        chosen = classes.parse(args.classes) if args.classes else range(classes.count)
        each = [self.class_inputs(classes, label) for label in chosen]
        return [each[i % len(each)] for i in range(args.n_samples)]

    def output(self, args: argparse.Namespace, files: ModelFiles, info: ModelInfo) -> Output:
        """Return the folder of the run: a new one, or that of the run to continue."""
        base = Path(args.run) if args.recorded is not None else self._base(args, files)
        return SampleFolder(args, files, info, base)

    def _base(self, args: argparse.Namespace, files: ModelFiles) -> Path:
        """Return the folder of all samples of the model: in its own folder, or in one of its name in `--logdir`."""
        if args.logdir != OWN_FOLDER:
            return Path(args.logdir) / files.name / "samples"
        if files.checkpoint.is_dir():  # in the form of diffusers, maybe in the cache of downloads
            return Path("outputs") / files.name / "samples"
        folder = files.checkpoint.parent
        return (folder.parent if folder.name == "checkpoints" else folder) / "samples"


def _parse(parser: Parser, words: Sequence[str]) -> argparse.Namespace:
    """Parse the words; values of the configuration may stand anywhere, also after `--classes`, which takes many."""
    overrides, others = split_overrides(words, options_with_value(parser))
    args: Any = parser.parse_args(others)
    args.overrides = [*overrides, *args.overrides]
    return args


main = command_of(SampleDiffusion())
