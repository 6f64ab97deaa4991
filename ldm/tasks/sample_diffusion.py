"""Many samples of an unconditional or class-conditional model."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.cli.command import Parser
from ldm.cli.options import finite_float, model_options, non_negative_float, positive_int, seed
from ldm.config.assets import locate
from ldm.config.model_config import check_steps, read_config
from ldm.config.model_files import ModelFiles, available_models, find_model
from ldm.errors import UserError
from ldm.tasks.classes import Classes, ClassTask
from ldm.tasks.task import Inputs, Settings

OWN_FOLDER = "none"  # of --logdir: the samples go to the model's folder


class SampleDiffusion(ClassTask):
    """Draw many samples of a model that draws from nothing or from classes, for measuring it."""

    name = "sample_diffusion"
    example = (
        "python scripts/sample_diffusion.py -r models/ldm/emoji64 -l outputs -n 64 -c 10 --classes 840-903 --scale 3"
    )
    outdir = OWN_FOLDER

    def make_parser(self) -> Parser:
        """Those of the published script keep their names and defaults."""
        parser = Parser(
            description=(type(self).__doc__ or "").splitlines()[0],
            epilog=f"example: {self.example}",
            parents=[model_options()],
        )
        self.add_options(parser)
        return parser

    def add_options(self, parser: Parser) -> None:
        """The model, how many, how, and where to."""
        add = parser.add_argument
        add("overrides", nargs="*", metavar="key=value", help="a value of the configuration, as model.key.sub=value")
        add("-r", "--resume", metavar="PATH", help="the model: its folder, a training run, or a checkpoint in either")
        add("-n", "--n_samples", type=positive_int, default=50_000, metavar="N", help="default: %(default)s")
        add("-l", "--logdir", default=OWN_FOLDER, metavar="DIR", help="default: the model's own folder")
        add(
            "--continue",
            dest="run",
            metavar="RUN",
            help="go on with a run that was interrupted, or to a higher -n: the folder of its sampling_config.yaml",
        )
        add("-c", "--custom_steps", type=positive_int, default=50, metavar="N", help="default: %(default)s")
        add("-e", "--eta", type=non_negative_float, help="0 is deterministic, 1 is as DDPM (default: 1.0, of DDIM)")
        samplers = parser.add_mutually_exclusive_group()
        samplers.add_argument(
            "-v", "--vanilla_sample", action="store_true", help="sample as DDPM, in all steps of the model"
        )
        for name in ("plms", "dpm"):
            text = f"sample with {'PLMS' if name == 'plms' else 'DPM-Solver++'} instead of DDIM"
            samplers.add_argument(f"--{name}", dest="sampler", action="store_const", const=name, help=text)
        parser.set_defaults(sampler="ddim")
        self.class_option(parser, "all, evenly; sample i is of the class i modulo their number")
        add("--scale", type=finite_float, default=1.0, help="guidance, of classes; 1 is none (default: %(default)s)")
        add("--seed", type=seed, metavar="N", help="sample i is drawn from the seed N + i (default: drawn anew)")
        add("--batch_size", type=positive_int, default=10, metavar="N", help="samples at once (default: %(default)s)")

    def choose_model(self, args: argparse.Namespace) -> ModelFiles:
        """What `-r`, or the options of the other commands, name."""
        if args.resume is None:
            files = find_model(args.model, args.config, args.ckpt)
            if files is None:
                known = ", ".join(available_models()) or "none"
                raise UserError(f"there is no model to draw with; name its folder with -r (in models/ldm: {known})")
            return files
        if args.model or args.ckpt:
            raise UserError("-r names the model; leave out --model and --ckpt")
        if locate(args.resume).is_file():
            return find_model(None, args.config, args.resume)
        files = find_model(args.resume)
        return files if args.config is None else find_model(None, args.config, str(files.checkpoint))

    def model_config(self, args: argparse.Namespace, files: ModelFiles) -> dict[str, Any]:
        """The model's configuration with the values that were given."""
        return read_config(files.config, args.overrides)

    def settings(self, args: argparse.Namespace, files: ModelFiles, config: Mapping[str, Any]) -> Settings:
        """Sampler and size."""
        classes = Classes.of(files.name, config)
        if classes is not None:
            classes.check_scale(args.scale)
        elif args.classes or args.scale != 1:
            option = "--classes" if args.classes else "--scale"
            raise UserError(f'the model "{files.name}" draws from nothing; leave out {option}')
        return {**self._sampler(args, config), "scale": args.scale, **self.size(config)}

    def _sampler(self, args: argparse.Namespace, config: Mapping[str, Any]) -> Settings:
        if args.vanilla_sample:
            steps = config["params"].get("timesteps", 1000)
            check_steps(config, 1)
            return {"sampler": "ddpm", "steps": steps, "eta": 1.0}
        check_steps(config, args.custom_steps)
        if args.sampler != "ddim" and args.eta:
            raise UserError(f"--{args.sampler} is deterministic; leave out --eta {args.eta:g}, or --{args.sampler}")
        eta = args.eta if args.eta is not None else float(args.sampler == "ddim")
        return {"sampler": args.sampler, "steps": args.custom_steps, "eta": eta}

    def inputs(self, args: argparse.Namespace, files: ModelFiles) -> list[Inputs]:
        """The classes in turn, so that more samples go on as fewer began."""
        classes = Classes.of(files.name, self.model_config(args, files))
        if classes is None:
            return [{}] * args.n_samples
        chosen = classes.parse(args.classes) if args.classes else range(classes.count)
        each = [classes.inputs(label) for label in chosen]
        return [each[i % len(each)] for i in range(args.n_samples)]

    def default_batch(self, args: argparse.Namespace) -> int:
        """As asked."""
        return args.batch_size

    def base(self, args: argparse.Namespace, files: ModelFiles) -> Path:
        """The folder of all the model's samples: in its own, or in one of its name in `--logdir`."""
        if args.logdir != OWN_FOLDER:
            return Path(args.logdir) / files.name / "samples"
        folder = files.checkpoint.parent
        return (folder.parent if folder.name == "checkpoints" else folder) / "samples"
