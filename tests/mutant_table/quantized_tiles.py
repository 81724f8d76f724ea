"""Bugs of ``kernels/quantized_tiles.py``."""

MUTANTS = [
    (
        "quantised: scale and minimum swapped",
        'planes.get("m", planes.get("dmin"))',
        'planes.get("d") if planes.keys() & {"m", "dmin"} else None',
        "tests/kernels/test_dequantize.py",
    ),
    (
        "quantised: minimum taken from the scale's bits",
        "num_blocks, 4, LAYOUT, BLOCK_K)",
        "num_blocks, 0, LAYOUT, BLOCK_K)",
        "tests/kernels/test_dequantize.py",
    ),
    (
        "quantised: high bits one place low",
        "codes |= high << LAYOUT.low_bits",
        "codes |= high << (LAYOUT.low_bits - 1)",
        "tests/kernels/test_dequantize.py",
    ),
    (
        "quantised: a code's neighbours in the wrong order",
        "shift = BITS * (i // 2) + 16 * (i % 2)",
        "shift = BITS * i",
        "tests/kernels/test_dequantize.py",
    ),
    (
        "matmul: gate and up swapped",
        "column + (lane % 2) * (rows // 2)",
        "column + (1 - lane % 2) * (rows // 2)",
        "tests/kernels/test_quantized_matmul.py",
    ),
    (
        "matmul: residual dropped",
        "total += tl.load(output.residual + offs, mask=mask, other=0.0).to(tl.float32)",
        "total += 0.0",
        "tests/kernels/test_quantized_matmul.py",
    ),
    (
        "matmul: row offset of the output in 32 bits",
        "tl.store(output.out + offs_m[:, None] * rows",
        "tl.store(output.out + offs_m.to(tl.int32)[:, None] * rows",
        "tests/kernels/test_quantized_matmul.py::test_output_beyond_int32",
    ),
    (
        "quantised: row offset of the codes in 32 bits",
        "plane_ptr + offs_n[:, None] * words_per_row",
        "plane_ptr + offs_n.to(tl.int32)[:, None] * words_per_row",
        "tests/kernels/test_embedding.py::test_rows_beyond_int32",
    ),
]
