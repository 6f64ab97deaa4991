"""The command `download_weights`: download published weights to the folders in which other commands find them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ldm.cli.command import Parser, command, example, say
from ldm.io.download import check_link
from ldm.io.published_weights import CATALOGUE, GROUPS, HOME, Download, TargetFolders, fetch_all, select


def make_parser() -> Parser:
    """Return the parser."""
    groups = "; ".join(f"{name}: {what}" for name, what in GROUPS.items())
    parser = Parser(
        description="Download published weights to the folders in which the other commands find them. Existing files "
        "stay. The same command resumes an interrupted download.",
        epilog=f"{example('download_weights', 'text2img-large')}. Groups are {groups}. The exit status is 1 if a "
        "download failed.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="groups or single downloads, as --list shows them")
    parser.add_argument(
        "--list", action="store_true", help="list the downloads with their folders and states, and exit"
    )
    parser.add_argument("--models-dir", metavar="DIR", help="folder of models (default: models in the repository)")
    parser.add_argument("--data-dir", metavar="DIR", help="folder of retrieval data (default: data in the repository)")
    parser.add_argument("--base-url", metavar="URL", help=f"download from this mirror of {HOME} with the same paths")
    return parser


def listing(downloads: Sequence[Download], folders: TargetFolders, base_url: str | None) -> str:
    """Return a table of `downloads`: name, group, size, state, target and address."""
    rows = [("name", "group", "size", "state", "goes to", "from")]
    for download in downloads:
        size = f"{download.gigabytes:g} GB" if download.gigabytes else "?"
        part = folders.received_bytes(download)
        state = "there" if folders.is_present(download) else f"{part / 1e6:.0f} MB" if part else "-"
        target = folders.folder(download) / download.file
        rows.append((download.name, download.group, size, state, str(target), download.url(base_url)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status is 1 if a download failed."""
    parser = make_parser()
    args = parser.parse_args(argv)
    default = TargetFolders()
    folders = TargetFolders(Path(args.models_dir or default.models), Path(args.data_dir or default.data))
    if args.base_url:
        check_link(args.base_url)
    downloads = select(args.names) if args.names else list(CATALOGUE)
    if args.list:
        say(listing(downloads, folders, args.base_url))
        return 0
    if not args.names:
        parser.error(f"name at least one download: {', '.join(GROUPS)}, or a name that --list shows")
    failures = fetch_all(downloads, folders, args.base_url)
    if failures:
        say(f"{len(failures)} of {len(downloads)} downloads failed:")
        for name, reason in failures.items():
            say(f"  {name}: {reason}")
    return 1 if failures else 0
