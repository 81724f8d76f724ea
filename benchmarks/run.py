"""Measure kernels against the roofline and their peers: ``python benchmarks/run.py [KERNEL ...] [--only REGEX]``.

Needs a CUDA GPU. Writes one row per case and implementation: percentiles of its time, and its fraction of the roofline.
The roofline is the longer of bytes over memory rate and operations over bf16 matrix rate, both measured in the same
run and stated in each row.

A run of everything writes the file anew. A run of named kernels, or of some of their cases, replaces the rows of the
cases it measures and keeps the others. Each row names its commit and date.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

import torch

from registry import MEASURED
from timing import ceilings, measure, provenance, read_rows, write_rows

Row = Mapping[str, str]


def by_case(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    cases: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        cases.setdefault((row["kernel"], row["case"]), []).append(row)
    return cases


def replaced(rows: Sequence[Row], measured: Sequence[Row]) -> list[Row]:
    """``rows``, with ``measured`` instead of the rows of the same cases; new cases come last."""
    return list(chain(*{**by_case(rows), **by_case(measured)}.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kernels", nargs="*", help=f"of {', '.join(MEASURED)}; all by default")
    parser.add_argument("--only", default="", metavar="REGEX", help="cases whose label matches")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "kernels.csv")
    arguments = parser.parse_args()
    if unknown := set(arguments.kernels) - set(MEASURED):
        parser.error(f"unknown kernels {sorted(unknown)}; there are {', '.join(MEASURED)}")
    if not torch.cuda.is_available():
        sys.exit("a benchmark needs a CUDA GPU; the interpreter's time says nothing")

    origin = provenance()
    memory_rate, matrix_rate = ceilings()
    print(
        f"{origin['gpu']}: memory {memory_rate / 1e12:.2f} TB/s, bf16 matrix product {matrix_rate / 1e12:.0f} TFLOP/s"
    )
    rates = {"memory_tb_per_s": f"{memory_rate / 1e12:.3f}", "matrix_tflop_per_s": f"{matrix_rate / 1e12:.0f}"}
    kept = read_rows(arguments.out) if arguments.kernels or arguments.only else []
    rows: list[Row] = []
    for kernel in arguments.kernels or MEASURED:
        for case in (case for case in MEASURED[kernel]() if re.search(arguments.only, case.label)):
            floor_us = 1e6 * max(case.num_bytes / memory_rate, case.num_flops / matrix_rate)
            for name, calls in case.implementations.items():
                time = measure(calls)
                row = {
                    "kernel": kernel,
                    "case": case.label,
                    "implementation": name,
                    "us_p20": f"{time.p20:.2f}",
                    "us_p50": f"{time.p50:.2f}",
                    "us_p80": f"{time.p80:.2f}",
                    "gb_per_s": f"{case.num_bytes / time.p50 / 1e3:.0f}",
                    "tflop_per_s": f"{case.num_flops / time.p50 / 1e6:.1f}",
                    "of_roofline": f"{floor_us / time.p50:.3f}",
                    **rates,
                    **origin,
                }
                rows.append(row)
                print(
                    f"{kernel:18s} {case.label:40s} {name:12s} {time.p50:9.1f} us "
                    f"{row['gb_per_s']:>6s} GB/s {row['tflop_per_s']:>6s} TFLOP/s {float(row['of_roofline']):6.1%}",
                    flush=True,
                )
            # After each case, so that a run cut short leaves what it measured.
            write_rows(arguments.out, replaced(kept, rows))


if __name__ == "__main__":
    main()
