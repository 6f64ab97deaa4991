"""Comparison of two results: refused unless they were made in the same way."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ldm.errors import UserError
from ldm.evaluation.bootstrap import Interval, difference_interval, fid_interval, mean_interval
from ldm.evaluation.moments import Gaussian
from ldm.evaluation.results import COLUMNS, Result, markdown, shown
from ldm.io.npz import read_array

METRIC_PACKAGES = ("torch-fidelity", "torchmetrics")
FID = ("fid", "rfid")
LONGEST = 60  # characters of a value in a message


def differences(first: Result, second: Result) -> list[str]:
    """Return the differences of two protocols, each as one phrase; empty if the figures can be compared.

    The task, the protocol and the versions of the metrics must be equal, and the settings of the sampler if both
    results state them. The models, their weights and the seeds may differ.
    """
    parts = [_facts(first), _facts(second)]
    _forget_equal_preparations(parts)
    if first.sampling is not None and second.sampling is not None:
        for part, result in zip(parts, (first, second), strict=True):
            part["sampling"] = result.sampling
    pairs = [dict(_flat(part)) for part in parts]
    names = list(dict.fromkeys(itertools.chain(*pairs)))
    return [
        f"{name}: {_short(pairs[0].get(name))} and {_short(pairs[1].get(name))}"
        for name in names
        if pairs[0].get(name) != pairs[1].get(name)
    ]


def _facts(result: Result) -> dict[str, Any]:
    packages = {name: result.versions.get(name) for name in METRIC_PACKAGES}
    return {"task": result.task, **result.protocol, "version": packages}


def _forget_equal_preparations(parts: list[dict[str, Any]]) -> None:
    """Remove the descriptions of preparations of images whose pixels are equal; paths in them may differ."""
    for name in ("reference", "originals"):
        entries = [part.get(name) or {} for part in parts]
        if all(entries) and entries[0].get("sha256") == entries[1].get("sha256"):
            for part in parts:
                part[name] = {key: value for key, value in part[name].items() if key != "preparation"}


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, each in value.items():
        if isinstance(each, Mapping):
            yield from _flat(each, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", json.dumps(each, ensure_ascii=False)


def _short(value: str | None) -> str:
    text = "not stated" if value is None else value
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def check_comparable(first: Result, second: Result, names: tuple[str, str]) -> None:
    """Raise an error if two results were made in different ways.

    Args:
        first, second: the results.
        names: their files, for the message.

    Raises:
        UserError: the protocols differ.
    """
    found = differences(first, second)
    if found:
        more = f", and {len(found) - 1} more" if len(found) > 1 else ""
        raise UserError(
            f'"{names[0]}" and "{names[1]}" were made in different ways: {found[0]}{more}; evaluate both in the same '
            "way, or print them nevertheless with --force"
        )


def comparison_table(
    paths: tuple[Path, Path], results: tuple[Result, Result], resamples: int, fid_resamples: int
) -> str:
    """Return the figures of two results side by side in Markdown, with bootstrap intervals of 95 %.

    The interval of a mean over images comes from the stored values of the images, and that of FID from stored features.
    Other figures have none. For equal images, the last column has the interval of the mean difference.

    Args:
        paths: the JSON files, beside which the features are.
        results: the results.
        resamples: bootstrap samples of means.
        fid_resamples: bootstrap samples of FID.
    """
    first, second = results
    heads = ["figure", first.name, "95 %", second.name, "95 %", "difference", "95 %"]
    rows = []
    for row, metric in _common(first, second):
        cells = [f"{COLUMNS[metric][0]}{f' ({row})' if row else ''}"]
        for path, result in zip(paths, results, strict=True):
            interval = _interval(path, result, row, metric, resamples, fid_resamples)
            cells += [shown(metric, result.figures[row][metric]), _span(metric, interval)]
        values = [result.figures[row][metric].value for result in results]
        decimals = COLUMNS[metric][1]
        change = "–" if None in values else f"{values[1] - values[0]:+.{decimals}f}"
        rows.append([*cells, change, _span(metric, _paired(first, second, row, metric, resamples))])
    return markdown(heads, rows)


def _common(first: Result, second: Result) -> Iterator[tuple[str, str]]:
    """Yield the rows and metrics that both results have.

    Raises:
        UserError: there is none.
    """
    found = [
        (row, metric)
        for row in first.figures
        for metric in COLUMNS
        if metric in first.figures[row] and metric in second.figures.get(row, {})
    ]
    if not found:
        raise UserError("the two results have no figure in common; evaluate both with the same metrics")
    yield from found


def _interval(path: Path, result: Result, row: str, metric: str, resamples: int, fid_resamples: int) -> Interval | None:
    values = result.per_image.get(row, {}).get(metric)
    if values:
        return mean_interval(values, resamples)
    if metric in FID and not row and result.features is not None and fid_resamples > 1:
        archive = path.with_name(result.features)
        reference = Gaussian(read_array(archive, "mu"), read_array(archive, "sigma"), None)
        return fid_interval(read_array(archive, "features"), reference, fid_resamples)
    return None


def _paired(first: Result, second: Result, row: str, metric: str, resamples: int) -> Interval | None:
    values = [result.per_image.get(row, {}).get(metric) for result in (first, second)]
    if not values[0] or not values[1] or first.images != second.images or len(values[0]) != len(values[1]):
        return None
    return difference_interval(values[0], values[1], resamples)


def _span(metric: str, interval: Interval | None) -> str:
    decimals = COLUMNS[metric][1]
    return "none" if interval is None else f"{interval[0]:.{decimals}f} … {interval[1]:.{decimals}f}"
