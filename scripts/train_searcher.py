"""Train an index of a retrieval database, which makes the search for neighbours quick.

python scripts/train_searcher.py -d data/rdm/retrieval_databases/artbench-surrealism
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a bare clone too

from ldm.cli.command import Parser, command
from ldm.cli.options import positive_int
from ldm.retrieval import MAX_NEIGHBOURS
from ldm.retrieval.folders import DATABASES, SEARCHERS, find_database, index_folder

if TYPE_CHECKING:  # numpy takes a while to import; mistakes are told before
    import numpy as np

    from ldm.retrieval.database import Database

log = logging.getLogger("ldm.train_searcher")


def make_parser() -> Parser:
    """The options."""
    parser = Parser(
        description="Train an index of a retrieval database, which makes the search for neighbours quick.",
        epilog="example: python scripts/train_searcher.py --database artbench-surrealism",
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
        help=f"where the index goes, in place of one that is there (default: {SEARCHERS}/<name of the database>)",
    )
    parser.add_argument(
        "-k",
        "--knn",
        type=positive_int,
        default=MAX_NEIGHBOURS,
        metavar="K",
        help="neighbours to make the index for (default: %(default)s)",
    )
    return parser


def unit_vectors(database: Database) -> np.ndarray:
    """The database's embeddings, (N, D) float32 of length 1."""
    import numpy as np
    from tqdm import tqdm

    from ldm.retrieval.database import chunks, normalised, out_of_memory_told

    shape = database.embeddings.shape
    with (
        out_of_memory_told(database.folder, 4 * shape[0] * shape[1]),
        tqdm(total=shape[0], desc="normalising", unit="vectors", delay=1.0, leave=False) as bar,
    ):
        vectors = np.empty(shape, np.float32)
        for first, rows in chunks(database.embeddings):
            vectors[first : first + len(rows)] = normalised(rows, first=first).numpy()
            bar.update(len(rows))
    return vectors


@command
def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    args = make_parser().parse_args(argv)
    folder = find_database(args.database)
    target = Path(args.target_path) if args.target_path else index_folder(folder)

    from ldm.retrieval.database import read_database
    from ldm.retrieval.scann_index import ScannIndex, check_replaceable, import_scann, method

    import_scann()  # before minutes of reading
    check_replaceable(target)
    vectors = unit_vectors(read_database(folder))  # whose database goes before the training, which needs the memory
    log.info("training: %s of %d vectors; ScaNN tells its stages", method(len(vectors)), len(vectors))
    start = time.monotonic()
    index = ScannIndex.train(vectors, args.knn)
    log.info("trained in %.0f s; writing", time.monotonic() - start)
    index.save(target)
    size = sum(file.stat().st_size for file in target.iterdir()) / 1e6
    print(f"{target}: {method(len(vectors))} over {len(vectors)} vectors, {size:.1f} MB")


if __name__ == "__main__":
    sys.exit(main())
