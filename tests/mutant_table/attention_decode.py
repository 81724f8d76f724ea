"""Bugs of ``kernels/attention_decode.py``."""

MUTANTS = [
    (
        "decode: splits merged with equal weights",
        "acc += tl.sum(weights[:, None] * values, axis=0)",
        "acc += tl.sum(tl.sum(weights, axis=0) * values, axis=0)",
        "tests/kernels/test_attention_decode.py",
    ),
    (
        "decode: the last head of groups 9, 10 and 13 left out",
        "mask_rows = row_in_group < group\n",
        "mask_rows = row_in_group < group - ((group == 9) | (group == 10) | (group == 13)).to(tl.int32)\n",
        "tests/kernels/test_attention_decode.py::test_every_group_and_head_dim_equals_definition",
    ),
    (
        "decode: the sequence that is merged in 32 bits",
        "sequence = tl.program_id(1).to(tl.int64)",
        "sequence = tl.program_id(1)",
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
        "decode: only the last splits are merged",
        "acc += tl.sum(weights[:, None] * values, axis=0)",
        "acc = tl.sum(weights[:, None] * values, axis=0)",
        "tests/kernels/test_attention_edges.py",
    ),
]
