"""Options that the benchmarks share. Nothing here imports torch or diffusers, so that help and errors are fast."""

from __future__ import annotations

from ldm.cli.command import Parser
from ldm.cli.options import positive_int

PRECISIONS = ("float32", "bfloat16")


def make_parser(name: str, description: str, rounds: int = 5) -> Parser:
    """Return the parser of the benchmark `name`, with the shared options."""
    parser = Parser(prog=f"python -m benchmarks.{name}", description=description)
    parser.add_argument(
        "--tiny", action="store_true", help="use tiny sizes, to check that the benchmark runs; the times mean nothing"
    )
    parser.add_argument(
        "--rounds",
        type=positive_int,
        default=rounds,
        metavar="N",
        help="how often each contestant is timed (default: %(default)s)",
    )
    parser.add_argument("--threads", type=positive_int, metavar="N", help="CPU threads (default: the choice of torch)")
    parser.add_argument("--device", help="device to measure (default: cpu)", default="cpu")
    parser.add_argument(
        "--precision", nargs="+", choices=PRECISIONS, default=PRECISIONS, help="precisions to measure (default: all)"
    )
    parser.add_argument("--json", metavar="FILE", help="write all measured times to this file too")
    return parser


def add_stable_diffusion(parser: Parser) -> None:
    """Add the choice of the networks of Stable Diffusion."""
    parser.add_argument(
        "--stable_diffusion",
        action="store_true",
        help="measure the networks of Stable Diffusion 1 at 512 × 512 pixels (default: those of the published "
        "text-to-image model of 1.45 billion parameters at 256 × 256)",
    )
