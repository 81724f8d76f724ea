"""Bugs of ``kernels/quantized_fixed_point.py``."""

MUTANTS = [
    (
        "fixed: the largest number rounds past 16 bits",
        "exponent = (largest + 0x200) >> 23",
        "exponent = (largest + 0) >> 23",
        "tests/kernels/test_quantized_fixed_point.py::test_the_largest_number_fits_sixteen_bits",
    ),
    (
        "fixed: a NaN of every bit overflows",
        "tl.minimum(tl.max(magnitude, axis=1), 0x7F800000)",
        "tl.max(magnitude, axis=1)",
        "tests/kernels/test_quantized_fixed_point.py::test_the_nan_that_is_largest_as_a_whole_number",
    ),
    (
        "fixed: no number has a step",
        'step = tl.where(exponent > 254, float("nan"), step)',
        "step = step + 0.0",
        "tests/kernels/test_quantized_fixed_point.py::test_no_number_in_gives_no_number_out",
    ),
    (
        "fixed: low bytes taken as signed",
        "low_sums, False, NVIDIA)",
        "low_sums, True, NVIDIA)",
        "tests/kernels/test_quantized_fixed_point.py::test_equals_its_definition",
    ),
    (
        "fixed: codes count from zero",
        "- ZERO_POINT * x_sums[None, :]",
        "- 0 * x_sums[None, :]",
        "tests/kernels/test_quantized_fixed_point.py::test_equals_its_definition",
    ),
    (
        "fixed: minima without the step",
        "(x_sums.to(tl.float32) * group_step)[None, :]",
        "x_sums.to(tl.float32)[None, :]",
        "tests/kernels/test_quantized_fixed_point.py::test_equals_its_definition",
    ),
    (
        "fixed: the first tile again",
        "load_quants(planes, offs_n, mask_n, step + 1, columns",
        "load_quants(planes, offs_n, mask_n, step, columns",
        "tests/kernels/test_quantized_fixed_point.py::test_one_tile_and_many",
    ),
    (
        "fixed: columns past the end of x are read",
        "token * activations.stride + offs_k, mask=mask_k, other=0.0)",
        "token * activations.stride + offs_k)",
        "tests/kernels/test_quantized_fixed_point.py::test_equals_its_definition",
    ),
    (
        "fixed: the second token is the first",
        "activations.x + token * activations.stride + offs_k",
        "activations.x + 0 * activations.stride + offs_k",
        "tests/kernels/test_quantized_fixed_point.py::test_equals_its_definition",
    ),
    (
        "fixed: high bits of another part",
        "shift = LAYOUT.high_bits * (PARTS * tl.arange(0, PER_WORD) + PART)",
        "shift = LAYOUT.high_bits * (PARTS * tl.arange(0, PER_WORD) + 1 - PART)",
        "tests/kernels/test_quantized_fixed_point.py::test_equals_its_definition",
    ),
    (
        "fixed: steps half as long",
        "step = ((exponent - 14) << 23)",
        "step = ((exponent - 15) << 23)",
        "tests/kernels/test_quantized_fixed_point.py::test_equals_its_definition",
    ),
    (
        "fixed: a pair's second weight has a tile too many",
        "if tile < num_second:",
        "if tile <= num_second:",
        "tests/kernels/test_quantized_fixed_point.py::test_a_pair_is_the_product_of_each",
    ),
    (
        "fixed: a pair's first weight begins late",
        "tile - num_second, activations, first",
        "tile, activations, first",
        "tests/kernels/test_quantized_fixed_point.py::test_a_pair_is_the_product_of_each",
    ),
    (
        "fixed: a pair's weights change places",
        "tile, activations, second, second_output",
        "tile, activations, first, second_output",
        "tests/kernels/test_quantized_fixed_point.py::test_a_pair_is_the_product_of_each",
    ),
    (
        "fixed: a pair's second layout for both",
        "second_rows, columns, False, SECOND_LAYOUT",
        "second_rows, columns, False, FIRST_LAYOUT",
        "tests/kernels/test_quantized_fixed_point.py::test_a_pair_is_the_product_of_each",
    ),
    (
        "fixed: a pair's tiles overlap",
        "num_second = tl.cdiv(second_rows, BLOCK_N)",
        "num_second = second_rows // BLOCK_N",
        "tests/kernels/test_quantized_fixed_point.py::test_a_pair_is_the_product_of_each",
    ),
]
