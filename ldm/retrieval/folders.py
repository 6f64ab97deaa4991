"""Names and folders of databases and of their indices. Needs no numpy."""

from __future__ import annotations

from pathlib import Path

from ldm.config.assets import locate
from ldm.errors import UserError, did_you_mean
from ldm.io.folders import visible
from ldm.io.published_weights import ARTBENCH

DATABASES = Path("data/rdm/retrieval_databases")
SEARCHERS = Path("data/rdm/searchers")
DATABASE_NAMES = ("openimages", *ARTBENCH)
# File that every ScaNN index contains.
INDEX_MARK = "scann_config.pb"


def find_database(name: str) -> Path:
    """Return the folder of the database `name`, or the folder `name` itself.

    Raises:
        UserError: there is no such database; the message explains how to download a published one.
    """
    for folder in (locate(DATABASES / name), locate(name)) if name else ():
        if folder.is_dir():
            return folder
    if Path(name).name in DATABASE_NAMES:
        download = "openimages-database" if Path(name).name == "openimages" else "artbench-databases"
        raise UserError(f'the database "{name}" is missing; run ldm download_weights {download}')
    local = {folder.name for folder in visible(locate(DATABASES).glob("*")) if folder.is_dir()}
    known = [*DATABASE_NAMES, *sorted(local - {*DATABASE_NAMES})]
    raise UserError(
        f'there is no database "{name}"{did_you_mean(name, known)}; give a folder of NPZ files or one of '
        + ", ".join(known)
    )


def index_folder(database: Path) -> Path:
    """Return the folder for the index of the database in a folder."""
    return SEARCHERS / database.resolve().name


def find_index(database: Path) -> Path | None:
    """Return the folder of the index of the database in a folder, or None without a trained index."""
    folder = locate(index_folder(database))
    return folder if (folder / INDEX_MARK).is_file() else None
