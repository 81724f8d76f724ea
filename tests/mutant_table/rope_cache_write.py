"""Bugs of ``kernels/rope_cache_write.py``."""

MUTANTS = [
    (
        "rope: the norm of a head without its tail",
        "        square += tl.sum(tail * tail, axis=1)\n",
        "        square += 0.0\n",
        "tests/kernels/test_rope.py",
    ),
    (
        "rope: a key written one slot on",
        "slot_offset(slot, kv)",
        "slot_offset(slot + 1, kv)",
        "tests/kernels/test_rope.py",
    ),
    (
        "rope: the offset of a scale in 32 bits",
        "kv.k_scale + slot * kv.num_kv_heads",
        "kv.k_scale + slot.to(tl.int32) * kv.num_kv_heads",
        "tests/kernels/test_rope.py::test_scales_beyond_int32",
    ),
    (
        "rope: v read by the stride of k",
        "heads_of(v)",
        "heads_of(v)._replace(token_stride=k.stride(0), head_stride=k.stride(1))",
        "tests/kernels/test_strides.py",
    ),
    (
        "rope: slot 0 is not written",
        "if slot >= 0:",
        "if slot > 0:",
        "tests/kernels/test_rope.py::test_fused_at_the_first_and_last_slot_and_page",
    ),
]
