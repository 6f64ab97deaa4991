"""Fetch the published weights to where the other commands look for them; what is there stays.

python scripts/download_weights.py first-stages
python scripts/download_weights.py kl-f8 celeba256
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a bare clone too

from ldm.cli.command import Parser, command
from ldm.io.download import check_link
from ldm.io.published_weights import CATALOGUE, GROUPS, HOME, Destinations, Download, chosen, obtain_all


def make_parser() -> Parser:
    """The options."""
    groups = "; ".join(f"{name}: {what}" for name, what in GROUPS.items())
    parser = Parser(
        description="Fetch the published weights to where the other commands look for them. An interrupted run is "
        "gone on with by the same command.",
        epilog=f"example: python scripts/download_weights.py text2img-large. Groups are {groups}. The exit status is 1 "
        "when something could not be had.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="groups or single downloads, as --list shows them")
    parser.add_argument("--list", action="store_true", help="show what there is, where it goes and what is there; stop")
    parser.add_argument("--models-dir", metavar="DIR", help="put models here (default: the repository's models)")
    parser.add_argument("--data-dir", metavar="DIR", help="put retrieval data here (default: the repository's data)")
    parser.add_argument("--base-url", metavar="URL", help=f"fetch from this mirror of {HOME}, which has the same paths")
    return parser


def listing(downloads: Sequence[Download], places: Destinations, base_url: str | None) -> str:
    """A table of `downloads`: name, group, size, state, target and link."""
    rows = [("name", "group", "size", "state", "goes to", "from")]
    for download in downloads:
        size = f"{download.gigabytes:g} GB" if download.gigabytes else "?"
        part = places.bytes_there(download)
        state = "there" if places.is_there(download) else f"{part / 1e6:.0f} MB" if part else "-"
        target = places.folder(download) / download.file
        rows.append((download.name, download.group, size, state, str(target), download.url(base_url)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


@command
def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = make_parser()
    args = parser.parse_args(argv)
    usual = Destinations()
    places = Destinations(Path(args.models_dir or usual.models), Path(args.data_dir or usual.data))
    if args.base_url:
        check_link(args.base_url)
    downloads = chosen(args.names) if args.names else list(CATALOGUE)
    if args.list:
        print(listing(downloads, places, args.base_url))
        return
    if not args.names:
        parser.error(f"name what to fetch: {', '.join(GROUPS)}, or single downloads that --list shows")
    failures = obtain_all(downloads, places, args.base_url)
    if failures:
        print(f"{len(failures)} of {len(downloads)} could not be had:")
        for name, reason in failures.items():
            print(f"  {name}: {reason}")
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(main())
