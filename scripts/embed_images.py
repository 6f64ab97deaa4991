"""Compute the CLIP embeddings of a data set as a retrieval database.

python scripts/embed_images.py --config configs/recipes/retrieval_openimages.yaml --split train

The result is a folder with one NPZ file: a database of the images for knn2img, and the `embeddings` of the data set for
`ldm.data.neighbours.Neighbours`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import _checkout  # noqa: F401 (imports the code beside this script)

from ldm.cli.command import Parser, command, example, say
from ldm.cli.options import non_negative_int, positive_int, target_options
from ldm.config.assets import locate
from ldm.errors import UserError

if TYPE_CHECKING:
    import numpy as np

SPLITS = ("train", "validation", "test")
WRAPPER = "ldm.data.neighbours.Neighbours"
FILE = "embeddings.npz"


def make_parser() -> Parser:
    """Return the parser."""
    parser = Parser(
        description="Compute the CLIP embeddings of a data set as a retrieval database.",
        epilog=example("embed_images", "--config configs/recipes/retrieval_openimages.yaml --split train"),
        parents=[target_options()],
    )
    parser.add_argument("--config", required=True, metavar="YAML", help="configuration with the data set")
    parser.add_argument("--split", choices=SPLITS, default="train", help="data set of it (default: %(default)s)")
    parser.add_argument("--key", default="image", help="entry of an item with the image (default: %(default)s)")
    parser.add_argument(
        "--clip_type", default="ViT-L/14", metavar="NAME", help="the CLIP: a name, or a folder (default: %(default)s)"
    )
    parser.add_argument(
        "--outdir",
        metavar="DIR",
        help="folder of the result (default: that of the configuration)",
    )
    parser.add_argument("--batch_size", type=positive_int, default=64, help="images at once (default: %(default)s)")
    parser.add_argument("--num_workers", type=non_negative_int, default=0, help="processes that read images")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps, … (default: cuda or mps if available, else cpu)")
    return parser


def dataset_config(path: str, split: str) -> tuple[dict[str, Any], str | None]:
    """Return the configuration of a data set, without a wrapper that needs embeddings, and the wrapper's folder.

    Raises:
        UserError: the file is missing or has no such data set.
    """
    from omegaconf import OmegaConf

    from ldm.training.configuration import read_yaml

    content: Any = OmegaConf.to_container(read_yaml(locate(path)), resolve=False)
    node: Any = content
    for key in ("data", "params", split):
        node = node.get(key) if isinstance(node, dict) else None
    if not isinstance(node, dict) or "target" not in node:
        raise UserError(f'the configuration "{path}" has no data.params.{split}; choose another --split')
    params = node.get("params") or {}
    if node["target"] == WRAPPER and isinstance(params.get("dataset"), dict):
        return params["dataset"], params.get("embeddings")
    return node, None


def embeddings(dataset: Any, clip: Any, args: Any) -> Iterator[np.ndarray]:
    """Yield the embedding (D,) float32 of each item."""
    import torch
    from torch.utils.data import DataLoader
    from tqdm import tqdm

    from ldm.io.pixels import batch_images
    from ldm.training.collate import Collate

    collate = Collate(f"data.params.{args.split}")
    loader = DataLoader(dataset, batch_size=args.batch_size, num_workers=args.num_workers, collate_fn=collate)
    with torch.no_grad(), tqdm(total=len(dataset), desc="embedding", unit="image") as bar:
        for batch in loader:
            vectors = clip(batch_images(batch, args.key)).float().cpu().numpy()
            yield from vectors
            bar.update(len(vectors))


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = make_parser().parse_args(argv)
    config, folder = dataset_config(args.config, args.split)
    outdir = args.outdir or folder
    if outdir is None:
        raise UserError("name the folder of the result with --outdir")

    import numpy as np

    from ldm.config.instantiate import instantiate_from_config
    from ldm.io.files import check_writable
    from ldm.io.npz import Rows, write_npz
    from ldm.modules.encoders.modules import FrozenClipImageEmbedder
    from ldm.pipelines.loading import choose_device

    dataset: Any = instantiate_from_config(config)
    if not hasattr(dataset, "__len__"):
        raise UserError(f"data.params.{args.split} is a stream; embeddings need a data set with a length")
    clip = FrozenClipImageEmbedder(args.clip_type).to(choose_device(args.device)).eval()
    path = Path(outdir) / FILE
    check_writable(path.parent, "--outdir")
    shape = (len(dataset), int(clip.model.config.projection_dim))
    write_npz(path, {"embedding": Rows(shape, np.dtype(np.float32), embeddings(dataset, clip, args))})
    say(f"{path}: {shape[0]} embeddings of width {shape[1]}")


if __name__ == "__main__":
    sys.exit(main())
