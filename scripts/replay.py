"""Draw pictures again from the settings inside them, and say whether they are identical.

python scripts/replay.py outputs/txt2img-samples/samples/0000.png
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a bare clone too

from ldm.cli.command import Parser, command, say
from ldm.cli.options import model_options
from ldm.errors import UserError
from ldm.io.files import check_writable
from ldm.tasks.metadata import Origin, Record
from ldm.tasks.replay import model_of, replay

logger = logging.getLogger("ldm")


def make_parser() -> Parser:
    """The options."""
    parser = Parser(
        description="Draw pictures again from the settings inside them, and say whether they are identical. "
        "The exit status is 1 when one is not.",
        epilog="example: python scripts/replay.py outputs/txt2img-samples/samples/0000.png",
        parents=[model_options()],
    )
    parser.add_argument("pictures", nargs="+", metavar="PNG", help="a picture that a command here wrote")
    parser.add_argument("--outdir", metavar="DIR", help="keep what is drawn again there (default: only compare)")
    parser.set_defaults(precision=None)
    return parser


def told(error: UserError, paths: Sequence[Path]) -> UserError:
    """`error`, said at once where there are other pictures to go on with.

    Raises:
        UserError: there are none.
    """
    if len(paths) == 1:
        raise error
    logger.error("%s", error)
    return error


@command
def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    args = make_parser().parse_args(argv)
    paths = [Path(path) for path in args.pictures]
    records: dict[Path, Record] = {}
    failures: list[UserError] = []
    for path in paths:
        try:
            records[path] = Record.read(path)
        except UserError as error:
            failures.append(told(error, paths))
    if not records:
        raise UserError("none of them can be drawn again; see above")
    if args.outdir:
        check_writable(Path(args.outdir), "--outdir")

    from ldm.io.images import save_png
    from ldm.modules.precision import choose_precision
    from ldm.pipelines.loading import choose_device, load_model

    device = choose_device(args.device)

    @lru_cache(maxsize=1)
    def loaded(config: Path, checkpoint: Path, precision: str) -> Any:
        return load_model(config, checkpoint, device, choose_precision(precision, device))

    def load(origin: Origin) -> Any:
        files = model_of(origin, args.model, args.config, args.ckpt)
        return loaded(files.config, files.checkpoint, args.precision or origin.precision)

    identical = True
    for path, record in records.items():
        try:
            comparison = replay(record, path, load)
        except UserError as error:
            failures.append(told(error, paths))
            continue
        say(str(comparison))
        identical &= comparison.identical
        if args.outdir:
            text = record.origin.text(record.inputs, record.seed, record.place)
            save_png(comparison.again, Path(args.outdir) / path.name, text)
    if failures:
        raise UserError(f"{len(failures)} of {len(paths)} could not be drawn again; see above")
    return 0 if identical else 1


if __name__ == "__main__":
    sys.exit(main())
