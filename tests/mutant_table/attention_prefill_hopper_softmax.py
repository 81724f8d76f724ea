"""Bugs of ``kernels/attention_prefill_hopper_softmax.py``."""

_IN_NUMPY = "tests/kernels/test_attention_prefill_hopper.py::test_equals_definition_in_numpy"
_UNSEEN = "tests/kernels/test_attention_prefill_hopper.py::test_what_no_row_sees_in_numpy"

MUTANTS = [
    (
        "hopper_softmax: the weights of a pair exchanged",
        'f32 $0, $2, $1;"',
        'f32 $0, $1, $2;"',
        _IN_NUMPY,
    ),
    (
        "hopper_softmax: what was summed before does not decay",
        "of_lane + gl.zeros_like(lane_sums)",
        "1.0 + gl.zeros_like(lane_sums)",
        _IN_NUMPY,
    ),
    (
        "hopper_softmax: a window of one key more",
        "keys[None, :] < rule.window",
        "keys[None, :] <= rule.window",
        _IN_NUMPY,
    ),
    (
        "hopper_softmax: a row without keys is NaN",
        "gl.where(total == 0.0, 1.0, total), LAYOUT)\n    return gl.where(unseen[:, None], 0.0, acc * factor[:, None])",
        "total, LAYOUT)\n    return acc * factor[:, None]",
        _UNSEEN,
    ),
    (
        "hopper_softmax: weights of a row without keys are NaN",
        'return gl.where(row_max == float("-inf"), 0.0, row_max)',
        "return row_max",
        _UNSEEN,
    ),
]
