"""Bugs of ``kernels/attention_prefill_hopper_roles.py``."""

_IN_NUMPY = "tests/kernels/test_attention_prefill_hopper.py::test_equals_definition_in_numpy"
_UNSEEN = "tests/kernels/test_attention_prefill_hopper.py::test_what_no_row_sees_in_numpy"

MUTANTS = [
    (
        "hopper_roles: the producer does not wait for a free place",
        "free = (number // STAGES + 1) & 1",
        "free = (number // STAGES) & 1",
        _IN_NUMPY,
    ),
    (
        "hopper_roles: values of a tile that has not arrived",
        "        _wait_full(rings.v_full, before)\n        acc = _start_values",
        "        acc = _start_values",
        _IN_NUMPY,
    ),
    (
        "hopper_roles: K's place is free before its product is done",
        "        scores = warpgroup_mma_wait(len(acc), deps=(scores,))\n",
        "",
        _IN_NUMPY,
    ),
    (
        "hopper_roles: both consumers begin with their turn",
        "(number + 1 - me) & 1",
        "number & 1",
        _IN_NUMPY,
    ),
    (
        "hopper_roles: the place of the wrong tile is freed",
        "rings.v_empty.index(before % STAGES)",
        "rings.v_empty.index(number % STAGES)",
        _IN_NUMPY,
    ),
    (
        "hopper_roles: NaN before the window reaches the first tile",
        "        clear(rings.v, first % STAGES, block.start, block)\n",
        "        pass\n",
        _UNSEEN,
    ),
    (
        "hopper_roles: NaN behind the last key reaches the last tile",
        "    clear(rings.v, last % STAGES, block.end - 1, block)\n",
        "",
        _IN_NUMPY,
    ),
    (
        "hopper_roles: lse of another head",
        "+ rows % work.group\n    gl.store(result.lse",
        "+ rows % num_kv_heads\n    gl.store(result.lse",
        _IN_NUMPY,
    ),
    (
        "hopper_roles: a block after the next one",
        "following = take_block(turn + 1,",
        "following = take_block(turn + 2,",
        _IN_NUMPY,
    ),
    (
        "hopper_roles: queries of a block that is not there",
        "mask=mask & block.there",
        "mask=mask",
        _IN_NUMPY,
    ),
    (
        "hopper_roles: NaN behind the last key, one product after the other",
        "            clear(rings.v, number % STAGES, tile, block)\n",
        "            pass\n",
        _IN_NUMPY,
    ),
]
