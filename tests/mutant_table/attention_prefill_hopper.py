"""Bugs of ``kernels/attention_prefill_hopper.py``."""

_IN_NUMPY = "tests/kernels/test_attention_prefill_hopper.py::test_equals_definition_in_numpy"
_UNSEEN = "tests/kernels/test_attention_prefill_hopper.py::test_what_no_row_sees_in_numpy"

MUTANTS = [
    (
        "hopper: one consumer frees a tile for all",
        "        _barriers(STAGES, CONSUMERS),\n        _barriers(STAGES, CONSUMERS),\n",
        "        _barriers(STAGES, 1),\n        _barriers(STAGES, 1),\n",
        _IN_NUMPY,
    ),
    (
        "hopper: no block for the tokens of no sequence",
        "// (CONSUMERS * _ROWS) + num_seqs + 1",
        "// (CONSUMERS * _ROWS) + num_seqs",
        _UNSEEN,
    ),
    (
        "hopper: a page's slots in the place of its heads",
        "[page_stride, head_stride, slot_stride, 1]",
        "[page_stride, slot_stride, head_stride, 1]",
        _IN_NUMPY,
    ),
]
