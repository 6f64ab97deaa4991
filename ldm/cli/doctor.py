"""The command `doctor`: diagnose a trained model, and name what is wrong with its remedy."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from ldm.cli.command import Parser, command, example, say
from ldm.cli.options import non_negative_int, positive_int, seed, target_options


def make_parser() -> Parser:
    """Return the parser."""
    parser = Parser(
        description="Diagnose a trained model: reconstruct and sample images, measure the latents, overfit one batch, "
        "and name what is wrong. The exit status is 0 without findings, 1 with findings, 2 for an invalid input.",
        epilog=example("doctor", "logs/2026-01-01T00-00-00_mine"),
        parents=[target_options()],
    )
    add = parser.add_argument
    add("path", metavar="RUN_OR_CHECKPOINT", help="log folder of a run, model folder or its name, or checkpoint")
    add("--base", nargs="+", default=[], metavar="YAML", help="configurations (default: those of the run)")
    add("--data", metavar="YAML_OR_FOLDER", help="configuration with data, or folder of images (default: the run's)")
    add("-n", "--n", type=positive_int, default=8, metavar="N", help="items of a batch (default: %(default)s)")
    add("--batches", type=positive_int, default=4, metavar="N", help="number of batches (default: %(default)s)")
    add("--steps", type=non_negative_int, default=30, metavar="N", help="steps on one batch (default: %(default)s)")
    add("--ddim_steps", type=positive_int, default=20, metavar="N", help="steps of sampling (default: %(default)s)")
    add("--device", metavar="NAME", help="device such as cpu or cuda (default: a GPU if there is one)")
    add("-s", "--seed", type=seed, default=0, help="seed of all random numbers (default: %(default)s)")
    add("-o", "--out", metavar="PNG", help="file of the sheet (default: doctor.png in the current folder)")
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Diagnose a model; return 1 if there are findings.

    Raises:
        UserError: the model or its data cannot be loaded, or the sheet cannot be written.
    """
    args = make_parser().parse_args(argv)
    out = Path(args.out or "doctor.png")
    from ldm.io.files import check_writable

    check_writable(out.parent, "--out")
    from ldm.diagnosis.examination import examine
    from ldm.diagnosis.subject import find_files, load_subject
    from ldm.io.images import save_png
    from ldm.pipelines.loading import choose_device

    files = find_files(args.path, args.base, args.data)
    subject = load_subject(files, args.n, args.batches, choose_device(args.device))
    diagnosis = examine(subject, args.steps, args.ddim_steps, args.seed)
    save_png(diagnosis.sheet, out)
    say(f"{files.name}: {type(subject.model).__name__}, step {subject.step:,}")
    for name, value in diagnosis.values.items():
        say(f"  {name:16}{value}")
    say(f"  {'file':16}{out}")
    for finding in diagnosis.findings:
        say(f"finding: {finding}")
    if not diagnosis.findings:
        say("no findings")
    return 1 if diagnosis.findings else 0


if __name__ == "__main__":
    sys.exit(main())
