"""How the benchmarks measure: interleaved rounds, the machine's rate, tables."""

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

PREPARED = "ldm, as sampling runs it"
CPU_FEATURES = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")


@dataclass
class Report:
    """What one benchmark found: a table for people, and the same with every single time for programs."""

    benchmark: str
    args: argparse.Namespace
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, cells: Mapping[str, Any], seconds: list[float] | None = None) -> None:
        """A row of the table; `seconds`, the times behind it, go to the file only."""
        self.rows.append({**cells, **({"seconds": seconds} if seconds else {})})

    def finish(self) -> None:
        """Print the table, and write the file that was asked for."""
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
    """Set threads and seed; gives the device."""
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    return choose_device(args.device)


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds that `run` takes, until the device is done."""
    wait(device)
    start = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


def contest(
    runs: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds of each run in each round.

    The runs take turns, in alternating order, so that a machine that slows down slows all of them.
    """
    for run in runs.values():
        for _ in range(warm_up):
            run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        for name in runs if number % 2 == 0 else reversed(runs):
            seconds[name].append(timed(runs[name], device))
    return seconds


def compare(
    report: Report,
    runs: Mapping[str, Callable[[], object]],
    device: torch.device,
    dtype: torch.dtype,
    flops: float | None = None,
    pictures: int | None = None,
) -> None:
    """Time `runs` and add a row for each: its median, and how many times faster than the first it was.

    Args:
        flops: floating-point operations of one run; adds the share of `matmul_rate` reached.
        pictures: that one run draws; adds how many seconds one takes.
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
        if pictures:
            cells["s a picture"] = f"{median / pictures:.3f}"
        if flops and rate:
            cells |= {"TFLOP/s": f"{flops / median / 1e12:.3f}", "share of matmul": f"{flops / median / rate:.0%}"}
        report.add(cells, times)


def matmul_rate(dtype: torch.dtype, device: torch.device, size: int) -> float:
    """Floating-point operations a second in the product of two square matrices, by the best way that torch has."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    layer = nn.Linear(size, size, bias=False).to(device, dtype).requires_grad_(False)
    with torch.no_grad(), packed_weights(layer):
        seconds = contest({"product": lambda: a @ b, "packed": lambda: layer(a)}, 5, device)
    return 2 * size**3 / min(min(times) for times in seconds.values())


@torch.no_grad()
def flops_of(module: nn.Module, *shapes: tuple[int, ...]) -> float:
    """Floating-point operations of one forward pass of `module`, which lies on the meta device."""
    with FlopCounterMode(display=False) as counter:
        module(*(torch.empty(shape, device="meta") for shape in shapes))
    return counter.get_total_flops()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Build modules with weights of `dtype`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def same_size(ours: nn.Module, theirs: nn.Module) -> None:
    """Refuse to compare networks with different numbers of weights."""
    counts = [sum(parameter.numel() for parameter in module.parameters()) for module in (ours, theirs)]
    if counts[0] != counts[1]:
        raise AssertionError(f"{counts[0]} weights here, {counts[1]} there: not the same architecture")


def networks_to_compare(ours: nn.Module, theirs: nn.Module) -> dict[str, nn.Module]:
    """The networks by name, each frozen: diffusers' in both layouts, ours plain and one to be prepared."""
    same_size(ours, theirs)
    networks = {
        "diffusers": theirs,
        "diffusers, channels-last": copy.deepcopy(theirs).to(memory_format=torch.channels_last),
        "ldm": ours,
        PREPARED: copy.deepcopy(ours),
    }
    for network in networks.values():
        network.eval().requires_grad_(False)
    return networks


def environment() -> dict[str, Any]:
    """What the numbers depend on."""
    facts = _cpu_facts()
    packages = {name: version(name) for name in ("torch", "diffusers")}
    name = facts.get("model name") or platform.processor() or platform.machine()
    flags = facts.get("flags", "").split()
    features = [feature for feature in CPU_FEATURES if feature in flags]
    return {"cpu": name, "cores": os.cpu_count(), "features": features, "threads": torch.get_num_threads(), **packages}


def environment_line() -> str:
    """The same as a line of text."""
    facts = environment()
    features = ", ".join(facts["features"]) or "no vector extension known"
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
