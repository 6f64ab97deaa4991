"""Feature network and output that the sub-commands of `ldm evaluate` share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli.command import say
from ldm.errors import UserError
from ldm.io.files import check_writable

if TYPE_CHECKING:
    from ldm.evaluation.features import SetFeatures
    from ldm.evaluation.network import FeatureNetwork
    from ldm.evaluation.results import Result
    from ldm.modules.losses.lpips import LPIPS


def load_feature_network(args: argparse.Namespace) -> FeatureNetwork:
    """Return the feature network that the options name."""
    from ldm.evaluation.network import load_network
    from ldm.pipelines.loading import choose_device

    check_output(args)
    return load_network(args.features, choose_device(args.device))


def check_output(args: argparse.Namespace) -> None:
    """Raise an error early if the result cannot be written.

    Raises:
        UserError: The folder of `--json` is not writable.
    """
    if args.json is not None:
        if Path(args.json).is_dir():
            raise UserError(f'--json "{args.json}" is a folder; name a file')
        check_writable(Path(args.json).parent, "--json")


def load_lpips_network(args: argparse.Namespace) -> LPIPS | None:
    """Return the network of LPIPS; None with `--no-lpips`."""
    from ldm.evaluation.pairs import load_lpips

    return None if args.no_lpips else load_lpips(args.lpips_weights)


def write_result(
    result: Result, path: Path, features: SetFeatures | None = None, reference: SetFeatures | None = None
) -> None:
    """Print the table of a result, and write the result; with `features` also these beside it."""
    from ldm.evaluation.results import figure_table, write_features

    say(figure_table(result.figures, result.name))
    if features is not None and reference is not None and features.features is not None and reference.gaussian:
        result.features = write_features(path, features, reference)
    result.write(path)
    say(f"result: {path}")
