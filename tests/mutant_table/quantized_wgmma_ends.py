"""Bugs of ``kernels/quantized_wgmma_ends.py``."""

_ARRANGE = "tests/kernels/test_quantized_wgmma.py::test_arrange_equals_numpy"
_FINITE = "tests/kernels/test_quantized_wgmma.py::test_units_are_of_finite_numbers"
_SAME_BITS = "tests/kernels/test_quantized_wgmma_invariant.py::test_neither_tokens_nor_tiles_change_a_bit"
_SAME_KERNELS = "tests/kernels/test_quantized_wgmma_invariant.py::test_every_number_of_tokens_runs_the_same_kernels"

MUTANTS = [
    ("wgmma: more splits for few tokens", "// BLOCK, chosen[", "// BLOCK, max(1, 64 // n) * chosen[", _SAME_KERNELS),
    ("wgmma: arranged anew for some numbers of tokens", '"num_tokens", "n"]', '"num_tokens"]', _SAME_KERNELS),
    ("wgmma: as many counters as programs want", "8 * plan.tiles", "num_programs", _SAME_KERNELS),
    (
        "wgmma: every slice has the first residual",
        "output.residual[now]",
        "output.residual[: len(output.out[now])]",
        _SAME_BITS,
    ),
    ("wgmma: halves of a step swapped with steps", "((k >> 3) & 1) * 2", "((k >> 3) & 1) * 4", _ARRANGE),
    (
        "wgmma: tokens that there are not",
        "own = offs < tl.where(token < num_tokens, columns, 0)",
        "own = offs < columns",
        _ARRANGE,
    ),
    (
        "wgmma: the rest of x is x",
        "rounded = tl.where(is_rest, rest, rounded)",
        "rounded = tl.where(is_rest, rounded, rounded)",
        _ARRANGE,
    ),
    (
        "wgmma: the rest of a sum dropped",
        "sums - high.to(tl.float32)",
        "high * 0.0",
        _ARRANGE,
    ),
    ("wgmma: infinities choose the unit", "tl.where(bits < 0x7F800000, bits, 0)", "bits", _FINITE),
    ("wgmma: units of a power too much", "((127 - power) << 23)", "((128 - power) << 23)", _ARRANGE),
    (
        "wgmma: counters that are not zero",
        "tl.store(arrived_ptr + counter, 0,",
        "tl.store(arrived_ptr + counter, 7,",
        _ARRANGE,
    ),
    ("wgmma: a norm's root dropped", "unit * ((127 - power) << 23)", "((127 - power) << 23)", _ARRANGE),
]
