"""Table of results beside published figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ldm.config.assets import locate
from ldm.errors import UserError, did_you_mean
from ldm.evaluation.results import COLUMNS, Result, markdown, shown
from ldm.evaluation.scores import Figure

FILE = Path("configs/evaluation/published.yaml")
TITLES = {
    "samples": "Samples",
    "reconstructions": "First stages",
    "inpainting": "In-painting",
    "superresolution": "Super-resolution",
    "restorations": "Restorations",
    "likelihood": "Likelihood",
}


@dataclass(frozen=True)
class PublishedRow:
    """Published figures of one method.

    Attributes:
        task: a key of `TITLES`.
        dataset: the data set that it was measured on.
        method: its name.
        setting: how it was sampled, or of what kind it is.
        source: where the figures were published.
        figures: metric → value.
    """

    task: str
    dataset: str
    method: str
    setting: str
    source: str
    figures: dict[str, Figure]


def read_published(path: Path = FILE) -> list[PublishedRow]:
    """Read the published figures that this project contains."""
    content = yaml.safe_load(locate(path).read_text(encoding="utf-8"))
    return [
        PublishedRow(
            table["task"],
            table["dataset"],
            row["method"],
            row.get("setting", ""),
            table["source"],
            {metric: _figure(value) for metric, value in row.items() if metric in COLUMNS},
        )
        for table in content["tables"]
        for row in table["rows"]
    ]


def _figure(value: Any) -> Figure:
    return Figure(*map(float, value)) if isinstance(value, list) else Figure(float(value))


def kind_of(result: Result) -> str:
    """Return the key of `TITLES` of a result."""
    return result.protocol.get("kind") or result.task


def results_table(results: Sequence[Result], published: Sequence[PublishedRow], dataset: str | None = None) -> str:
    """Return Markdown tables of results beside the published figures of their kind.

    Args:
        results: the results.
        published: published figures.
        dataset: use only the published figures on this data set.

    Raises:
        UserError: there are no published figures on `dataset`.
    """
    known = list(dict.fromkeys(row.dataset for row in published))
    if dataset is not None and dataset not in known:
        raise UserError(
            f'there are no published figures on "{dataset}"{did_you_mean(dataset, known)}; known: {", ".join(known)}'
        )
    blocks = []
    for kind, title in TITLES.items():
        own = [result for result in results if kind_of(result) == kind]
        others = [row for row in published if row.task == kind and dataset in (None, row.dataset)]
        if own:
            blocks.append(f"### {title}\n\n{_table(own, others)}")
    return "\n\n".join(blocks)


def _table(results: Sequence[Result], published: Sequence[PublishedRow]) -> str:
    rows: list[tuple[tuple[str, ...], Mapping[str, Figure]]] = [
        ((row.method, row.dataset, row.setting, row.source), row.figures) for row in published
    ]
    for result in results:
        for name, figures in result.figures.items():
            method = f"**{result.name}**" if not name else f"{name} ({result.name})"
            rows.append(((method, _measured_on(result), setting_of(result), "measured"), figures))
    metrics = [metric for metric in COLUMNS if any(metric in figures for _, figures in rows)]
    heads = ["method", "data", "setting", *(COLUMNS[metric][0] for metric in metrics), "source"]
    cells = [
        [method, data, setting, *(shown(metric, figures.get(metric)) for metric in metrics), source]
        for (method, data, setting, source), figures in rows
    ]
    return markdown(heads, cells)


def _measured_on(result: Result) -> str:
    source = result.subject.get("reference") or result.subject.get("originals")
    images = f"{result.protocol.get('images', 0):,} images"
    return f"{Path(source).stem}, {images}" if source else images


def setting_of(result: Result) -> str:
    """Return the settings of the sampler of a result in words."""
    sampling = result.sampling
    if not sampling:
        return ""
    steps = f"{sampling.get('steps')} {str(sampling.get('sampler')).upper()} steps"
    return f"{steps}, eta {sampling.get('eta'):g}, guidance {sampling.get('guidance'):g}"
