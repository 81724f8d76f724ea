"""Bugs of ``kernels/paged_common.py``."""

MUTANTS = [
    (
        "pages: pages of 128 and 256 taken for pages of 64",
        "(slot >> kv.page_shift) * kv.page_stride",
        "(slot >> tl.minimum(kv.page_shift, 6)) * kv.page_stride",
        "tests/kernels/test_paged_cache.py",
    ),
    (
        "pages: a write one slot on",
        "slot_in_page = slot & ((1 << kv.page_shift) - 1)",
        "slot_in_page = (slot + 1) & ((1 << kv.page_shift) - 1)",
        "tests/kernels/test_paged_cache.py",
    ),
    (
        "pages: the sign of a float8 code lost",
        "| ((bits >> 24) & 0x80)",
        "| ((bits >> 24) & 0x00)",
        "tests/kernels/test_paged_cache.py",
    ),
]
