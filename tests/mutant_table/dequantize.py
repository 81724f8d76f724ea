"""Bugs of ``kernels/dequantize.py``."""

MUTANTS = [
    (
        "dequantize: row offset of the output in 32 bits",
        "out_ptr + offs_n[:, None] * columns",
        "out_ptr + offs_n.to(tl.int32)[:, None] * columns",
        "tests/kernels/test_dequantize.py::test_output_beyond_int32",
    ),
]
