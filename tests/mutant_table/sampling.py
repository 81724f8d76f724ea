"""Bugs of ``kernels/sampling.py``."""

MIXED = "tests/kernels/test_sampling_filters.py::test_a_mixture_of_rows_keeps_and_draws_what_the_definition_does"

MUTANTS = [
    (
        "sampling: min-p dropped beside top-k or top-p",
        "if min_p_ptr is not None:",
        "if min_p_ptr is not None and floor_ptr is None:",
        MIXED,
    ),
    (
        "sampling: the largest uniform number is 1",
        "u = tl.minimum(word.to(tl.float32) * 2.0**-32 + 2.0**-33, 1.0 - 2.0**-24)",
        "u = word.to(tl.float32) * 2.0**-32 + 2.0**-33",
        "tests/kernels/test_sampling.py::test_random_numbers_equal_definition",
    ),
    (
        "sampling: 0 / 0 where 1 - u rounds to 1",
        "tl.where(rest == 1.0, u, -tl.log(rest) * (u / (1.0 - rest)))",
        "-tl.log(rest) * (u / (1.0 - rest))",
        "tests/kernels/test_sampling.py::test_random_numbers_equal_definition",
    ),
]
