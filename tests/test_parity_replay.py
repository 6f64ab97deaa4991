"""Tests of the replay itself: every case can be replayed, and a wrong result does not pass."""

from __future__ import annotations

import re

import pytest
from parity_cases import CASES, load_case, names
from parity_replay import assert_replayed, compare, replay


def test_every_recorded_case_is_known_and_used_by_a_test(repo_root):
    files = {path.stem for folder in CASES for path in folder.glob("*.npz")}
    assert len(files) == 62 and set(names()) == files
    sources = [path for path in repo_root.glob("tests/**/test_*.py") if "parity" not in path.name]
    calling = "\n".join(text for path in sources if "assert_replayed(" in (text := path.read_text()))
    prefixes = set(re.findall(r'assert_replayed\(f"(\w+_)\{', calling))
    parts = set(re.findall(r'"(\w+)"', calling))
    pinned = parts | {prefix + part for prefix in prefixes for part in parts}
    assert files - pinned == set()


def test_documents_state_the_number_of_outputs(repo_root):
    count = sum(len(load_case(name).outputs) for name in names())
    for document in ("docs/weights.md", "tests/parity/README.md"):
        assert re.findall(r"compares (?:all )?(\d+) (?:recorded )?outputs", (repo_root / document).read_text()) == [
            str(count)
        ]


@pytest.mark.parametrize("name", ["ema", "vq_model"])
def test_all_outputs_are_compared_and_pass(name):
    case = load_case(name)
    results = list(compare(case, replay(case)))
    assert [result.output for result in results] == list(case.outputs)
    assert all(result.passed and result.error <= result.tolerance for result in results)


def changed(change) -> dict[str, bool]:
    """Return which outputs of `vq_model` pass after `change` was applied to the recorded ones."""
    case = load_case("vq_model")
    actual = {name: value.clone() for name, value in case.outputs.items()}
    change(actual)
    return {result.output: result.passed for result in compare(case, actual)}


@pytest.mark.parametrize(
    ("output", "change"),
    [
        ("reconstruction", lambda o: o["reconstruction"].mul_(1.0002)),
        ("reconstruction", lambda o: o["reconstruction"][0, 0, 0].fill_(float("nan"))),
        ("reconstruction", lambda o: o.update(reconstruction=o["reconstruction"][:1])),
        ("vq_loss", lambda o: o.pop("vq_loss")),
        ("vq_loss", lambda o: o["vq_loss"].add_(float("inf"))),
        ("indices", lambda o: o["indices"][0, 0, :1].add_(1)),
    ],
)
def test_wrong_result_fails_alone(output, change):
    assert [name for name, passed in changed(change).items() if not passed] == [output]


def test_error_below_the_tolerance_passes():
    assert all(changed(lambda o: o["reconstruction"].mul_(1.00005)).values())


def test_integers_are_exact():
    case = load_case("ema")
    actual = {**case.outputs, "num_updates": case.outputs["num_updates"] + 1}
    assert [result.output for result in compare(case, actual) if not result.passed] == ["num_updates"]


def test_assertion_names_the_outputs_that_differ(monkeypatch):
    from ldm.modules.ema import LitEma

    monkeypatch.setattr(LitEma, "forward", lambda self, model: None)
    with pytest.raises(AssertionError, match=r"ema differs from its record: weight: .*bias.*num_updates"):
        assert_replayed("ema")
    assert_replayed("class_embedder", "context")
    with pytest.raises(AssertionError, match="no such output"):
        assert_replayed("class_embedder", "contexts")
