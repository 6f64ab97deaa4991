"""Options, samples and tables that the evaluation scripts share."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.command import Parser
from ldm.cli.options import positive_int, seed
from ldm.config.model_files import ModelFiles, find_model, named_model
from ldm.config.model_info import ModelInfo
from ldm.errors import UserError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class EvaluatedModel:
    """Model to evaluate: its files and its configuration; `load` loads it."""

    files: ModelFiles
    info: ModelInfo

    @classmethod
    def chosen(cls, args: argparse.Namespace, default: str | None = None) -> EvaluatedModel:
        """Return the model that the options name, else the bundled model `default`.

        Raises:
            UserError: It is missing, its configuration is damaged, or the options name none and there is no default.
        """
        files = find_model(args.model, args.config, args.ckpt)
        if files is None and default is None:
            raise UserError("name the model with --model, or with --config and --ckpt")
        files = files or named_model(str(default))
        return cls(files, ModelInfo.read(files))

    def load(self, args: argparse.Namespace) -> tuple[Any, torch.dtype]:
        """Load the model on the device and in the precision of the options; return it and its precision."""
        from ldm.modules.precision import choose_precision
        from ldm.pipelines.loading import choose_device, load_files

        device = choose_device(args.device)
        precision = choose_precision(args.precision, device)
        return load_files(self.files, self.info.config, device, precision), precision


def add_options(parser: Parser, items: str, batch_size: int, grid: str) -> None:
    """Add the options of every evaluation.

    Args:
        parser: gets the options.
        items: help of `--n`.
        batch_size: default.
        grid: help of `--grid`.
    """
    parser.add_argument("--n", type=positive_int, default=200, help=f"{items} (default: %(default)s)")
    parser.add_argument("--steps", type=positive_int, default=50, help="DDIM steps (default: %(default)s)")
    parser.add_argument("--seed", type=seed, default=0, help="seed of the choice and of the noise (default: 0)")
    parser.add_argument(
        "--batch_size", type=positive_int, default=batch_size, help="images sampled at once (default: %(default)s)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the scores and the settings here too")
    parser.add_argument("--grid", metavar="PNG", help=grid)


def choose(count: int, args: argparse.Namespace) -> list[int]:
    """Return `args.n` of the indices below `count`, at random; `args.seed` determines them."""
    import numpy as np

    return [int(i) for i in np.random.RandomState(args.seed % 2**32).permutation(count)[: args.n]]


def validation_set(path: str) -> Any:
    """Return the validation set of a training configuration.

    Raises:
        UserError: The file is missing or has none, or its data are missing.
    """
    from omegaconf import OmegaConf

    from ldm.config.assets import locate
    from ldm.config.instantiate import instantiate_from_config
    from ldm.training.configuration import read_yaml

    node: Any = OmegaConf.to_container(read_yaml(locate(path)), resolve=True)
    for key in ("data", "params", "validation"):
        node = node.get(key) if isinstance(node, dict) else None
    if not isinstance(node, dict):
        raise UserError(f'the configuration "{path}" has no data.params.validation; choose another one with --data')
    return instantiate_from_config(node)


def check_finite(images: torch.Tensor) -> torch.Tensor:
    """Return images (B, C, H, W) whose values are all finite.

    Raises:
        UserError: A value is not finite; scores would have no meaning.
    """
    from ldm.modules.precision import finite_items

    failed = int((~finite_items(images)).sum())
    if failed:
        raise UserError(
            f"{failed} of {len(images)} images of a batch are not finite; use --precision float32, or check the weights"
        )
    return images


def table(heads: Mapping[str, str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table.

    Args:
        heads: the head of each column, and its alignment: "---" or "---:".
        rows: the cells of each row.
    """
    lines = [f"| {' | '.join(heads)} |", f"|{'|'.join(heads.values())}|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def write_scores(path: str, settings: Mapping[str, Any], rows: Sequence[Any]) -> None:
    """Write the settings and the rows, which are data classes, as JSON."""
    from ldm.io.files import atomic_path

    content = {"settings": dict(settings), "scores": [asdict(row) for row in rows]}
    with atomic_path(Path(path)) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
