"""Bugs of ``kernels/attention_common.py``."""

MUTANTS = [
    (
        "attention: causal mask off by one",
        "visible = keys[None, :] <= positions[:, None]",
        "visible = keys[None, :] < positions[:, None]",
        "tests/kernels/test_attention_prefill.py",
    ),
    (
        "attention: window off by one",
        "positions[:, None] - keys[None, :] < rule.window",
        "positions[:, None] - keys[None, :] <= rule.window",
        "tests/kernels/test_attention_prefill.py",
    ),
    (
        "attention: values not rescaled to the new maximum",
        'acc = tl.dot(weights, v, acc * decay[:, None], input_precision="ieee")',
        'acc = tl.dot(weights, v, acc, input_precision="ieee")',
        "tests/kernels/test_attention_prefill.py",
    ),
    (
        "attention: softcap dropped",
        "scores = tanh(scores * rule.scale)",
        "scores = scores * rule.scale",
        "tests/kernels/test_attention_prefill.py",
    ),
    (
        "attention: page number in 32 bits",
        "rows = page * kv.page_stride + slots",
        "rows = page.to(tl.int32) * kv.page_stride + slots",
        "tests/kernels/test_attention_prefill.py::test_offsets_beyond_int32",
    ),
    (
        "attention: values of quantised pages unscaled",
        "weights *= v_scale[None, :]",
        "weights *= 1.0",
        "tests/kernels/test_attention_prefill.py",
    ),
    (
        "attention: keys of the last tile unscaled",
        "scores *= tl.load(k_scale_ptr + scale_rows, mask=mask_keys, other=0.0)[None, :]",
        "k_scale = tl.load(k_scale_ptr + scale_rows, mask=mask_keys, other=0.0)\n"
        "            scores *= tl.where(tile_start + BLOCK_N > end_key, 1.0, k_scale)[None, :]",
        "tests/kernels/test_attention_decode.py",
    ),
    (
        "attention: values of the last tile unscaled",
        "weights *= v_scale[None, :]",
        "weights *= tl.where(tile_start + BLOCK_N > end_key, 1.0, v_scale)[None, :]",
        "tests/kernels/test_attention_prefill.py",
    ),
    (
        "attention: the offset of a scale in 32 bits",
        "scale_rows = ((page << kv.page_shift) + slots) *",
        "scale_rows = ((page << kv.page_shift) + slots).to(tl.int32) *",
        "tests/kernels/test_attention_decode.py::test_scales_beyond_int32",
    ),
    (
        "attention: the running maximum starts at 0",
        'row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)',
        "row_max = tl.full([BLOCK_M], 0.0, tl.float32)",
        "tests/kernels/test_attention_edges.py",
    ),
    (
        "attention: a row without keys is not set to 0",
        "tl.where(unseen[:, None], 0.0, state.acc / tl.where(unseen, 1.0, total)[:, None])",
        "state.acc / tl.where(unseen, 1.0, total)[:, None]",
        "tests/kernels/test_attention_edges.py",
    ),
    (
        "attention: K/V heads taken to fill a slot",
        "slots.to(tl.int64) * kv.slot_stride",
        "slots.to(tl.int64) * kv.num_kv_heads * HEAD_DIM",
        "tests/kernels/test_strides.py",
    ),
]
