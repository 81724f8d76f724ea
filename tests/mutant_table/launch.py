"""Bugs of ``kernels/launch.py``."""

MUTANTS = [
    (
        "launch: splits of products depend on the number of tokens",
        'row({"rows": 16384}, SPLITS=4,',
        'row({"rows": 16384, "tokens": 16}, SPLITS=4,',
        "tests/kernels/test_quantized_wgmma_invariant.py::test_every_number_of_tokens_runs_the_same_kernels",
    ),
]
