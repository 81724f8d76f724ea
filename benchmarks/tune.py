"""The fastest launch configurations: ``python benchmarks/tune.py KERNEL [--types Q4_K ...] --out FILE.csv``.

KERNEL is a name of ``kernels/launch.py``. Every candidate is timed for every problem, through the public function with
the table overridden, in a CUDA graph over buffers that exceed the L2 cache. Candidates are compiled first, in one
process per core. FILE.csv gets all times, with GPU, versions and commit. The fastest candidate of each problem is
printed as a row of the table. The reader decides which rows to join, and under which limits.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import torch

import cases
from registry import MEASURED
from rooflama.kernels import LAYOUTS, quantized_matmul
from rooflama.kernels.launch import override
from rooflama.kernels.quantized_wgmma_codes import num_terms
from timing import ceilings, measure, provenance, write_rows

SHAPES = [(6144, 4096, True), (4096, 4096, False), (28672, 4096, True), (4096, 14336, False), (128256, 4096, True)]
PRODUCTS = {  # regime -> tokens per call
    "fixed_point": (1, 2),
    "wgmma": (8, 64),
    "gemv": (1,),
    "dot": (16, 64),
    "matmul": (512,),
}

Configuration = dict[str, int]


@dataclass(frozen=True)
class Problem:
    """Calls that do the same work on different buffers, their facts for the table, and the bytes that one moves."""

    label: str
    facts: dict[str, int]
    calls: cases.Calls
    num_bytes: int


def products(regime: str, types: list[str], tokens: list[int]) -> Iterator[Problem]:
    """The quantised product, held to one regime."""
    for num_tokens, ggml_type, (rows, columns, normed) in itertools.product(tokens, types, SHAPES):
        layout = LAYOUTS[ggml_type]
        num_bytes = cases.random_weight(ggml_type, rows, columns).nbytes
        weights = [cases.random_weight(ggml_type, rows, columns) for _ in range(cases.copies(num_bytes))]
        x = torch.randn(num_tokens, columns, device=cases.CUDA, dtype=cases.BF16)
        norm_weight = torch.ones(columns, device=cases.CUDA) if normed else None
        bits = layout.low_bits + layout.high_bits or 8 * weights[0].planes[0].element_size()
        facts = {"rows": rows, "columns": columns, "tokens": num_tokens, "bits": bits, "normed": normed, "itemsize": 2}
        facts |= {} if layout.is_float else {"terms": num_terms(layout)}
        calls = [
            partial(_in_regime, regime, x, weight, norm_weight=norm_weight, eps=1e-5, resident=True)
            for weight in weights
        ]
        yield Problem(f"{ggml_type} [{rows}, {columns}] tokens={num_tokens}", facts, calls, num_bytes)


def _in_regime(regime: str, *args: object, **kwargs: object) -> torch.Tensor:
    most = {name: 1 << 30 if name == regime else 0 for name in PRODUCTS}
    with override("quantized_matmul", **most):
        return quantized_matmul(*args, **kwargs)


def registered(kernel: str, prefix: str) -> Iterator[Problem]:
    """The cases of one kernel in ``registry`` whose label begins with ``prefix``."""
    for case in MEASURED[kernel]():
        if case.label.startswith(prefix):
            yield Problem(case.label, case.facts, case.implementations["rooflama"], case.num_bytes)


def _grid(**choices: tuple[int, ...]) -> Iterator[Configuration]:
    for values in itertools.product(*choices.values()):
        yield dict(zip(choices, values, strict=True))


def product_tiles(facts: dict[str, int]) -> Iterator[Configuration]:
    """Tiles in which a thread holds 32 to 512 weights, in at most 64 registers."""
    whole = 1 << (facts["columns"] - 1).bit_length()
    for tile in _grid(BLOCK_N=(4, 8, 16), BLOCK_K=tuple({1024, 2048, min(whole, 4096)}), num_warps=(2, 4, 8)):
        weights = tile["BLOCK_N"] * tile["BLOCK_K"] // (32 * tile["num_warps"])
        if 32 <= weights <= 512 and weights * min(facts["bits"], 16) <= 64 * 32:
            yield tile


CANDIDATES: dict[str, Callable[[dict[str, int]], Iterator[Configuration]]] = {
    "fixed_point": product_tiles,
    "gemv": product_tiles,
    "wgmma": lambda facts: _grid(
        SPLITS=(1, 2, 4, 8), ROWS=(64, 128), FLIGHT=(1, 2), REGISTERS=(80, 168) if facts["tokens"] <= 16 else (128, 168)
    ),
    "dot": lambda facts: _grid(BLOCK_N=(32, 64, 128), BLOCK_K=(64, 128, 256), num_warps=(4, 8)),
    "matmul": lambda facts: _grid(WORKSPACE_BYTES=tuple(n << 20 for n in (16, 32, 64, 128, 256))),
    "attention_decode": lambda facts: _grid(BLOCK_N=(16, 32, 64, 128), num_warps=(2, 4, 8), num_stages=(1, 2, 3, 5)),
    "attention_splits": lambda facts: _grid(MIN_SPLIT=(128, 256, 512, 1024), MAX_SPLITS=(16, 32, 64, 128)),
    "attention_prefill": lambda facts: _grid(
        BLOCK_M=(64, 128), BLOCK_N=(32, 64, 128), num_warps=(4, 8), num_stages=(1, 2, 3, 5)
    ),
    "attention_prefill_hopper": lambda facts: _grid(BLOCK_N=(64, 128), STAGES=(2, 3), CONSUMERS=(2, 3)),
    "dequantize": lambda facts: _grid(BLOCK_N=(4, 8, 16, 32), BLOCK_K=(256, 512, 1024), num_warps=(4, 8)),
    "embedding": lambda facts: _grid(BLOCK_K=(256, 512, 1024, 2048), num_warps=(2, 4, 8)),
    "gated": lambda facts: _grid(BLOCK=(256, 512, 1024, 2048, 4096), num_warps=(2, 4, 8)),
    "norm": lambda facts: _grid(num_warps=(1, 2, 4, 8, 16)),
}

REGISTERED = {
    "attention_decode": ("attention_decode", ""),
    "attention_splits": ("attention_decode", ""),
    "attention_prefill": ("attention_prefill", ""),
    "attention_prefill_hopper": ("attention_prefill", ""),
    "dequantize": ("dequantize", ""),
    "embedding": ("embedding", ""),
    "gated": ("mlp", "swiglu"),
    "norm": ("norm", "rms_norm"),
}


def problems(kernel: str, types: list[str], tokens: list[int]) -> Iterator[Problem]:
    return products(kernel, types, tokens) if kernel in PRODUCTS else registered(*REGISTERED[kernel])


def compile_one(kernel: str, types: list[str], tokens: list[int], number: int) -> list[str]:
    """The errors of the candidates of one problem."""
    troubles = []
    with mock.patch.object(cases, "copies", return_value=1):
        problem = next(itertools.islice(problems(kernel, types, tokens), number, None))
    for configuration in CANDIDATES[kernel](problem.facts):
        try:
            with override(kernel, **configuration):
                problem.calls[0]()
                torch.cuda.synchronize()
        except Exception as error:  # a candidate that does not compile is a finding, not an end
            troubles.append(f"{problem.label} {configuration}: {type(error).__name__}: {str(error).splitlines()[0]}")
    return troubles


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernel", choices=CANDIDATES)
    quantised = [name for name in LAYOUTS if not LAYOUTS[name].is_float]
    parser.add_argument("--types", nargs="+", choices=LAYOUTS, default=quantised, help="of the weights of products")
    parser.add_argument("--tokens", nargs="+", type=int, help="per product")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    asked = (options.kernel, options.types, options.tokens or list(PRODUCTS.get(options.kernel, ())))

    with mock.patch.object(cases, "copies", return_value=1):
        count = sum(1 for _ in problems(*asked))
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        for troubles in pool.map(partial(compile_one, *asked), range(count)):
            print(*troubles, sep="\n", end="\n" if troubles else "", file=sys.stderr)

    (rate, _), where = ceilings(), provenance()
    torch.cuda.empty_cache()
    table: list[dict[str, object]] = []
    for problem in problems(*asked):
        timed: list[tuple[float, Configuration]] = []
        for configuration in CANDIDATES[options.kernel](problem.facts):
            try:
                with override(options.kernel, **configuration):
                    timed.append((measure(problem.calls * 2, replays=5).p50, configuration))
            except Exception as error:
                print(f"{problem.label} {configuration}: {type(error).__name__}", file=sys.stderr)
        for microseconds, configuration in timed:
            share = problem.num_bytes / microseconds * 1e6 / rate
            row = {"kernel": options.kernel, "problem": problem.label, **configuration}
            table.append(row | {"us": f"{microseconds:.2f}", "of_copy": f"{share:.3f}", **where})
        if timed:
            microseconds, configuration = min(timed, key=lambda pair: pair[0])
            words = ", ".join(f"{name}={value}" for name, value in configuration.items())
            print(f"row({problem.facts}, {words}),  # {problem.label}: {microseconds:.1f} us", flush=True)
            write_rows(options.out, table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
