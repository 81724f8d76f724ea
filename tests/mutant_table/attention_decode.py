"""Bugs of ``kernels/attention_decode.py``."""

MUTANTS = [
    (
        "decode: splits merged with equal weights",
        "weight = tl.exp2(sums[i] - shift)",
        'weight = tl.where(sums[i] > float("-inf"), 1.0, 0.0)',
        "tests/kernels/test_attention_decode.py",
    ),
    (
        "decode: the last head of groups 9, 10 and 13 left out",
        "mask_rows = row_in_group < group\n",
        "mask_rows = row_in_group < group - ((group == 9) | (group == 10) | (group == 13)).to(tl.int32)\n",
        "tests/kernels/test_attention_decode.py::test_every_group_and_head_dim_equals_definition",
    ),
    (
        "decode: places of partial results in 32 bits",
        "places = rows * room",
        "places = rows.to(tl.int32) * room",
        "tests/kernels/test_attention_decode.py::test_merge_beyond_int32",
    ),
    (
        "decode: splits overlap by a tile",
        "end = tl.minimum(start + split_tokens, seq_len)",
        "end = tl.minimum(start + split_tokens + BLOCK_N, seq_len)",
        "tests/kernels/test_attention_decode.py",
    ),
    (
        "decode: window one key wide of the mark",
        "first_key = tl.maximum(seq_len - window, 0)",
        "first_key = tl.maximum(seq_len - window + 1, 0)",
        "tests/kernels/test_attention_decode.py",
    ),
    (
        "decode: the first splits are merged again and again",
        "out_ptrs = splits.out + (places + first)[:, None]",
        "out_ptrs = splits.out + places[:, None]",
        "tests/kernels/test_attention_edges.py",
    ),
    (
        "decode: merged before the last split is there",
        'scope="gpu") == num_splits - 1:',
        'scope="gpu") == num_splits - 2:',
        "tests/kernels/test_attention_decode.py",
    ),
    (
        "decode: the counter stays where it is",
        "tl.store(arrivals_ptr, 0)",
        "tl.store(arrivals_ptr, num_splits)",
        "tests/kernels/test_attention_decode.py::test_given_counters_change_no_bit_and_are_zero_again",
    ),
]
