"""Launch configurations: one table for every kernel and GPU.

``TABLE[kernel][gpu]`` lists rows; the first row whose limits all hold gives the configuration. A limit is the largest
value that the row serves: ``Row(dict(BLOCK_N=64), head_dim=128)`` serves head_dim 1 to 128. The last row has no limits,
or limits that the kernel's checks guarantee.

To serve a new GPU, add a key to the kernels that were tuned on it: ``python benchmarks/tune.py KERNEL`` times the
candidates there and prints rows in this form. A GPU without a key of its own is served by its family (``gpu_names``).
No configuration changes what a kernel computes; some change the order of its sums, and so its bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from .backend import INTERPRETED
from .gpu import capability, gpu_of

WHOLE = 4096  # BLOCK_K that holds a whole row of most models: the launchers cut it to the row's own power of two


class Row(NamedTuple):
    """A configuration, and the largest values of a call's facts that it serves."""

    configuration: dict[str, int]
    limits: dict[str, int]


def row(limits: dict[str, int] | None = None, /, **configuration: int) -> Row:
    return Row(configuration, limits or {})


TABLE: dict[str, dict[str, list[Row]]] = {
    # Facts: itemsize (bytes per element of q), head_dim. Never the length: a row's bits depend on BLOCK_N.
    "attention_decode": {
        "interpreter": [row(BLOCK_N=32, num_warps=4, num_stages=1)],
        "sm90": [
            row({"itemsize": 2, "head_dim": 128}, BLOCK_N=64, num_warps=4, num_stages=5),
            row({"itemsize": 2}, BLOCK_N=32, num_warps=4, num_stages=5),
            row({"head_dim": 128}, BLOCK_N=16, num_warps=4, num_stages=3),
            row(BLOCK_N=16, num_warps=4, num_stages=2),
        ],
        "sm80": [
            row({"itemsize": 2, "head_dim": 128}, BLOCK_N=64, num_warps=4, num_stages=5),
            row({"itemsize": 2}, BLOCK_N=32, num_warps=4, num_stages=5),
            row({"head_dim": 128}, BLOCK_N=16, num_warps=4, num_stages=3),
            row(BLOCK_N=16, num_warps=4, num_stages=2),
        ],
        "hip": [
            row({"itemsize": 2, "head_dim": 128}, BLOCK_N=64, num_warps=4, num_stages=1),
            row({"itemsize": 2}, BLOCK_N=32, num_warps=4, num_stages=1),
            row({"head_dim": 128}, BLOCK_N=32, num_warps=4, num_stages=1),
            row(BLOCK_N=16, num_warps=4, num_stages=1),
        ],
    },
    # MIN_SPLIT in tokens, a multiple of every BLOCK_N of attention_decode; MAX_SPLITS a power of two.
    # Facts: num_kv_heads.
    "attention_splits": {
        "interpreter": [row(MIN_SPLIT=64, MAX_SPLITS=4)],
        "sm90": [
            row({"num_kv_heads": 4}, MIN_SPLIT=256, MAX_SPLITS=32),
            row({"num_kv_heads": 8}, MIN_SPLIT=256, MAX_SPLITS=16),  # 8 x 16 programs: one wave of a chip of 132
            row(MIN_SPLIT=256, MAX_SPLITS=32),
        ],
        "sm80": [row(MIN_SPLIT=256, MAX_SPLITS=32)],
        "hip": [row(MIN_SPLIT=256, MAX_SPLITS=32)],
    },
    # Facts: itemsize (bytes per element of q), head_dim.
    "attention_prefill": {
        "interpreter": [row(BLOCK_M=64, BLOCK_N=32, num_warps=4, num_stages=1)],
        "sm90": [
            row({"itemsize": 2, "head_dim": 128}, BLOCK_M=128, BLOCK_N=64, num_warps=8, num_stages=5),
            row({"itemsize": 2}, BLOCK_M=64, BLOCK_N=32, num_warps=8, num_stages=2),
            row({"head_dim": 64}, BLOCK_M=32, BLOCK_N=16, num_warps=4, num_stages=2),
            row(BLOCK_M=16, BLOCK_N=16, num_warps=4, num_stages=2),
        ],
        "sm80": [
            row({"itemsize": 2, "head_dim": 64}, BLOCK_M=128, BLOCK_N=64, num_warps=8, num_stages=5),
            row({"itemsize": 2, "head_dim": 128}, BLOCK_M=128, BLOCK_N=32, num_warps=8, num_stages=5),
            row({"itemsize": 2}, BLOCK_M=64, BLOCK_N=16, num_warps=8, num_stages=3),
            row({"head_dim": 64}, BLOCK_M=32, BLOCK_N=16, num_warps=4, num_stages=2),
            row(BLOCK_M=16, BLOCK_N=16, num_warps=4, num_stages=2),
        ],
        "hip": [
            row({"itemsize": 2, "head_dim": 64}, BLOCK_M=128, BLOCK_N=64, num_warps=4, num_stages=1),
            row({"itemsize": 2, "head_dim": 128}, BLOCK_M=128, BLOCK_N=32, num_warps=4, num_stages=1),
            row({"itemsize": 2}, BLOCK_M=64, BLOCK_N=16, num_warps=4, num_stages=1),
            row({"head_dim": 128}, BLOCK_M=32, BLOCK_N=32, num_warps=4, num_stages=1),
            row(BLOCK_M=16, BLOCK_N=16, num_warps=4, num_stages=1),
        ],
    },
    # Prefill attention by attention_prefill_hopper.py, on the chips and for the pages that it serves; STAGES=0 leaves
    # them to the kernel above. Facts: head_dim. Measured on an H200.
    "attention_prefill_hopper": {
        "any": [
            row({"head_dim": 64}, BLOCK_N=128, STAGES=3, CONSUMERS=3),
            row(BLOCK_N=128, STAGES=2, CONSUMERS=2),
        ],
    },
    # The most tokens that each regime of quantized_matmul serves, if it can. Facts: is_float (of the weight).
    "quantized_matmul": {
        "any": [
            row({"is_float": 0}, fixed_point=2, wgmma=64, gemv=8, dot=64),
            row(fixed_point=0, wgmma=0, gemv=8, dot=8),
        ],
        "hip": [
            row({"is_float": 0}, fixed_point=0, wgmma=0, gemv=8, dot=64),
            row(fixed_point=0, wgmma=0, gemv=8, dot=8),
        ],
    },
    # Facts: columns, rows, tokens (1 or 2), bits per code, normed; of a pair the rows of both and the most bits. From
    # fixed_point_tiles.csv, H100. Whole rows in one tile request every byte of the weight at once. Shorter tiles are
    # for long rows, and for a number of rows that would leave the chip half empty at the end.
    "fixed_point": {
        "any": [
            row({"columns": 4096, "rows": 4096, "tokens": 1, "bits": 5}, BLOCK_N=16, BLOCK_K=WHOLE, num_warps=4),
            row({"columns": 4096, "rows": 4096}, BLOCK_N=16, BLOCK_K=WHOLE, num_warps=8),
            row({"columns": 4096, "rows": 16384, "tokens": 1, "bits": 4}, BLOCK_N=8, BLOCK_K=1024, num_warps=4),
            row({"columns": 4096, "rows": 16384, "tokens": 1, "bits": 5}, BLOCK_N=16, BLOCK_K=1024, num_warps=4),
            row({"columns": 4096, "rows": 16384, "tokens": 1}, BLOCK_N=8, BLOCK_K=1024, num_warps=2),
            row({"columns": 4096, "tokens": 1}, BLOCK_N=16, BLOCK_K=WHOLE, num_warps=8),
            row({"columns": 4096, "bits": 7}, BLOCK_N=16, BLOCK_K=1024, num_warps=4),
            row({"columns": 4096}, BLOCK_N=8, BLOCK_K=1024, num_warps=4),
            row({"tokens": 1, "bits": 5}, BLOCK_N=16, BLOCK_K=2048, num_warps=8),
            row({"tokens": 1, "bits": 6, "rows": 4096}, BLOCK_N=8, BLOCK_K=2048, num_warps=4),
            row({"tokens": 1}, BLOCK_N=16, BLOCK_K=2048, num_warps=8),
            row({"bits": 5, "normed": 0}, BLOCK_N=16, BLOCK_K=2048, num_warps=4),
            row(BLOCK_N=8, BLOCK_K=2048, num_warps=8),
        ],
    },
    # Facts: itemsize (of x), tokens, rows, columns, bits per code or number. From gemv_tiles.csv, H100. BLOCK_K gives
    # each lane 16 bytes of codes, and never fewer than eight columns: a sum across lanes would round differently in
    # each, since every lane contracts its own product into a fused multiply-add.
    "gemv": {
        "any": [
            row({"itemsize": 2, "tokens": 2, "rows": 2048, "bits": 4}, BLOCK_N=4, BLOCK_K=1024, num_warps=4),
            row({"itemsize": 2, "tokens": 2, "bits": 4}, BLOCK_N=8, BLOCK_K=1024, num_warps=4),
            row({"itemsize": 2, "tokens": 2, "rows": 2048, "bits": 8}, BLOCK_N=4, BLOCK_K=512, num_warps=4),
            row({"itemsize": 2, "tokens": 2, "bits": 8}, BLOCK_N=8, BLOCK_K=512, num_warps=4),
            row({"itemsize": 2, "tokens": 2, "rows": 2048, "columns": 1023}, BLOCK_N=4, BLOCK_K=256, num_warps=4),
            row({"itemsize": 2, "tokens": 2, "columns": 1023}, BLOCK_N=8, BLOCK_K=256, num_warps=4),
            row({"itemsize": 2, "tokens": 2, "rows": 65536, "bits": 16}, BLOCK_N=4, BLOCK_K=1024, num_warps=4),
            row({"itemsize": 2, "tokens": 2, "bits": 16}, BLOCK_N=8, BLOCK_K=1024, num_warps=4),
            row({"itemsize": 2, "tokens": 2, "rows": 2048}, BLOCK_N=4, BLOCK_K=256, num_warps=4),
            row({"itemsize": 2, "tokens": 2}, BLOCK_N=8, BLOCK_K=256, num_warps=4),
            row({"bits": 4}, BLOCK_N=4, BLOCK_K=1024, num_warps=4),
            row({"bits": 8}, BLOCK_N=4, BLOCK_K=512, num_warps=4),
            row(BLOCK_N=4, BLOCK_K=256, num_warps=4),
        ],
    },
    # Facts: rows, columns, tokens (padded; twice as many if x is two numbers), bits per code, terms (numbers per code).
    # Each of SPLITS parts of the columns is summed by programs of its own: the fewer the rows, the more of them fill
    # the chip. SPLITS never depends on tokens, else bits would with batch_invariant; the rest changes no bit
    # (quantized_wgmma.py). FLIGHT groups run at a time. With 128 REGISTERS per thread two programs fit a
    # multiprocessor. SPLITS and ROWS are from wgmma_tiles.csv, Q4_K on an H200, and within 7% of the fastest for every
    # number of tokens.
    "wgmma": {
        "any": [
            row({"tokens": 64, "bits": 4, "terms": 1, "rows": 4096}, SPLITS=8, ROWS=128, FLIGHT=1, REGISTERS=128),
            row({"tokens": 64, "bits": 4, "terms": 1, "rows": 16384}, SPLITS=4, ROWS=128, FLIGHT=1, REGISTERS=128),
            row({"tokens": 64, "bits": 4, "terms": 1}, SPLITS=1, ROWS=128, FLIGHT=1, REGISTERS=128),
            row({"tokens": 64, "rows": 4096}, SPLITS=8, ROWS=128, FLIGHT=1, REGISTERS=168),
            row({"tokens": 64, "rows": 16384}, SPLITS=4, ROWS=128, FLIGHT=1, REGISTERS=168),
            row({"tokens": 64}, SPLITS=1, ROWS=128, FLIGHT=1, REGISTERS=168),
            row({"rows": 4096}, SPLITS=8, ROWS=128, FLIGHT=1, REGISTERS=255),
            row({"rows": 16384}, SPLITS=4, ROWS=128, FLIGHT=1, REGISTERS=255),
            row(SPLITS=1, ROWS=128, FLIGHT=1, REGISTERS=255),
        ],
    },
    # Facts: itemsize (of x).
    "dot": {
        "any": [row({"itemsize": 2}, BLOCK_N=32, BLOCK_K=128, num_warps=4), row(BLOCK_N=32, BLOCK_K=64, num_warps=4)],
    },
    # Facts: ranks. Bytes of one rank's addend: up to ONE_SHOT_BYTES the ranks exchange addends in one launch, up to
    # GATHER_BYTES they gather and then sum them, beyond that the vendor's library reduces them. Two ranks send as many
    # bytes to gather as to reduce.
    "all_reduce": {
        "any": [
            row({"ranks": 2}, ONE_SHOT_BYTES=64 << 20, GATHER_BYTES=1 << 40),
            row({"ranks": 4}, ONE_SHOT_BYTES=512 << 10, GATHER_BYTES=1 << 20),
            row(ONE_SHOT_BYTES=256 << 10, GATHER_BYTES=1 << 20),
        ],
    },
    # Dequantised rows that are alive at a time.
    "matmul": {"any": [row(WORKSPACE_BYTES=128 << 20)]},
    "dequantize": {"any": [row(BLOCK_N=8, BLOCK_K=512, num_warps=4)]},
    "embedding": {"any": [row(BLOCK_K=1024, num_warps=4)]},
    "gated": {"any": [row(BLOCK=1024, num_warps=4)]},
    # Facts: hidden. One program holds a row.
    "norm": {
        "any": [
            row({"hidden": 512}, num_warps=1),
            row({"hidden": 1024}, num_warps=2),
            row({"hidden": 2048}, num_warps=4),
            row({"hidden": 4096}, num_warps=8),
            row(num_warps=16),
        ],
    },
}


def gpu_names(device: torch.device | None) -> tuple[str, ...]:
    """The keys of ``TABLE`` that serve a device, best first: its own, its family's, "any". None is for plans: sm90.

    Families: "sm90" for Nvidia's data-centre chips from Hopper on, "sm80" for other Nvidia, "hip" for AMD.
    """
    if device is None:
        return "sm90", "any"
    gpu = gpu_of(device)
    if gpu is None:
        return "interpreter", "any"
    if gpu.backend == "hip":
        return str(gpu.arch), "hip", "any"
    return f"sm{gpu.arch}", "sm90" if int(gpu.arch) // 10 in (9, 10) else "sm80", "any"


_overridden: dict[str, dict[str, int]] = {}
version = 0  # changes with every override: launches bound before are bound anew


def configuration(kernel: str, device: torch.device | None, **facts: int) -> dict[str, int]:
    """How to launch ``kernel`` on ``device`` for a call of these facts."""
    if kernel in _overridden:
        return _overridden[kernel]
    by_gpu = TABLE[kernel]
    rows = next(by_gpu[name] for name in gpu_names(device) if name in by_gpu)
    return next(r.configuration for r in rows if all(facts[name] <= most for name, most in r.limits.items()))


@contextmanager
def override(kernel: str, **chosen: int) -> Iterator[None]:
    """Launch ``kernel`` with this configuration, not the table's, inside the ``with`` block. For tuning and tests.

    Holds for the whole process, not for one thread.
    """
    global version
    before = _overridden.get(kernel)
    _overridden[kernel] = chosen
    version += 1
    try:
        yield
    finally:
        version += 1
        if before is None:
            del _overridden[kernel]
        else:
            _overridden[kernel] = before


def overlaps(device: torch.device) -> bool:
    """Whether a kernel on this device may start before the one in front of it has ended.

    This is programmatic dependent launch, from Hopper on. Such a kernel calls ``gdc_wait`` before it reads or writes
    what another kernel writes or reads.
    """
    return not INTERPRETED and capability(device) >= (9, 0)
