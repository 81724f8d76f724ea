"""Bugs of ``kernels/quantized_wgmma.py``."""

_PRODUCT = "tests/kernels/test_quantized_wgmma.py::test_product_in_numpy"

MUTANTS = [
    (
        "wgmma: every split begins at the first block",
        "first = gl.program_id(1) * blocks_per_split",
        "first = gl.program_id(1) * 0",
        _PRODUCT,
    ),
    (
        "wgmma: scales of the block behind",
        "scale_word(scales_now, half * HALF + group",
        "scale_word(scales, half * HALF + group",
        _PRODUCT,
    ),
    (
        "wgmma: the second half of a block scaled as the first",
        "scale_word(scales_now, half * HALF + group",
        "scale_word(scales_now, group",
        _PRODUCT,
    ),
    (
        "wgmma: d of the block behind",
        "d = load_factor(planes.d, row, block,",
        "d = load_factor(planes.d, row, first,",
        _PRODUCT,
    ),
    ("wgmma: sums of the same block again", "num_blocks + block + 1) * N", "num_blocks + block) * N", _PRODUCT),
    (
        "wgmma: words replaced while they are read",
        "_copy_words(low_shared[half], planes.low, row_tile, rows, num_blocks, later + 1",
        "_copy_words(low_shared[1 - half], planes.low, row_tile, rows, num_blocks, later + 1",
        _PRODUCT,
    ),
    ("wgmma: words read before they are there", "async_copy.wait_group(1)", "async_copy.wait_group(2)", _PRODUCT),
    ("wgmma: a barrier's phase forgotten", "phase = (block - first) & 1", "phase = first & 0", _PRODUCT),
    ("wgmma: products of two halves in two sums", "if half + group + term == 0:", "if group + term == 0:", _PRODUCT),
    (
        "wgmma: a product of each half left behind",
        "for left in gl.static_range(FLIGHT):",
        "for left in gl.static_range(FLIGHT - 1):",
        _PRODUCT,
    ),
]
