"""Bugs of ``kernels/attention_prefill_hopper_tiles.py``."""

_IN_NUMPY = "tests/kernels/test_attention_prefill_hopper.py::test_equals_definition_in_numpy"
_UNSEEN = "tests/kernels/test_attention_prefill_hopper.py::test_what_no_row_sees_in_numpy"

MUTANTS = [
    (
        "hopper_tiles: programs take blocks twice",
        "        program = gl.num_programs(0) - 1 - program\n",
        "        program = gl.num_programs(0) - program\n",
        _IN_NUMPY,
    ),
    (
        "hopper_tiles: a block of no key has no tile",
        "end = gl.maximum(gl.cdiv(farthest + 1, BLOCK_N), start + 1)",
        "end = gl.maximum(gl.cdiv(farthest + 1, BLOCK_N), start)",
        _UNSEEN,
    ),
    (
        "hopper_tiles: boxes of a tile in the wrong order",
        "places.index((stage * ACROSS + j) * DOWN + i)",
        "places.index((stage * ACROSS + j) * DOWN + DOWN - 1 - i)",
        _UNSEEN,
    ),
    (
        "hopper_tiles: the narrow part from the first columns",
        "FIRST + j * COLUMNS]",
        "j * COLUMNS]",
        _IN_NUMPY,
    ),
    (
        "hopper_tiles: a page from the wrong place of the table",
        "block_table_ptr + first + i",
        "block_table_ptr + first",
        _UNSEEN,
    ),
    (
        "hopper_tiles: more tiles unmasked than every row sees",
        "diagonal = gl.maximum(nearest + 1, 0) // BLOCK_N",
        "diagonal = gl.cdiv(gl.maximum(nearest + 1, 0), BLOCK_N)",
        _IN_NUMPY,
    ),
    (
        "hopper_tiles: pages of 32 taken for pages of 16",
        "in gl.static_range(5, 9):",
        "in gl.static_range(6, 9):",
        _IN_NUMPY,
    ),
]
