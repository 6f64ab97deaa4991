"""Where databases and their indices lie on disk, and what they are called. Needs no numpy."""

from __future__ import annotations

from pathlib import Path

from ldm.config.assets import locate
from ldm.errors import UserError, did_you_mean

DATABASES = Path("data/rdm/retrieval_databases")
SEARCHERS = Path("data/rdm/searchers")
ARTBENCH_STYLES = (
    "art_nouveau",
    "baroque",
    "expressionism",
    "impressionism",
    "post_impressionism",
    "realism",
    "romanticism",
    "renaissance",
    "surrealism",
    "ukiyo_e",
)
DATABASE_NAMES = ("openimages", *(f"artbench-{style}" for style in ARTBENCH_STYLES))
# The file that every index of ScaNN has.
INDEX_MARK = "scann_config.pb"


def find_database(name: str) -> Path:
    """The folder of the database that is called `name`, or the folder `name`.

    Raises:
        UserError: there is no such database; the message says where to get a published one.
    """
    for folder in (locate(DATABASES / name), locate(name)) if name else ():
        if folder.is_dir():
            return folder
    if Path(name).name in DATABASE_NAMES:
        download = "openimages-database" if Path(name).name == "openimages" else "artbench-databases"
        raise UserError(f'the database "{name}" is not there; run python scripts/download_weights.py {download}')
    there = {folder.name for folder in locate(DATABASES).glob("*") if folder.is_dir()}
    known = [*DATABASE_NAMES, *sorted(there - {*DATABASE_NAMES})]
    raise UserError(
        f'there is no database "{name}"{did_you_mean(name, known)}; give a folder of NPZ files or one of '
        + ", ".join(known)
    )


def index_folder(database: Path) -> Path:
    """Where the index of the database in a folder lies, or would lie."""
    return SEARCHERS / database.resolve().name


def find_index(database: Path) -> Path | None:
    """The folder with the index of the database in a folder; None where none has been trained."""
    folder = locate(index_folder(database))
    return folder if (folder / INDEX_MARK).is_file() else None
