"""Tests of the benchmarks with the commands that their README shows."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from ldm.config.instantiate import instantiate_from_config
from ldm.config.model_config import read_config

pytestmark = pytest.mark.skipif(sys.version_info < (3, 11), reason="diffusers needs Python 3.11")

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
README = (FOLDER / "README.md").read_text(encoding="utf-8")
COMMANDS = {
    words[2].removeprefix("benchmarks."): words[3:]
    for line in re.search(r"```bash\n(.*?)```", README, flags=re.S).group(1).splitlines()
    if (words := shlex.split(line))
}
SHARED = {"__init__", "architectures", "options", "timing"}
NOT_TIMED = {"sampler_accuracy", "memory"}  # see test_sampler_accuracy.py and test_memory.py


def load(name):
    return importlib.import_module(f"benchmarks.{name}")


def test_readme_shows_every_benchmark():
    assert set(COMMANDS) | SHARED | NOT_TIMED == {path.stem for path in FOLDER.glob("*.py")}
    assert {f"{name}.py" for name in COMMANDS} == set(re.findall(r"^\| `(\w+\.py)` \|", README, flags=re.M))
    assert all(f"python -m benchmarks.{name} " in README for name in NOT_TIMED)


@pytest.mark.parametrize("name", COMMANDS)
def test_shown_command_runs(name, tmp_path, capsys):
    words = list(COMMANDS[name])
    file = words[words.index("--json") + 1] = str(tmp_path / "out.json")
    if "--steps" in words:
        words[words.index("--steps") + 1] = "2"
    assert load(name).main([*words, "--tiny", "--rounds", "2"]) == 0
    report = json.loads(Path(file).read_text())
    assert report["benchmark"] == name and {"cpu", "cores", "threads", "torch", "diffusers"} <= set(
        report["environment"]
    )
    measured = [row for row in report["rows"] if "seconds" in row]
    assert measured and all(len(row["seconds"]) == 2 and min(row["seconds"]) > 0 for row in measured)
    environment, _, *table = capsys.readouterr().out.splitlines()
    assert "no measurement" in environment
    assert len({line.count("|") for line in table}) == 1 and len(table) == 2 + len(report["rows"])
    if name == "loader":
        assert {row["workers"] for row in measured} == {0, 1}
        assert [row["what"] for row in measured if row["times as fast"] == "1.00"].count("torchvision ImageFolder") == 2
    elif name == "features":
        assert [row["what"] for row in measured] == ["torch-fidelity", "ldm"]
        assert measured[0]["times as fast"] == "1.00"
    elif name != "start_up":
        assert {row["precision"] for row in measured} == {"float32", "bfloat16"}
        first = next(row for row in measured if row["precision"] == "float32")
        assert (first["what"], first["times as fast"]) == ("diffusers", "1.00")
        assert "ldm" in {row["what"] for row in measured}


def test_runs_take_turns_after_warming_up():
    calls = []
    runs = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    seconds = load("timing").contest(runs, rounds=3, device=torch.device("cpu"))
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}


def test_times_are_in_seconds():
    assert 0.02 <= load("timing").timed(lambda: time.sleep(0.02), torch.device("cpu")) < 2


def test_operations_are_counted_on_the_meta_device():
    with torch.device("meta"):
        layer = nn.Linear(10, 20)
    assert load("timing").flops_of(layer, (3, 10)) == 2 * 3 * 10 * 20


def test_different_architectures_raise_assertion_error():
    with pytest.raises(AssertionError, match="not the same architecture"):
        load("timing").same_size(nn.Linear(1, 1), nn.Linear(1, 2))


def test_networks_of_stable_diffusion_are_those_of_its_configuration():
    nets = load("architectures")
    config = read_config(FOLDER.parent / "configs/stable-diffusion/v1-inference.yaml")["params"]
    with torch.device("meta"):
        size = nets.sizes(tiny=False, stable_diffusion=True)
        unet = instantiate_from_config(config["unet_config"])
        for theirs in (nets.text_unet(size), nets.diffusers_text_unet(size)):
            load("timing").same_size(unet, theirs)
        load("timing").same_size(instantiate_from_config(config["first_stage_config"]), nets.autoencoder(size))
    assert size.latent == config["image_size"]


def test_readme_states_the_published_sizes():
    nets = load("architectures")
    with torch.device("meta"):
        size = nets.sizes(tiny=False)
        pairs = [
            (nets.text_unet(size), nets.diffusers_text_unet(size)),
            (nets.autoencoder(size), nets.diffusers_autoencoder(size)),
            (nets.latent_diffusion(size).first_stage_model, nets.diffusers_autoencoder(size)),
        ]
        unconditional = nets.diffusers_unconditional_unet(size)
    for ours, theirs in pairs:
        load("timing").same_size(ours, theirs)
    weights = [sum(p.numel() for p in module.parameters()) for module in (pairs[0][0], unconditional)]
    assert [f"{count // 10**6} million" in README for count in weights] == [True, True]


def test_import_times_are_summed_by_package():
    log = (
        "import time: self [us] | cumulative | imported package\n"
        "import time:       250 |        250 |   torch.nn\n"
        "import time:      1000 |       1250 | torch\n"
        "noise\n"
        "import time:      2000 |       2000 | numpy\n"
    )
    assert load("start_up").import_times(log) == {"numpy": 0.002, "torch": 0.00125}
