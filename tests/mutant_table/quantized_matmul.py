"""Bugs of ``kernels/quantized_matmul.py``."""

_SAME_KERNELS = "tests/kernels/test_quantized_wgmma_invariant.py::test_every_number_of_tokens_runs_the_same_kernels"

MUTANTS = [
    (
        "matmul: batch invariance ends with the tokens of wgmma",
        'if (batch_invariant or num_tokens <= most["wgmma"]) and',
        'if num_tokens <= most["wgmma"] and',
        _SAME_KERNELS,
    ),
    (
        "matmul: batch invariance begins after the tokens of fixed_point",
        "if not batch_invariant and _fits_fixed_point(x, weight):",
        "if _fits_fixed_point(x, weight):",
        _SAME_KERNELS,
    ),
    (
        "matmul: batch invariance ends with the tokens of dot",
        'if batch_invariant or num_tokens <= most["dot"]:',
        'if batch_invariant and num_tokens <= 64 or num_tokens <= most["dot"]:',
        "tests/kernels/test_quantized_matmul.py::test_batch_invariance",
    ),
    (
        "dot: columns past the end of x are read",
        " & (offs_k < columns)[None, :],\n            other=0.0,\n        )\n        x = x.to(output",
        ",\n            other=0.0,\n        )\n        x = x.to(output",
        "tests/kernels/test_quantized_matmul.py::test_quantized_matmul_equals_definition",
    ),
    (
        "dot: blocks of tokens and of rows in the wrong order",
        "tile_rows(tl.program_id(0) // num_blocks_m, rows, BLOCK_N, SWIGLU)",
        "tile_rows(tl.program_id(0) % num_blocks_m, rows, BLOCK_N, SWIGLU)",
        "tests/kernels/test_quantized_matmul.py::test_quantized_matmul_equals_definition",
    ),
    (
        "dot: only the last step's columns",
        'tl.dot(x, tl.trans(tile.to(x.dtype)), acc, input_precision="ieee")',
        'tl.dot(x, tl.trans(tile.to(x.dtype)), input_precision="ieee")',
        "tests/kernels/test_quantized_matmul.py::test_quantized_matmul_equals_definition",
    ),
    (
        "dot: every block holds the first tokens",
        "(tl.program_id(0) % num_blocks_m).to(tl.int64) * BLOCK_M",
        "(tl.program_id(0) % num_blocks_m).to(tl.int64) * 0",
        "tests/kernels/test_quantized_matmul.py::test_quantized_matmul_equals_definition",
    ),
    (
        "dot: row offset of x in 32 bits",
        "(tl.program_id(0) % num_blocks_m).to(tl.int64) * BLOCK_M",
        "(tl.program_id(0) % num_blocks_m) * BLOCK_M",
        "tests/kernels/test_quantized_matmul.py::test_offsets_beyond_int32",
    ),
]

DEFINITION_MUTANTS = [
    (
        "matmul: residual added twice by the definition",
        "out += residual.astype(dtype, copy=False)",
        "out += 2 * residual.astype(dtype, copy=False)",
        "tests/kernels/test_quantized_matmul.py::test_definition_equals_torch",
    ),
]
