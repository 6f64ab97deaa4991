"""Results: their files, their comparison, bootstrap intervals, and tables beside published figures."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from ldm.errors import UserError
from ldm.evaluation import results as results_module
from ldm.evaluation.bootstrap import difference_interval, fid_interval, mean_interval
from ldm.evaluation.comparison import check_comparable, comparison_table, differences
from ldm.evaluation.features import SetFeatures
from ldm.evaluation.libraries import versions
from ldm.evaluation.moments import Gaussian, Moments
from ldm.evaluation.published import read_published, results_table
from ldm.evaluation.results import COLUMNS, Result, figure_table, result_path, write_features
from ldm.evaluation.scores import Figure, fid

FEATURES = {"network": "inception", "sha256": "ab", "resize": "bilinear"}


def result(**changes) -> Result:
    content = {
        "task": "reconstructions",
        "name": "kl",
        "protocol": {
            "features": FEATURES,
            "images": 4,
            "size": "8 × 8",
            "originals": {"preparation": "none", "sha256": "cd"},
        },
        "subject": {"originals": "photos/val", "weights_sha256": "12"},
        "figures": {"": {"rfid": Figure(1.5), "psnr": Figure(25.0, 2.0)}},
        "per_image": {"": {"psnr": [22.0, 24.0, 26.0, 28.0]}},
        "images": ["a", "b", "c", "d"],
    }
    return Result(**{**content, **changes})


def test_written_result_is_read_again(tmp_path):
    first = result(sampling={"steps": 50}, extra={"codebook": None})
    first.write(tmp_path / "a/r.json")
    assert Result.read(tmp_path / "a/r.json") == first
    content = json.loads((tmp_path / "a/r.json").read_text())
    assert content["versions"] == versions()
    assert {"torch-fidelity", "torchmetrics", "torch", "ldm"} <= {*content["versions"]}


def test_infinite_figures_are_null(tmp_path):
    result(figures={"": {"psnr": Figure(float("inf"), float("nan"))}}).write(tmp_path / "r.json")
    assert Result.read(tmp_path / "r.json").figures == {"": {"psnr": Figure(None, None)}}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1}', '{"format": 1, "figures": 3}', "\0"])
def test_other_files_raise_user_error(tmp_path, text):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(UserError, match="is not a result of ldm evaluate; give one of its JSON files"):
        Result.read(tmp_path / "r.json")


def test_missing_file_and_other_format_raise_user_error(tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        Result.read(tmp_path / "r.json")
    (tmp_path / "r.json").write_text('{"format": 99}')
    with pytest.raises(UserError, match="has the format 99, not 1; evaluate again"):
        Result.read(tmp_path / "r.json")


def test_default_path_is_new(tmp_path, monkeypatch):
    monkeypatch.setattr(results_module, "FOLDER", tmp_path)
    first = result_path(None, "samples", "models/my model")
    assert first == tmp_path / "samples-my-model.json"
    result().write(first)
    assert result_path(None, "samples", "models/my model") == tmp_path / "samples-my-model-1.json"
    assert str(result_path("x.json", "samples", "y")) == "x.json"


def test_table_of_figures():
    text = figure_table(
        {"": {"psnr": Figure(27.531, 4.54), "fid": Figure(1.0)}, "bicubic": {"psnr": Figure(20.0)}}, "kl"
    )
    assert text.splitlines() == [
        "|  | FID | PSNR, dB |",
        "| --- | ---: | ---: |",
        "| kl | 1.00 | 27.53 ± 4.54 |",
        "| bicubic | – | 20.00 |",
    ]


# -- comparison --------------------------------------------------------------------------------------------------


def changed(**entries) -> Result:
    return result(protocol={**result().protocol, **entries})


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (changed(images=5), "images: 4 and 5"),
        (changed(size="9 × 9"), 'size: "8 × 8" and "9 × 9"'),
        (
            changed(features={"network": "inception", "sha256": "ff", "resize": "bilinear"}),
            'features.sha256: "ab" and "ff"',
        ),
        (changed(features={"network": "inception", "sha256": "ab", "resize": "bicubic"}), "features.resize: .*bicubic"),
        (changed(originals={"preparation": "none", "sha256": "ee"}), 'originals.sha256: "cd" and "ee"'),
        (changed(precision="bfloat16"), 'precision: not stated and "bfloat16"'),
        (result(task="samples"), 'task: "reconstructions" and "samples"'),
        (result(versions={**versions(), "torch-fidelity": "0.1"}), 'version.torch-fidelity: .* and "0.1"'),
        (result(versions={**versions(), "torchmetrics": "0.1"}), 'version.torchmetrics: .* and "0.1"'),
    ],
)
def test_other_protocol_is_refused(other, difference):
    with pytest.raises(UserError, match=f'"a" and "b" were made in different ways: {difference}.*--force$') as caught:
        check_comparable(result(), other, ("a", "b"))
    assert "\n" not in str(caught.value)


def test_models_seeds_and_paths_may_differ():
    other = result(name="vq", subject={"originals": "elsewhere", "weights_sha256": "34"}, extra={"codebook": {}})
    other.versions["torch"] = "9.9"
    assert differences(result(), other) == []
    check_comparable(result(), other, ("a", "b"))


def test_equal_pixels_may_be_described_in_two_ways():
    assert differences(result(), changed(originals={"preparation": "a crop of another folder", "sha256": "cd"})) == []


def test_settings_of_the_sampler_count_if_both_are_known():
    first, second = result(sampling={"steps": 50, "eta": 0.0}), result(sampling={"steps": 200, "eta": 1.0})
    assert differences(first, second) == ["sampling.steps: 50 and 200", "sampling.eta: 0.0 and 1.0"]
    assert differences(first, result()) == []
    with pytest.raises(UserError, match=r"sampling.steps: 50 and 200, and 1 more; evaluate"):
        check_comparable(first, second, ("a", "b"))


def test_comparison_shows_figures_intervals_and_paired_differences(tmp_path):
    first = result()
    second = result(
        name="vq",
        figures={"": {"rfid": Figure(2.0), "psnr": Figure(26.0, 2.0)}},
        per_image={"": {"psnr": [23.0, 25.0, 27.0, 29.0]}},
    )
    path = tmp_path / "r.json"
    lines = comparison_table((path, path), (first, second), 500, 10).splitlines()
    assert lines[0] == "| figure | kl | 95 % | vq | 95 % | difference | 95 % |"
    assert lines[2] == "| rFID | 1.50 | none | 2.00 | none | +0.50 | none |"
    low, high = mean_interval([22.0, 24.0, 26.0, 28.0], 500)
    assert f"| PSNR, dB | 25.00 ± 2.00 | {low:.2f} … {high:.2f} | 26.00 ± 2.00 |" in lines[3]
    assert lines[3].endswith("| +1.00 | 1.00 … 1.00 |")
    other_images = replace(second, images=["e", "f", "g", "h"])
    assert comparison_table((path, path), (first, other_images), 500, 10).splitlines()[3].endswith("| +1.00 | none |")


def test_results_without_common_figures_raise_user_error(tmp_path):
    path = tmp_path / "r.json"
    with pytest.raises(UserError, match="no figure in common"):
        comparison_table((path, path), (result(), result(figures={"": {"fid": Figure(1.0)}})), 10, 10)


def test_comparison_reads_kept_features_for_fid(tmp_path):
    features = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32)
    reference = Gaussian(np.zeros(3), np.eye(3), 100)
    each = result()
    each.features = write_features(
        tmp_path / "r.json",
        SetFeatures(None, 60, None, "", features=features),
        SetFeatures(reference, 100, None, ""),
    )
    assert each.features == "r.features.npz"
    low, high = fid_interval(features, reference, 10)
    rows = comparison_table((tmp_path / "r.json",) * 2, (each, each), 10, 10).splitlines()
    assert f"| 1.50 | {low:.2f} … {high:.2f} | 1.50 | {low:.2f} … {high:.2f} |" in rows[2]


def test_interval_of_a_mean_covers_it_in_most_cases():
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        low, high = mean_interval(rng.normal(3.0, 1.0, 40).tolist(), 200, seed)
        covered += low <= 3.0 <= high
        assert 0.3 < high - low < 1.0  # 2 · 1.96 / √40 is 0.62
    assert 0.88 < covered / 200 < 0.99


def test_interval_of_equal_values_is_a_point():
    assert mean_interval([2.0] * 5, 50) == (2.0, 2.0)
    assert difference_interval([1.0, 5.0], [2.0, 6.0], 50) == (1.0, 1.0)


def test_interval_of_fid_surrounds_it_and_repeats():
    features = np.random.default_rng(0).normal(size=(200, 4))
    reference = Gaussian(np.full(4, 0.5), np.eye(4), None)
    moments = Moments()
    moments.add(features)
    low, high = fid_interval(features, reference, 50)
    value = fid(moments.gaussian(), reference)
    assert (low + high) / 2 == pytest.approx(value)
    assert 0.05 < (high - low) / value < 1.0
    assert fid_interval(features, reference, 50) == (low, high)


# -- published figures -------------------------------------------------------------------------------------------


def test_published_figures_are_complete():
    rows = read_published()
    assert len(rows) == 70
    found = {(row.dataset, row.method, row.setting): row.figures for row in rows if row.source == "paper, table 1"}
    assert found["LSUN-Churches 256", "LDM-8", "200 steps, KL"] == {
        "fid": Figure(4.02),
        "precision": Figure(0.64),
        "recall": Figure(0.52),
    }
    (zoo,) = [row for row in rows if row.method == "f=4, KL"]
    assert zoo.figures == {"rfid": Figure(0.27), "psnr": Figure(27.53, 4.54), "lpips": Figure(0.55, 0.24)}
    assert {row.task for row in rows} == {"samples", "superresolution", "inpainting", "reconstructions"}
    assert {metric for row in rows for metric in row.figures} <= {*COLUMNS}
    assert all(row.figures and row.source for row in rows)


def test_table_has_results_beside_published_figures():
    lines = results_table([result()], read_published()).splitlines()
    assert lines[0] == "### First stages"
    assert lines[2] == "| method | data | setting | rFID | PSNR, dB | LPIPS | source |"
    assert "| f=4, KL | ImageNet validation |  | 0.27 | 27.53 ± 4.54 | 0.550 ± 0.240 | model zoo |" in lines
    assert lines[-1] == "| **kl** | val, 4 images |  | 1.50 | 25.00 ± 2.00 | – | measured |"


def test_table_of_one_data_set_and_of_several_kinds():
    sampling = {"sampler": "ddim", "steps": 200, "eta": 1.0, "guidance": 1.5}
    samples = result(task="samples", figures={"": {"fid": Figure(5.0)}}, sampling=sampling)
    restored = result(
        task="restorations",
        protocol={**result().protocol, "kind": "inpainting"},
        figures={"": {"fid": Figure(1.0)}, "Telea": {"fid": Figure(9.0)}},
    )
    text = results_table([restored, samples], read_published(), "FFHQ 256")
    assert text.count("FFHQ 256") == 8
    assert text.index("### Samples") < text.index("### In-painting")
    assert "CelebA" not in text and "Places" not in text
    assert "200 DDIM steps, eta 1, guidance 1.5 | 5.00 |" in text
    assert "| Telea (kl) | val, 4 images |  | 9.00 | measured |" in text
    assert "FFHQ" not in results_table([samples], [])
    with pytest.raises(UserError, match=r'no published figures on "FFHQ" \(did you mean "FFHQ 256"\?\); known: CelebA'):
        results_table([samples], read_published(), "FFHQ")
