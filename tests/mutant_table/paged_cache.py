"""Bugs of ``kernels/paged_cache.py``."""

MUTANTS = [
    (
        "pages: a gather writes past num_keys",
        "seq_len - first_key), num_keys - out_key)",
        "seq_len - first_key), page_size)",
        "tests/kernels/test_paged_cache.py::test_gather_writes_no_more_keys_than_asked_for",
    ),
    (
        "pages: tokens without a slot are written",
        "    if slot >= 0:\n",
        "    if slot >= -1:\n",
        "tests/kernels/test_paged_cache.py",
    ),
    (
        "pages: the tail of a gather unscaled",
        "scale = tl.load(kv.k_scale + scale_row + rows, mask=mask_rows, other=0.0)",
        "scale = tl.where(rows < page_size, tl.load(kv.k_scale + scale_row + rows, mask=mask_rows, other=0.0), 1.0)",
        "tests/kernels/test_paged_cache.py",
    ),
    (
        "pages: a copy backwards",
        "source = tl.load(source_ptr + copy).to(tl.int64) * page_stride\n"
        "    target = tl.load(target_ptr + copy).to(tl.int64) * page_stride",
        "source = tl.load(target_ptr + copy).to(tl.int64) * page_stride\n"
        "    target = tl.load(source_ptr + copy).to(tl.int64) * page_stride",
        "tests/kernels/test_paged_cache.py",
    ),
    (
        "pages: v read by the strides of k",
        "heads_of(v)",
        "heads_of(v)._replace(token_stride=k.stride(0), head_stride=k.stride(1))",
        "tests/kernels/test_strides.py",
    ),
    (
        "pages: heads gathered as if nothing lay between them",
        "slots_in_page * kv.slot_stride + heads * kv.head_stride",
        "slots_in_page * kv.num_kv_heads * HEAD_DIM + heads * HEAD_DIM",
        "tests/kernels/test_strides.py",
    ),
    (
        "pages: only the first block of a page is copied",
        "offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)",
        "offs = tl.arange(0, BLOCK)",
        "tests/kernels/test_strides.py",
    ),
    (
        "pages: slot 0 is not written",
        "if slot >= 0:",
        "if slot > 0:",
        "tests/kernels/test_paged_cache.py::test_the_first_and_last_slot_and_page_are_written",
    ),
]
