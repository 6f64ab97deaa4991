"""Compute every recorded output of the published implementation anew, and report how far each is from its record.

python scripts/check_parity.py --filter 'ddim*'

Exit status 1 when one is further away than it may be. On another machine or with another version of torch, this is
the quickest way to know whether the same seed still gives the same picture.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a bare clone too

from ldm.cli.command import Parser, command
from ldm.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from parity_replay import Result

TESTS = Path(__file__).resolve().parents[1] / "tests"


def make_parser() -> Parser:
    """The options."""
    parser = Parser(
        description="Compute every recorded output of the published implementation anew, and report the differences.",
        epilog="The cases and their tolerances are those of the tests; they run on the CPU in float32.",
    )
    parser.add_argument(
        "--filter", nargs="+", metavar="PATTERN", help='cases to run: names, parts of names, or patterns as in "ddim*"'
    )
    parser.add_argument("--json", metavar="FILE", help="write all results here too")
    return parser


def chosen(names: Sequence[str], patterns: Sequence[str] | None) -> list[str]:
    """The cases that the patterns mean; a whole name means that case alone.

    Raises:
        UserError: one of them means none.
    """
    found: set[str] = set(names) if patterns is None else set()
    for pattern in patterns or ():
        meant = {name for name in names if pattern in name or fnmatch(name, pattern)}
        if not meant:
            raise UserError(f'--filter "{pattern}" means none of the {len(names)} cases{did_you_mean(pattern, names)}')
        found |= {pattern} if pattern in names else meant
    return [name for name in names if name in found]


def run(name: str) -> tuple[list[Result], str]:
    """The results of a case, and what went wrong where it could not be replayed."""
    from parity_replay import Result, compare, load_case, replay

    case = load_case(name)
    try:
        return list(compare(case, replay(case))), ""
    except Exception as error:  # a case that fails must not hide the others
        broken = f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]
        return [Result(name, output, float("inf"), 0.0) for output in case.outputs], broken


def line(results: Sequence[Result], broken: str) -> str:
    """What to say about one case: its worst output, or those that failed."""
    failed = [result for result in results if not result.passed]
    if broken:
        return f"FAILED {broken}"
    if failed:
        return "FAILED " + ", ".join(f"{r.output} {r.error:.1e} (allowed {r.tolerance:.0e})" for r in failed)
    worst = max(results, key=lambda r: r.error / r.tolerance if r.tolerance else 0.0)
    return f"passed {worst.error:.1e} (allowed {worst.tolerance:.0e}), largest of {len(results)}: {worst.output}"


def write_json(path: str, results: Iterable[Result], seconds: float) -> None:
    """All results, and what they were computed with."""
    import torch

    from ldm.io.files import atomic_path

    rows: list[dict[str, Any]] = [
        {**asdict(r), "error": r.error if r.error < float("inf") else None, "passed": r.passed} for r in results
    ]
    content = {"torch": torch.__version__, "threads": torch.get_num_threads(), "seconds": round(seconds, 1)}
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps({**content, "results": rows}, indent=2) + "\n")


@command
def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    args = make_parser().parse_args(argv)
    if not (TESTS / "parity" / "cases" / "cases.json").is_file():
        raise UserError(f'there is no recorded data in "{TESTS}"; run this from a clone of the repository')
    if str(TESTS) not in sys.path:
        sys.path.insert(1, str(TESTS))

    from parity_replay import names

    results: list[Result] = []
    failed: list[str] = []
    cases, started = chosen(names(), args.filter), time.monotonic()
    width = max(map(len, cases))
    for number, name in enumerate(cases, 1):
        print(f"{number:3}/{len(cases)}  {name:{width}}  ", end="", flush=True)
        found, broken = run(name)
        print(line(found, broken), flush=True)
        results += found
        failed += [name] if broken or not all(result.passed for result in found) else []
    seconds = time.monotonic() - started
    if args.json:
        write_json(args.json, results, seconds)
    outcome = f"{len(failed)} failed: {', '.join(failed)}" if failed else "all as recorded"
    print(f"{len(cases)} cases, {len(results)} outputs in {seconds:.0f} s: {outcome}")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(main())
