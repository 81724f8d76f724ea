"""Bugs of ``kernels/rope.py``."""

MUTANTS = [
    (
        "rope: sign of the second of a pair",
        "tl.fma(second, cos, first * sin)",
        "tl.fma(second, cos, -(first * sin))",
        "tests/kernels/test_rope.py",
    ),
    (
        "rope: pairs of neighbours for halves",
        "second = tl.load(ptrs + (1 if INTERLEAVED else HALF), mask=mask",
        "second = tl.load(ptrs + (1 if INTERLEAVED else HALF - 1), mask=mask",
        "tests/kernels/test_rope.py",
    ),
]
