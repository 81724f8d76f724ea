"""Bugs of ``kernels/quantized_gemv.py``."""

MUTANTS = [
    (
        "gemv: minima added without the activations",
        "each_vector(minima, LAYOUT.group)[None, :, :] * tl.sum(x, axis=3)",
        "each_vector(minima, LAYOUT.group)[None, :, :]",
        "tests/kernels/test_quantized_matmul.py",
    ),
    (
        "gemv: groups scaled by their squares",
        "each_vector(scales, LAYOUT.group)[None, :, :]",
        "each_vector(scales * scales, LAYOUT.group)[None, :, :]",
        "tests/kernels/test_quantized_matmul.py",
    ),
    (
        "gemv: the norm's mean over one column too many",
        "tl.sum(squares, axis=1) / columns",
        "tl.sum(squares, axis=1) / (columns + 1)",
        "tests/kernels/test_quantized_matmul.py",
    ),
    (
        "gemv: only the last tile of columns counts",
        "acc += sums",
        "acc = sums",
        "tests/kernels/test_quantized_matmul.py::test_quantized_matmul_equals_definition",
    ),
]
