"""Bugs of ``kernels/attention_prefill.py``."""

MUTANTS = [
    (
        "prefill: a stride of query_start_loc overlooked",
        "    check_last_dim_contiguous(query_start_loc=query_start_loc)\n",
        "",
        "tests/kernels/test_attention_prefill.py::test_bad_input_is_refused_before_a_launch",
    ),
    (
        "prefill: groups 5, 9 and 12 see one key too few",
        "positions = query_position + rows // group\n",
        "positions = query_position + rows // group - ((group == 5) | (group == 9) | (group == 12)).to(tl.int32)\n",
        "tests/kernels/test_attention_prefill.py::test_every_group_and_head_dim_equals_definition",
    ),
    (
        "prefill: wrong head of the group",
        "heads = kv_head * group + rows % group",
        "heads = kv_head + rows % group * num_kv_heads",
        "tests/kernels/test_attention_prefill.py",
    ),
    (
        "prefill: queries stand one position late",
        "query_position = seq_len - (query_end - query_start)",
        "query_position = seq_len - (query_end - query_start) + 1",
        "tests/kernels/test_attention_prefill.py",
    ),
]
