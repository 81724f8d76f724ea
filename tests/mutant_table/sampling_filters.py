"""Bugs of ``kernels/sampling_filters.py``."""

MIXED = "tests/kernels/test_sampling_filters.py::test_a_mixture_of_rows_keeps_and_draws_what_the_definition_does"

MUTANTS = [
    (
        "sampling: top-k keeps one too many",
        "bound = tl.load(limit_ptr + row).to(tl.float32)",
        "bound = tl.load(limit_ptr + row).to(tl.float32) + (0.0 if WEIGHTED else 1.0)",
        "tests/kernels/test_sampling_filters.py",
    ),
    (
        "sampling: top-p weighs what top-k dropped",
        "(image >= tl.load(floor_ptr + row).to(tl.uint32))",
        "(image >= (0 if WEIGHTED else tl.load(floor_ptr + row).to(tl.uint32)))",
        MIXED,
    ),
    (
        "sampling: top-p at temperature 1",
        "relative(logits, largest, tl.load(temperature_ptr + row))",
        "relative(logits, largest, 1.0)",
        MIXED,
    ),
    (
        "sampling: temperature ignored",
        "(logits - largest) / temperature)",
        "(logits - largest) / 1.0)",
        "tests/kernels/test_sampling.py",
    ),
    (
        "sampling: padding is looked at",
        "tl.load(ptrs, mask=offs < vocab_size,",
        "tl.load(ptrs, mask=offs < vocab_size + 1,",
        "tests/kernels/test_sampling.py",
    ),
]
