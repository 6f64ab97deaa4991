"""Measurements of the benchmarks: interleaved rounds, the rate of the machine, tables."""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ldm.io.files import atomic_path
from ldm.modules.packing import packed_weights
from ldm.pipelines.loading import choose_device

AS_SAMPLED = "ldm, as sampling runs it"
CPU_FEATURES = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")


@dataclass
class Report:
    """Results of a benchmark: a table in Markdown, and a JSON file with all times."""

    benchmark: str
    args: argparse.Namespace
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, cells: Mapping[str, Any], seconds: list[float] | None = None) -> None:
        """Add a row to the table; `seconds`, its times, are written to the file only."""
        self.rows.append({**cells, **({"seconds": seconds} if seconds else {})})

    def finish(self) -> None:
        """Print the table, and write the file if `--json` names one."""
        shown = [{name: str(value) for name, value in row.items() if name != "seconds"} for row in self.rows]
        print(environment_line() + (" **tiny sizes: no measurement**" if self.args.tiny else ""))
        print()
        print("| " + " | ".join(shown[0]) + " |")
        print("|" + "---|" * len(shown[0]))
        for row in shown:
            print("| " + " | ".join(row.values()) + " |")
        if self.args.json:
            content = {"benchmark": self.benchmark, "environment": environment(), "rows": self.rows}
            content["options"] = vars(self.args)
            with atomic_path(Path(self.args.json)) as temporary:
                temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def begin(args: argparse.Namespace) -> torch.device:
    """Set the number of threads and the seed; return the device."""
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    return choose_device(args.device)


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that `run` takes, until the device has finished."""
    wait(device)
    start = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


def contest(
    runs: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, warm_up: int = 1
) -> dict[str, list[float]]:
    """Return the seconds of each run in each round.

    The runs take turns in alternating order, so that a machine that slows down slows all of them.
    """
    for run in runs.values():
        for _ in range(warm_up):
            run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        for name in runs if number % 2 == 0 else reversed(list(runs)):
            seconds[name].append(timed(runs[name], device))
    return seconds


def compare(
    report: Report,
    runs: Mapping[str, Callable[[], object]],
    device: torch.device,
    dtype: torch.dtype,
    flops: float | None = None,
    images: int | None = None,
) -> None:
    """Time `runs` and add a row for each, with its median and its speed relative to the first.

    Args:
        report: gets the rows.
        runs: functions to time, by name.
        device: where they run.
        dtype: the precision that they compute in.
        flops: floating-point operations of one run; adds their rate, and its share of `matmul_rate`.
        images: images of one run; adds the seconds per image.
    """
    seconds = contest(runs, report.args.rounds, device)
    base = next(iter(seconds.values()))
    rate = matmul_rate(dtype, device, 128 if report.args.tiny else 2048) if flops else None
    for name, times in seconds.items():
        median = statistics.median(times)
        speed = statistics.median(b / t for b, t in zip(base, times, strict=True))
        cells = {
            "precision": str(dtype).removeprefix("torch."),
            "what": name,
            "median s": f"{median:.3f}",
            "min - max": f"{min(times):.3f} - {max(times):.3f}",
            "times as fast": f"{speed:.2f}",
        }
        if images:
            cells["s per image"] = f"{median / images:.3f}"
        if flops and rate:
            cells |= {"TFLOP/s": f"{flops / median / 1e12:.3f}", "share of matmul": f"{flops / median / rate:.0%}"}
        report.add(cells, times)


def matmul_rate(dtype: torch.dtype, device: torch.device, size: int) -> float:
    """Return the operations per second of a product of two square matrices, by the fastest method of torch."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    layer = nn.Linear(size, size, bias=False).to(device, dtype).requires_grad_(False)
    with torch.no_grad(), packed_weights(layer):
        seconds = contest({"product": lambda: a @ b, "packed": lambda: layer(a)}, 5, device)
    return 2 * size**3 / min(min(times) for times in seconds.values())


@torch.no_grad()
def flops_of(module: nn.Module, *shapes: tuple[int, ...]) -> float:
    """Return the floating-point operations of one forward pass of `module`, which is on the meta device."""
    with FlopCounterMode(display=False) as counter:
        module(*(torch.empty(shape, device="meta") for shape in shapes))
    return counter.get_total_flops()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Build modules with weights in `dtype`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def same_size(ours: nn.Module, theirs: nn.Module) -> None:
    """Raise an error if two networks have different numbers of parameters.

    Raises:
        AssertionError: They have.
    """
    counts = [sum(parameter.numel() for parameter in module.parameters()) for module in (ours, theirs)]
    if counts[0] != counts[1]:
        raise AssertionError(f"{counts[0]} parameters here, {counts[1]} there: not the same architecture")


def networks_to_compare(ours: nn.Module, theirs: nn.Module) -> dict[str, Any]:
    """Return the networks by name, frozen: that of diffusers in both layouts, ours, and a copy of ours to prepare."""
    same_size(ours, theirs)
    networks = {
        "diffusers": theirs,
        "diffusers, channels-last": copy.deepcopy(theirs).to(memory_format=torch.channels_last),
        "ldm": ours,
        AS_SAMPLED: copy.deepcopy(ours),
    }
    for network in networks.values():
        network.eval().requires_grad_(False)
    return networks


def environment() -> dict[str, Any]:
    """Return the facts about the machine and the software that times depend on."""
    facts = _cpu_facts()
    packages = {name: version(name) for name in ("torch", "diffusers")}
    name = facts.get("model name") or platform.processor() or platform.machine()
    flags = facts.get("flags", "").split()
    features = [feature for feature in CPU_FEATURES if feature in flags]
    return {"cpu": name, "cores": os.cpu_count(), "features": features, "threads": torch.get_num_threads(), **packages}


def environment_line() -> str:
    """Return the environment as a line of text."""
    facts = environment()
    features = ", ".join(facts["features"]) or "no known vector extension"
    amx = "" if "amx_bf16" in facts["features"] else ", no AMX"
    return (
        f"{facts['cores']} cores ({facts['cpu']}: {features}{amx}), {facts['threads']} threads, "
        f"torch {facts['torch']}, diffusers {facts['diffusers']}"
    )


def _cpu_facts() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in lines if ":" in line)
    return {name.strip(): value.strip() for name, _, value in pairs}
