"""Compute the recorded outputs of the published implementation again, and report their errors.

python scripts/check_parity.py --filter 'ddim*'

The exit status is 1 if an error exceeds its tolerance. On another machine, or with another version of torch, this is a
quick check that equal seeds still give equal images.
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

import _checkout  # noqa: F401 (imports the code beside this script)

from ldm.cli.command import Parser, command, example
from ldm.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from parity_replay import Result

TESTS = Path(__file__).resolve().parents[1] / "tests"


def make_parser() -> Parser:
    """Return the parser."""
    parser = Parser(
        description="Compute the recorded outputs of the published implementation again, and report their errors. "
        "The cases and tolerances are those of the tests; they run on the CPU in float32.",
        epilog=example("check_parity", "--filter 'ddim*'"),
    )
    parser.add_argument(
        "--filter",
        nargs="+",
        metavar="PATTERN",
        help='cases to run: names, parts of names, or patterns like "ddim*"',
    )
    parser.add_argument("--json", metavar="FILE", help="write all results to this file too")
    return parser


def chosen(names: Sequence[str], patterns: Sequence[str] | None) -> list[str]:
    """Return the cases that match the patterns; the whole name of a case matches that case alone.

    Raises:
        UserError: A pattern matches no case.
    """
    found: set[str] = set(names) if patterns is None else set()
    for pattern in patterns or ():
        matches = {name for name in names if pattern in name or fnmatch(name, pattern)}
        if not matches:
            raise UserError(
                f'--filter "{pattern}" matches none of the {len(names)} cases{did_you_mean(pattern, names)}'
            )
        found |= {pattern} if pattern in names else matches
    return [name for name in names if name in found]


def run(name: str) -> tuple[list[Result], str]:
    """Return the results of a case, and the error that stopped it, or an empty text."""
    from parity_replay import Result, compare, load_case, replay

    case = load_case(name)
    try:
        return list(compare(case, replay(case))), ""
    except Exception as error:  # one error must not hide the other cases
        failure = f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]
        return [Result(name, output, float("inf"), 0.0) for output in case.outputs], failure


def describe(results: Sequence[Result], failure: str) -> str:
    """Return one line about a case: its output with the largest error, or its failed outputs."""
    failed = [result for result in results if not result.passed]
    if failure:
        return f"FAILED {failure}"
    if failed:
        return "FAILED " + ", ".join(f"{r.output} {r.error:.1e} (allowed {r.tolerance:.0e})" for r in failed)
    worst = max(results, key=lambda r: r.error / r.tolerance if r.tolerance else 0.0)
    return f"passed {worst.error:.1e} (allowed {worst.tolerance:.0e}), largest of {len(results)}: {worst.output}"


def write_json(path: str, results: Iterable[Result], seconds: float) -> None:
    """Write all results, and the software that computed them, as JSON."""
    import torch

    from ldm.io.files import atomic_path

    rows: list[dict[str, Any]] = [
        {**asdict(r), "error": r.error if r.error < float("inf") else None, "passed": r.passed} for r in results
    ]
    content = {"torch": torch.__version__, "threads": torch.get_num_threads(), "seconds": round(seconds, 1)}
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps({**content, "results": rows}, indent=2) + "\n")


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status is 1 if a case failed."""
    args = make_parser().parse_args(argv)
    if not (TESTS / "parity" / "cases" / "cases.json").is_file():
        raise UserError(f'there are no recorded outputs in "{TESTS}"; run this in a clone of the repository')
    sys.path.append(str(TESTS))

    from parity_cases import names

    results: list[Result] = []
    failed: list[str] = []
    cases, started = chosen(names(), args.filter), time.monotonic()
    width = max(map(len, cases))
    for number, name in enumerate(cases, 1):
        print(f"{number:3}/{len(cases)}  {name:{width}}  ", end="", flush=True)
        found, failure = run(name)
        print(describe(found, failure), flush=True)
        results += found
        failed += [name] if failure or not all(result.passed for result in found) else []
    seconds = time.monotonic() - started
    if args.json:
        write_json(args.json, results, seconds)
    outcome = f"{len(failed)} failed: {', '.join(failed)}" if failed else "all as recorded"
    print(f"{len(cases)} cases, {len(results)} outputs in {seconds:.0f} s: {outcome}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
