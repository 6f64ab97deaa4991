"""Result of an evaluation: its figures, its protocol, and the values that intervals are computed from."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ldm.errors import UserError
from ldm.evaluation.features import SetFeatures
from ldm.evaluation.libraries import versions
from ldm.evaluation.scores import Figure
from ldm.io.files import atomic_path, variants
from ldm.io.npz import Rows, write_npz

logger = logging.getLogger(__name__)

FORMAT = 1
FOLDER = Path("outputs/evaluation")


@dataclass
class Result:
    """Figures of one evaluation, and how they were made.

    Attributes:
        task: "samples", "reconstructions" or "restorations".
        name: name of the model or of the images.
        protocol: facts that must be equal for a comparison: metrics, feature network, reference, sizes and counts.
        sampling: settings of the sampler, which must be equal too; None if they are not known.
        subject: what was measured: paths, hashes of the weights, the seed. It may differ between results.
        figures: name of a row → metric → value. The row "" is the one of a single method.
        per_image: name of a row → metric → the value of each image, in the order of `images`.
        images: names of the images.
        extra: further findings, such as the use of a codebook.
        features: file with the features that a bootstrap of FID needs, beside the JSON file; None if not kept.
        versions: versions of the libraries; they count as a part of the protocol.
    """

    task: str
    name: str
    protocol: dict[str, Any]
    sampling: dict[str, Any] | None = None
    subject: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, dict[str, Figure]] = field(default_factory=dict)
    per_image: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    images: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)
    features: str | None = None
    versions: dict[str, str] = field(default_factory=versions)
    format: int = FORMAT

    def write(self, path: Path) -> None:
        """Write the result as JSON.

        Raises:
            UserError: the file cannot be written.
        """
        text = json.dumps(_without_infinity(asdict(self)), indent=2, allow_nan=False)
        with atomic_path(path) as temporary:
            temporary.write_text(f"{text}\n", encoding="utf-8")

    @classmethod
    def read(cls, path: str | Path) -> Result:
        """Read a result.

        Raises:
            UserError: the file is missing, or is not a result.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise UserError(f'"{path}" has the format {content["format"]}, not {FORMAT}; evaluate again')
            figures = {
                row: {metric: Figure(**figure) for metric, figure in figures.items()}
                for row, figures in content.pop("figures").items()
            }
            return cls(**content, figures=figures)
        except FileNotFoundError:
            raise UserError(f'there is no file "{path}"; check the path') from None
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            raise UserError(f'"{path}" is not a result of ldm evaluate; give one of its JSON files') from None


def _without_infinity(value: Any) -> Any:
    """Return a value for JSON, which has no infinite numbers: they become None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _without_infinity(each) for key, each in value.items()}
    return [_without_infinity(each) for each in value] if isinstance(value, list | tuple) else value


def result_path(path: str | None, task: str, name: str) -> Path:
    """Return the JSON file of a result: `path`, or a new one in `outputs/evaluation`."""
    if path is not None:
        return Path(path)
    words = "".join(letter if letter.isalnum() or letter in "-._" else "-" for letter in Path(name).name) or "result"
    return next(each for each in variants(FOLDER / f"{task}-{words}.json") if not each.exists())


def write_features(path: Path, samples: SetFeatures, reference: SetFeatures) -> str:
    """Write the features of the samples and the statistics of the reference beside a result; return the file's name."""
    assert samples.features is not None and reference.gaussian is not None
    target = path.with_suffix(".features.npz")
    arrays = {"features": samples.features, "mu": reference.gaussian.mu, "sigma": reference.gaussian.sigma}
    write_npz(target, {name: Rows.of(np.ascontiguousarray(array)) for name, array in arrays.items()})
    return target.name


# -- tables ------------------------------------------------------------------------------------------------------

# Metric → its head in tables, and its number of decimals.
COLUMNS = {
    "fid": ("FID", 2),
    "rfid": ("rFID", 2),
    "kid": ("KID", 4),
    "is": ("IS", 2),
    "precision": ("Precision", 3),
    "recall": ("Recall", 3),
    "psnr": ("PSNR, dB", 2),
    "ssim": ("SSIM", 3),
    "lpips": ("LPIPS", 3),
    "bits": ("bits/dim", 4),
    "fid_40_50": ("FID, 40–50 %", 2),
    "lpips_40_50": ("LPIPS, 40–50 %", 3),
}


def shown(metric: str, figure: Figure | None) -> str:
    """Return a figure as it appears in tables, such as "27.53 ± 4.54"."""
    if figure is None or figure.value is None:
        return "–"
    decimals = COLUMNS[metric][1]
    deviation = "" if figure.deviation is None else f" ± {figure.deviation:.{decimals}f}"
    return f"{figure.value:.{decimals}f}{deviation}"


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown whose first column is text."""
    lines = [list(heads), ["---", *(len(heads) - 1) * ["---:"]], *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def figure_table(figures: Mapping[str, Mapping[str, Figure]], name: str) -> str:
    """Return the figures of a result in Markdown; `name` is that of the row without one."""
    metrics = [metric for metric in COLUMNS if any(metric in row for row in figures.values())]
    heads = ["", *(COLUMNS[metric][0] for metric in metrics)]
    rows = [
        [row or name, *(shown(metric, values.get(metric)) for metric in metrics)] for row, values in figures.items()
    ]
    return markdown(heads, rows)
