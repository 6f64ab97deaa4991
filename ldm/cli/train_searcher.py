"""The command `train_searcher`: train a search index of a retrieval database."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli.command import Parser, command, example, say
from ldm.cli.options import positive_int
from ldm.retrieval import MAX_NEIGHBOURS
from ldm.retrieval.folders import DATABASES, SEARCHERS, find_database, index_folder

if TYPE_CHECKING:
    import numpy as np

    from ldm.retrieval.database import Database

logger = logging.getLogger(__name__)


def make_parser() -> Parser:
    """Return the parser."""
    parser = Parser(
        description="Train an index of a retrieval database, which makes the search for neighbours fast.",
        epilog=example("train_searcher", "--database artbench-surrealism"),
    )
    parser.add_argument(
        "-d",
        "--database",
        default=str(DATABASES / "openimages"),
        help="a folder of NPZ files, or the name of a published database (default: %(default)s)",
    )
    parser.add_argument(
        "-t",
        "--target_path",
        metavar="DIR",
        help=f"folder of the index, which replaces an existing one (default: {SEARCHERS}/<name of the database>)",
    )
    parser.add_argument(
        "-k",
        "--knn",
        type=positive_int,
        default=MAX_NEIGHBOURS,
        metavar="K",
        help="number of neighbours that the index is built for (default: %(default)s)",
    )
    return parser


def unit_vectors(database: Database) -> np.ndarray:
    """Return the embeddings of a database, normalised to length 1, (N, D) float32."""
    import numpy as np
    from tqdm import tqdm

    from ldm.retrieval.database import chunks, normalise, report_out_of_memory

    shape = database.embeddings.shape
    with (
        report_out_of_memory(database.folder, 4 * shape[0] * shape[1]),
        tqdm(total=shape[0], desc="normalising", unit="vectors", delay=1.0, leave=False) as bar,
    ):
        vectors = np.empty(shape, np.float32)
        for first, rows in chunks(database.embeddings):
            vectors[first : first + len(rows)] = normalise(rows, first=first).numpy()
            bar.update(len(rows))
    return vectors


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = make_parser().parse_args(argv)
    folder = find_database(args.database)
    target = Path(args.target_path) if args.target_path else index_folder(folder)

    from ldm.retrieval.database import read_database
    from ldm.retrieval.scann_index import ScannIndex, check_replaceable, import_scann, search_method

    import_scann()  # an error before the minutes of reading
    check_replaceable(target)
    vectors = unit_vectors(read_database(folder))  # the database is freed before the training, which needs its memory
    logger.info("training: %s of %d vectors; ScaNN logs its stages", search_method(len(vectors)), len(vectors))
    start = time.monotonic()
    index = ScannIndex.train(vectors, args.knn)
    logger.info("training took %.0f s; writing the index", time.monotonic() - start)
    index.save(target)
    size = sum(file.stat().st_size for file in target.iterdir()) / 1e6
    say(f"{target}: {search_method(len(vectors))} over {len(vectors)} vectors, {size:.1f} MB")
