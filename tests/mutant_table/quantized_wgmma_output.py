"""Bugs of ``kernels/quantized_wgmma_output.py``."""

_PRODUCT = "tests/kernels/test_quantized_wgmma.py::test_product_in_numpy"

MUTANTS = [
    ("wgmma: gate and up of other rows", "place // 8 % 2 * (rows // 2)", "place // 16 % 2 * (rows // 2)", _PRODUCT),
    ("wgmma: gate for up", "gate, up = gl.split(", "up, gate = gl.split(", _PRODUCT),
    ("wgmma: the first split again and again", "first_ptrs + i *", "first_ptrs + 0 *", _PRODUCT),
    ("wgmma: splits left in one place", "gl.num_programs(1) + gl.program_id(1)", "gl.num_programs(1)", _PRODUCT),
    ("wgmma: the first program to finish is the last", "== gl.num_programs(1) - 1", "== 0", _PRODUCT),
    ("wgmma: tokens of a tile start over", "* (ROWS * N) + start * ROWS", "* (ROWS * N)", _PRODUCT),
    ("wgmma: the rest of x left out", "total = first + rest", "total = first", _PRODUCT),
    ("wgmma: the rest of x left out of splits", "first + i < splits * PARTS", "first + i < splits", _PRODUCT),
    ("wgmma: rows of a lane swapped", "permute(3, 0, 2, 4, 1, 5)", "permute(3, 1, 2, 4, 0, 5)", _PRODUCT),
    ("wgmma: sums without their unit", "total *= gl.load(units_ptr", "total += 0 * gl.load(units_ptr", _PRODUCT),
    ("wgmma: the bias of the rows in front", "gl.load(output.bias + row)", "gl.load(output.bias + row // 2)", _PRODUCT),
    ("wgmma: a residual without its stride", "token[None, :] * output.residual_stride", "token[None, :] * 0", _PRODUCT),
]
