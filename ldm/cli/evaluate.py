"""The command `evaluate`: the figures of samples, reconstructions and restorations, and their comparison."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

from ldm.cli.command import Parser, command, example, say
from ldm.cli.options import (
    add_count,
    add_sampler,
    image_side,
    model_options,
    positive_int,
    seed,
    target_options,
)
from ldm.errors import UserError, did_you_mean

METRICS = ("fid", "kid", "is", "prc")
SAMPLES = "outputs/evaluation/samples"
Run = Callable[[argparse.Namespace], int | None]
Tasks: TypeAlias = "argparse._SubParsersAction[Parser]"


class EvaluateParser(Parser):
    """Parser whose help also shows the options of the sub-commands."""

    tasks: tuple[argparse.ArgumentParser, ...] = ()

    def format_help(self) -> str:
        """Return the help, and below it the usage of each sub-command."""
        return "\n".join([super().format_help(), *(task.format_usage() for task in self.tasks)])


def make_parser() -> Parser:
    """Return the parser with its sub-commands."""
    parser = EvaluateParser(
        description="Measure samples, reconstructions and restorations. Each result is a table and a JSON file with "
        "its protocol, by which compare refuses figures that were made in another way.",
        epilog=example("evaluate", "samples outputs/samples --reference photos"),
    )
    tasks = parser.add_subparsers(dest="task", metavar="TASK", required=True, parser_class=Parser)
    parser.tasks = tuple(
        add(tasks) for add in (_samples, _reconstructions, _restorations, _likelihood, _compare, _table, _recipe)
    )
    return parser


# -- options -----------------------------------------------------------------------------------------------------


def _add(tasks: Tasks, name: str, what: str, parents: list[argparse.ArgumentParser], run: Run) -> Parser:
    text = f"{what[0].upper()}{what[1:]}."
    parser = tasks.add_parser(name, help=what, description=text, parents=parents)  # type: ignore[arg-type]
    parser.set_defaults(run=run)
    return parser


def _samples(tasks: Tasks) -> Parser:
    from_model = "sampled from --model"
    parser = _add(tasks, "samples", "FID, KID, IS, precision and recall of samples", [model_options()], run_samples)
    add = parser.add_argument
    add(
        "samples",
        nargs="?",
        metavar="SAMPLES",
        help=f"folder of images, NPZ file, or shards such as {{000..123}}.tar (default: {from_model})",
    )
    _add_reference(parser)
    add("--metrics", type=_metrics, default=METRICS, metavar="LIST", help="some of fid,kid,is,prc (default: all)")
    add("--n", type=positive_int, metavar="N", help="first samples that count (default: all), or number to sample")
    _add_size(parser)
    add_sampler(parser, 200, scale=1.0)
    add("--classes", nargs="+", metavar="CLASS", help="classes to sample, evenly (default: all)")
    add("--seed", type=seed, default=0, metavar="N", help="sample i has the seed N + i (default: %(default)s)")
    add("--outdir", metavar="DIR", default=SAMPLES, help="folder of sampled images (default: %(default)s)")
    _add_features(parser)
    _add_kid_and_is(parser)
    _add_output(parser)
    return parser


def _reconstructions(tasks: Tasks) -> Parser:
    what = "figures of a first stage: rFID, PSNR, SSIM, LPIPS, use of the codebook, scale of the latents"
    places = "models/first_stage_models or models/ldm"
    parser = _add(tasks, "reconstructions", what, [model_options(places)], run_reconstructions)
    add = parser.add_argument
    add("images", nargs="?", metavar="IMAGES", help="folder of images, NPZ file, or shards")
    add("--data", metavar="YAML", help="use the images of this training configuration instead")
    add("--split", choices=("train", "validation", "test"), default="validation", help="its set (default: %(default)s)")
    add("--n", type=positive_int, metavar="N", help="first images that count (default: all)")
    _add_size(parser)
    _add_features(parser)
    _add_lpips(parser)
    add("--no-fid", action="store_true", help="leave out rFID, which needs the feature network")
    _add_output(parser)
    return parser


def _restorations(tasks: Tasks) -> Parser:
    what = "figures of in-painted or enlarged images beside simple methods"
    parser = _add(tasks, "restorations", what, [target_options()], run_restorations)
    add = parser.add_argument
    add("results", metavar="RESULTS", help="folder of restored images")
    add("originals", metavar="ORIGINALS", help="folder of originals of the same names")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--masks", metavar="DIR", help="masks of the same names: in-painting, beside Telea's method")
    kind.add_argument("--small", metavar="DIR", help="small images of the same names: super-resolution, beside bicubic")
    add("--no-fid", action="store_true", help="leave out FID and IS, which need the feature network")
    add("--device", help="cpu, cuda, cuda:1, mps, … (default: cuda or mps if available, else cpu)")
    _add_features(parser)
    add("--is-splits", type=positive_int, default=10, metavar="N", help="parts of the images for IS (default: 10)")
    _add_lpips(parser)
    _add_output(parser)
    return parser


def _likelihood(tasks: Tasks) -> Parser:
    what = "variational bound of a diffusion model in bits per dimension of its latents, by timestep"
    parser = _add(tasks, "likelihood", what, [model_options()], run_likelihood)
    add = parser.add_argument
    add("--data", required=True, metavar="YAML", help="use the items of this training configuration")
    add("--split", choices=("train", "validation", "test"), default="validation", help="its set (default: %(default)s)")
    add("--n", type=positive_int, metavar="N", help="first items that count (default: all)")
    add_count(parser, "--every", 1, "evaluate one of N consecutive timesteps, at random")
    add_count(parser, "--batch_size", 50, "latents at once")
    add("--seed", type=seed, default=0, metavar="N", help="item i has the seed N + i (default: %(default)s)")
    _add_output(parser)
    return parser


def _compare(tasks: Tasks) -> Parser:
    parser = _add(tasks, "compare", "two results side by side, with bootstrap intervals", [], run_compare)
    parser.add_argument("results", nargs=2, metavar="JSON", help="results of ldm evaluate")
    parser.add_argument("--force", action="store_true", help="print them also if their protocols differ")
    add_count(parser, "--resamples", 1000, "bootstrap samples of means over images")
    add_count(parser, "--fid-resamples", 20, "bootstrap samples of FID, which take seconds each")
    return parser


def _table(tasks: Tasks) -> Parser:
    parser = _add(tasks, "table", "Markdown table of results beside the published figures", [], run_table)
    parser.add_argument("results", nargs="+", metavar="JSON", help="results of ldm evaluate")
    parser.add_argument("--dataset", metavar="NAME", help='only published figures on this data set, e.g. "FFHQ 256"')
    parser.add_argument("--no-published", action="store_true", help="leave out the published figures")
    parser.add_argument("--output", metavar="FILE", help="write the table here too")
    return parser


def _recipe(tasks: Tasks) -> Parser:
    parser = _add(
        tasks, "recipe", "evaluations whose options a file contains, such as the rows of a table", [], run_recipe
    )
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="only this run; repeatable")
    parser.add_argument("recipe", metavar="YAML", help="the recipe, such as configs/evaluation/table1.yaml")
    parser.add_argument(
        "options",
        nargs=argparse.REMAINDER,
        metavar="OPTIONS",
        help="options of the task that replace those of the recipe",
    )
    return parser


def _metrics(text: str) -> tuple[str, ...]:
    """Parse a list such as fid,is."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names or ("",):
        if name not in METRICS:
            raise argparse.ArgumentTypeError(f'there is no metric "{name}"{did_you_mean(name, METRICS)}')
    return names


def _add_reference(parser: Parser) -> None:
    group = parser.add_argument_group("reference")
    group.add_argument(
        "--reference",
        metavar="PATH",
        help="folder of images, shards, or NPZ file with images or statistics mu and sigma",
    )
    group.add_argument("--reference-config", metavar="YAML", help="use the images of this training configuration")
    group.add_argument(
        "--split", choices=("train", "validation", "test"), default="train", help="its set (default: %(default)s)"
    )
    group.add_argument("--reference-n", type=positive_int, metavar="N", help="first images that count (default: all)")
    group.add_argument("--cache", metavar="DIR", help="folder of cached references (default: .cache/evaluation)")
    group.add_argument("--no-cache", action="store_true", help="neither read nor write cached references")


def _add_size(parser: Parser) -> None:
    parser.add_argument(
        "--size", type=image_side, metavar="PIXELS", help="use the centred square of images in folders, resized"
    )


def _add_features(parser: Parser) -> None:
    group = parser.add_argument_group("features")
    group.add_argument(
        "--features",
        metavar="FILE",
        help="weights of torch-fidelity's Inception-v3, or a TorchScript module (default: those of torch-fidelity, "
        "downloaded on first use)",
    )
    group.add_argument("--allow-few", action="store_true", help="compute FID also of fewer images than features")
    group.add_argument("--keep-features", action="store_true", help="write the features, for intervals of FID")
    add_count(parser, "--most-features", 50_000, "most images of a set whose features are kept")
    add_count(parser, "--batch_size", 50, "images at once")


def _add_kid_and_is(parser: Parser) -> None:
    group = parser.add_argument_group("KID and IS")
    group.add_argument("--kid-subsets", type=positive_int, default=100, metavar="N", help="default: %(default)s")
    group.add_argument("--kid-subset-size", type=positive_int, default=1000, metavar="N", help="default: %(default)s")
    group.add_argument("--is-splits", type=positive_int, default=10, metavar="N", help="default: %(default)s")


def _add_lpips(parser: Parser) -> None:
    group = parser.add_argument_group("LPIPS")
    group.add_argument(
        "--lpips-weights",
        metavar="FILE",
        help="weights of VGG16 or of LPIPS (default: those of torchvision, downloaded on first use)",
    )
    group.add_argument("--no-lpips", action="store_true", help="leave out LPIPS")


def _add_output(parser: Parser) -> None:
    parser.add_argument(
        "--json", metavar="FILE", help="the result (default: a new file in outputs/evaluation, never replaced)"
    )


# -- sub-commands ------------------------------------------------------------------------------------------------


def run_samples(args: argparse.Namespace) -> int | None:
    """Measure samples."""
    from ldm.cli.evaluated_samples import evaluate_samples

    has_model = bool(args.model or args.ckpt)
    if has_model == bool(args.samples):
        raise UserError("give either SAMPLES, or a model with --model and the number of samples with --n")
    if has_model and args.n is None:
        raise UserError("--model needs --n, the number of samples")
    if args.reference and args.reference_config:
        raise UserError("give either --reference or --reference-config")
    if {*args.metrics} != {"is"} and not (args.reference or args.reference_config):
        raise UserError("FID, KID, precision and recall need --reference or --reference-config; or choose --metrics is")
    return evaluate_samples(args)


def run_reconstructions(args: argparse.Namespace) -> None:
    """Measure a first stage."""
    from ldm.cli.evaluated_pairs import evaluate_reconstructions

    if bool(args.images) == bool(args.data):
        raise UserError("give either IMAGES or --data")
    evaluate_reconstructions(args)


def run_restorations(args: argparse.Namespace) -> None:
    """Measure restorations."""
    from ldm.cli.evaluated_pairs import evaluate_restored

    evaluate_restored(args)


def run_likelihood(args: argparse.Namespace) -> None:
    """Measure the likelihood of a diffusion model."""
    from ldm.cli.evaluated_likelihood import evaluate_likelihood

    evaluate_likelihood(args)


def run_compare(args: argparse.Namespace) -> None:
    """Print two results side by side.

    Raises:
        UserError: They were made in different ways, and `--force` is not given.
    """
    from ldm.evaluation.comparison import check_comparable, comparison_table, differences
    from ldm.evaluation.results import Result

    first, second = (Result.read(path) for path in args.results)
    if args.force:
        for each in differences(first, second):
            say(f"different protocol: {each}")
    else:
        check_comparable(first, second, tuple(args.results))
    paths = Path(args.results[0]), Path(args.results[1])
    say(comparison_table(paths, (first, second), args.resamples, args.fid_resamples))


def run_table(args: argparse.Namespace) -> None:
    """Print results beside the published figures."""
    from ldm.evaluation.published import read_published, results_table
    from ldm.evaluation.results import Result
    from ldm.io.files import atomic_path

    published = [] if args.no_published else read_published()
    text = results_table([Result.read(path) for path in args.results], published, args.dataset)
    say(text)
    if args.output:
        with atomic_path(args.output) as temporary:
            temporary.write_text(f"{text}\n", encoding="utf-8")


def run_recipe(args: argparse.Namespace) -> int:
    """Run the evaluations of a recipe, one after the other; return the status of the first one that fails, or 0."""
    from ldm.evaluation.recipes import read_recipe

    for run in read_recipe(args.recipe, args.only):
        say(f"{run.name}: {run.row}")
        chosen = make_parser().parse_args([*run.words, *args.options])
        status = chosen.run(chosen)
        if status:
            return status
    return 0


@command
def main(argv: Sequence[str] | None = None) -> int | None:
    """Run the command."""
    args = make_parser().parse_args(argv)
    return args.run(args)
