"""How fast host memory reaches a GPU: ``python benchmarks/upload.py [--out FILE.csv]``.

link        a pinned buffer, copied repeatedly: the rate of the link
pageable    ordinary memory, by torch
upload      ordinary memory, by Device.upload through its two pinned buffers
mapped      a memory-mapped file in the page cache, by Device.upload, as loading does
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from rooflama.loaders.device import Device, open_device

NUM_BYTES = 2 << 30
REPEATS = 5


def seconds(work: Callable[[], None]) -> float:
    """The median of a few runs, after one that is not counted."""
    times = []
    for _ in range(REPEATS + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[REPEATS // 2]


def ways(device: Device, folder: Path) -> dict[str, Callable[[], None]]:
    """Name -> a copy of NUM_BYTES to the device."""
    ordinary = torch.randint(0, 256, (NUM_BYTES,), dtype=torch.uint8)
    pinned = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
    target = device.allocate((NUM_BYTES,), torch.uint8, label="target")
    ordinary.numpy().tofile(folder / "bytes")
    mapped = np.memmap(folder / "bytes", dtype=np.uint8, mode="r")

    def link() -> None:
        for start in range(0, NUM_BYTES, pinned.numel()):
            target.tensor[start : start + pinned.numel()].copy_(pinned, non_blocking=True)

    def pageable() -> None:
        target.tensor.copy_(ordinary)

    return {
        "link": link,
        "pageable": pageable,
        "upload": lambda: device.copy_in(target, ordinary),
        "mapped": lambda: device.copy_in(target, mapped),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "upload.csv")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("measuring needs a CUDA GPU")

    from timing import provenance, write_rows

    rows = []
    with tempfile.TemporaryDirectory() as folder, open_device("cuda") as device:
        for name, work in ways(device, Path(folder)).items():
            speed = NUM_BYTES / seconds(work) / 1e9
            rows.append({"way": name, "gigabytes_per_s": f"{speed:.1f}", **provenance()})
            print(f"{name:10} {speed:6.1f} GB/s", flush=True)
    write_rows(arguments.out, rows)


if __name__ == "__main__":
    main()
