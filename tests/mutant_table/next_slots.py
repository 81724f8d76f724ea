"""Bugs of ``kernels/next_slots.py``."""

TESTS = "tests/kernels/test_next_slots.py"

MUTANTS = [
    ("next_slots: a sequence at its limit goes on", "active = length < tl.load", "active = length <= tl.load", TESTS),
    ("next_slots: beyond the last position", "tl.minimum(length, most_positions - 1)", "length", TESTS),
    ("next_slots: the slot of an idle row", "tl.where(active, slot, -1)", "slot", TESTS),
    ("next_slots: idle rows are counted", "length + 1, mask=mask & active", "length + 1, mask=mask", TESTS),
    (
        "next_slots: every row reads the first table",
        "offs.to(tl.int64) * block_table_stride",
        "0 * block_table_stride",
        TESTS,
    ),
    ("next_slots: slots of 32 bits", "page.to(tl.int64) * PAGE_SIZE", "(page * PAGE_SIZE)", TESTS),
]
