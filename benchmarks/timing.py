"""How long a call takes on a GPU, without host time and without a warm cache."""

from __future__ import annotations

import csv
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
import triton


@dataclass(frozen=True)
class Measured:
    """Microseconds of one call: percentiles over replays."""

    p20: float
    p50: float
    p80: float


def measure(calls: Sequence[Callable[[], object]], *, replays: int = 20) -> Measured:
    """Time calls that do the same work on different buffers, captured together in one CUDA graph.

    All buffers together should be several times the L2 cache, so that no call finds its data there.
    """
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    times.sort()
    return Measured(*(times[int(share * (len(times) - 1))] for share in (0.2, 0.5, 0.8)))


def by_kernel(run: Callable[[], object], repeats: int) -> dict[str, tuple[float, float]]:
    """Of each kernel that ``run`` starts: launches and microseconds on the GPU, per run, longest first."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(repeats):
            run()
        torch.cuda.synchronize()
    found = {
        one.key: (one.count / repeats, one.self_device_time_total / repeats)
        for one in profiler.key_averages()
        if one.self_device_time_total
    }
    return dict(sorted(found.items(), key=lambda item: -item[1][1]))


def ceilings() -> tuple[float, float]:
    """The rates that this GPU reaches: (bytes read and written per second, bf16 FLOP/s of 8192^3).

    The first is the best of three passes over 2 GiB: the driver's copy, a kernel's copy, and one that only reads.
    """
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    passes = [
        (2, measure([lambda: target.copy_(source)])),
        (2, measure([lambda: torch.neg(source, out=target)])),
        (1, measure([lambda: source.sum()])),
    ]
    memory_rate = max(times * source.nbytes / time.p50 for times, time in passes)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = measure([lambda: a @ b])
    return memory_rate * 1e6, 2 * 8192**3 / product.p50 * 1e6


def provenance() -> dict[str, str]:
    """GPU, versions, commit and date of a measurement; "-dirty" marks uncommitted changes."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": git.stdout.strip() or "unknown",
        "date": date.today().isoformat(),
    }


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows that ``write_rows`` wrote; none if there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write rows as CSV. All have the same columns."""
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
