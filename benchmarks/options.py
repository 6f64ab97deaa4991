"""What every benchmark can be told. Imports nothing heavy: help and mistakes come before torch and diffusers."""

from __future__ import annotations

from ldm.cli.command import Parser
from ldm.cli.options import positive_int

PRECISIONS = ("float32", "bfloat16")


def make_parser(description: str, rounds: int = 5) -> Parser:
    """The options that the benchmarks share."""
    parser = Parser(description=description)
    parser.add_argument(
        "--tiny", action="store_true", help="tiny sizes: shows that the benchmark runs, measures nothing"
    )
    parser.add_argument(
        "--rounds",
        type=positive_int,
        default=rounds,
        metavar="N",
        help="times that each is timed (default: %(default)s)",
    )
    parser.add_argument(
        "--threads", type=positive_int, metavar="N", help="threads of the CPU (default: torch's choice)"
    )
    parser.add_argument("--device", help="where to measure (default: cpu)", default="cpu")
    parser.add_argument(
        "--precision", nargs="+", choices=PRECISIONS, default=PRECISIONS, help="types of numbers (default: all)"
    )
    parser.add_argument("--json", metavar="FILE", help="write every time measured here, too")
    return parser
