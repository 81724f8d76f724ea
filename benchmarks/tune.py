"""The fastest tiles for few tokens: ``python benchmarks/tune.py REGIME [--types Q4_K ...] --out FILE.csv``.

REGIME is ``fixed_point`` or ``gemv``. Every tile of a list is tried for each type, shape and number of tokens, through
the public function with the launcher's own choice replaced, in a CUDA graph over weights that do not fit L2. Kernels
are compiled first, in as many processes as there are cores. All tiles are written, with what they were measured on;
what the launcher should choose is for whoever reads them to decide.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import multiprocessing
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from unittest import mock

import torch

from cases import random_weight
from rooflama.kernels import LAYOUTS, quantized_matmul
from timing import ceilings, measure, provenance, write_rows

MODULES = {"fixed_point": "rooflama.kernels.quantized_fixed_point", "gemv": "rooflama.kernels.quantized_gemv"}
SHAPES = [(6144, 4096, True), (4096, 4096, False), (28672, 4096, True), (4096, 14336, False), (128256, 4096, True)]
CACHE_BYTES = 200e6  # weights in turn, several times the L2 cache

Tile = tuple[int, int, int]  # BLOCK_N, BLOCK_K, num_warps


def tiles(columns: int, bits: int) -> Iterator[Tile]:
    """Tiles in which a thread holds 32 to 512 weights, in at most 64 registers."""
    whole = 1 << (columns - 1).bit_length()
    for block_n, block_k, num_warps in itertools.product((4, 8, 16), {1024, 2048, min(whole, 4096)}, (2, 4, 8)):
        weights = block_n * block_k // (32 * num_warps)
        if 32 <= weights <= 512 and weights * min(bits, 16) <= 64 * 32:
            yield block_n, block_k, num_warps


def product(regime: str, x: torch.Tensor, weight, tile: Tile, norm_weight: torch.Tensor | None) -> torch.Tensor:
    module = importlib.import_module(MODULES[regime])
    with mock.patch.object(module, "tile", return_value=tile):
        return quantized_matmul(x, weight, norm_weight=norm_weight, eps=1e-5, resident=True)


def operands(columns: int, tokens: int, normed: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    x = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
    return x, torch.ones(columns, device="cuda") if normed else None


def compile_one(job: tuple[str, str, int, int, bool, Tile]) -> str:
    """What went wrong, or nothing. Rows are no part of what is compiled."""
    regime, ggml_type, columns, tokens, normed, tile = job
    try:
        x, norm_weight = operands(columns, tokens, normed)
        product(regime, x, random_weight(ggml_type, 64, columns), tile, norm_weight)
        torch.cuda.synchronize()
    except Exception as error:  # a tile that does not compile is a finding, not an end
        return f"{ggml_type} {columns} {tile}: {type(error).__name__}: {str(error).splitlines()[0]}"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("regime", choices=MODULES)
    parser.add_argument("--types", nargs="+", choices=LAYOUTS, default=[n for n in LAYOUTS if not LAYOUTS[n].is_float])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    plan = []
    for tokens, ggml_type, (rows, columns, normed) in itertools.product(options.tokens, options.types, SHAPES):
        layout = LAYOUTS[ggml_type]
        plan.append((ggml_type, rows, columns, normed, tokens, list(tiles(columns, layout.low_bits or 16))))
    jobs = {(options.regime, t, columns, tokens, normed, x) for t, _, columns, normed, tokens, xs in plan for x in xs}
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        for trouble in pool.map(compile_one, sorted(jobs), chunksize=4):
            if trouble:
                print(trouble, file=sys.stderr)

    (rate, _), where = ceilings(), provenance()
    torch.cuda.empty_cache()
    table: list[dict[str, object]] = []
    for ggml_type, rows, columns, normed, tokens, choices in plan:
        first = random_weight(ggml_type, rows, columns)
        weights = [first] + [random_weight(ggml_type, rows, columns) for _ in range(int(CACHE_BYTES // first.nbytes))]
        x, norm_weight = operands(columns, tokens, normed)
        best = None
        for tile in choices:
            calls = [partial(product, options.regime, x, weight, tile, norm_weight) for weight in weights * 2]
            try:
                microseconds = measure(calls, replays=5).p50
            except Exception as error:
                print(f"{ggml_type} [{rows}, {columns}] {tile}: {type(error).__name__}", file=sys.stderr)
                continue
            row = {"regime": options.regime, "type": ggml_type, "rows": rows, "columns": columns, "tokens": tokens}
            row |= dict(zip(("BLOCK_N", "BLOCK_K", "num_warps"), tile, strict=True))
            row |= {"us": f"{microseconds:.2f}", "gb_per_s": f"{first.nbytes / microseconds / 1e3:.0f}"}
            row |= {"of_copy": f"{first.nbytes / microseconds * 1e6 / rate:.3f}", **where}
            table.append(row)
            best = row if best is None or microseconds < float(best["us"]) else best
        if best is not None:
            print(*list(best.values())[:11], flush=True)
        write_rows(options.out, table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
