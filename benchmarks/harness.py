"""What the benchmarks share: rounds in which contenders take turns, ratios within a round, memory, a table and JSON.

On a CPU one thread is measured by the processor time of the process, which other programs on the machine disturb least;
with several threads, and on a GPU, by the time that passes.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch

Job = Callable[[], object]
"""Does the work that is measured, once."""

MIB = 2**20


@dataclass(frozen=True)
class Contender:
    """One way of doing the work."""

    name: str
    job: Job
    flops: float = 0.0
    """Operations that the job needs by count, 0 where its share of the peak is of no interest."""


@dataclass
class Row:
    """What was measured of one contender."""

    name: str
    seconds: float
    relative: float
    """Median over the rounds of the reference's seconds divided by the contender's: above 1 is faster."""
    peak_mib: float
    of_peak: float | None = None
    """Fraction of the rate of plain matrix products in this process."""
    rounds: list[float] = field(default_factory=list)


class Measure:
    """Times jobs on one device.

    Args:
        device: where the jobs compute.
        threads: on a CPU; one thread is timed by processor time.
    """

    def __init__(self, device: torch.device, threads: int = 1) -> None:
        self.device, self.threads = device, threads
        if device.type == "cpu":
            torch.set_num_threads(threads)

    @property
    def clock(self) -> str:
        """What the seconds are."""
        if self.device.type == "cuda":
            return "CUDA events"
        return "processor time of one thread" if self.threads == 1 else f"time that passed, {self.threads} threads"

    def seconds(self, job: Job, repeats: int = 1) -> float:
        """Seconds of one of ``repeats`` runs."""
        if self.device.type == "cuda":
            return self._cuda_seconds(job, repeats)
        now = time.process_time if self.threads == 1 else time.perf_counter
        started = now()
        for _ in range(repeats):
            job()
        return (now() - started) / repeats

    def _cuda_seconds(self, job: Job, repeats: int) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(repeats):
            job()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / repeats

    def peak_mib(self, job: Job) -> float:
        """MiB that a run takes beyond what was in use before it: allocations on a GPU, resident memory on Linux."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            job()
            torch.cuda.synchronize()
            return (torch.cuda.max_memory_allocated() - before) / MIB
        _return_free_memory()
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
        before_kib = _status("VmRSS")
        job()
        return max(0, _status("VmHWM") - before_kib) / 1024

    def matmul_rate(self, dtype: torch.dtype, size: int | None = None) -> float:
        """Operations per second of square matrix products, the best of several."""
        size = size or (8192 if self.device.type == "cuda" else 1024)
        a, b = (torch.randn(size, size, device=self.device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        job = lambda: torch.mm(a, b, out=out)  # noqa: E731
        job()
        return 2 * size**3 / min(self.seconds(job, 3) for _ in range(7))


def _return_free_memory() -> None:
    """Give freed memory back to the system, so that it is not taken for memory in use."""
    ctypes.CDLL(None).malloc_trim(0)


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1])


def compare(
    contenders: Sequence[Contender], measure: Measure, *, rounds: int, peak: float | None = None, memory: bool = True
) -> list[Row]:
    """Let the contenders take turns; the first one is the reference of all ratios.

    Args:
        rounds: turns of each contender after one that warms it up and is not counted.
        peak: operations per second against which ``Contender.flops`` are set.
    """
    peaks = [measure.peak_mib(c.job) if memory else 0.0 for c in contenders]
    for contender in contenders:
        measure.seconds(contender.job)
    # Shorter jobs run several times in a turn, so that a turn is not shorter than the noise.
    repeats = [max(1, min(50, round(0.2 / max(measure.seconds(c.job), 1e-9)))) for c in contenders]
    times: list[list[float]] = [[] for _ in contenders]
    for number in range(rounds):
        order = range(len(contenders)) if number % 2 == 0 else reversed(range(len(contenders)))
        for index in order:
            times[index].append(measure.seconds(contenders[index].job, repeats[index]))
    rows = []
    for contender, mine, mib in zip(contenders, times, peaks, strict=True):
        relative = median(reference / own for reference, own in zip(times[0], mine, strict=True))
        seconds = median(mine)
        of_peak = contender.flops / seconds / peak if peak and contender.flops else None
        rows.append(Row(contender.name, seconds, relative, mib, of_peak, mine))
    return rows


def table(title: str, rows: Sequence[Row], *, tokens: int | None = None, share: str = "of matmul peak") -> str:
    """The rows as text in Markdown; with ``tokens`` of a job, tokens per second, too. ``share`` is of what peak."""
    lines = [f"\n{title}\n", f"| | ms | relative | peak MiB | {share} |" + (" tokens/s |" if tokens else "")]
    lines.append("|---|---|---|---|---|" + ("---|" if tokens else ""))
    for row in rows:
        of_peak = "" if row.of_peak is None else f"{row.of_peak:.0%}"
        cells = f"| {row.name} | {row.seconds * 1e3:.1f} | {row.relative:.2f} | {row.peak_mib:.0f} | {of_peak} |"
        lines.append(cells + (f" {tokens / row.seconds:,.0f} |" if tokens else ""))
    return "\n".join(lines)


def machine(device: torch.device) -> dict[str, Any]:
    """What a reader needs to know of where and with what something was measured."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    packages = ("torch", "megatron-core", "triton", "transformers", "torchscale", "flash-linear-attention")
    return {"device": where, "python": platform.python_version(), **{name: _version(name) for name in packages}}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def arguments(description: str, *, rounds: int = 7) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=rounds, help="turns of each contender (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="on a CPU (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds, for a first look")
    parser.add_argument("--json", type=Path, help="write the measurements to this file, too")
    return parser


def write_json(path: Path | None, measured: dict[str, Any]) -> None:
    """Write to ``path``, if one is given."""
    if path is not None:
        path.write_text(json.dumps(measured, indent=2, default=vars) + "\n")


def need(package: str, command: str) -> None:
    """End the program with a sentence if ``package``, which ``command`` installs, cannot be found."""
    if _version(package) is None:
        sys.exit(f"this benchmark compares with {package}, which is not installed: {command}")
