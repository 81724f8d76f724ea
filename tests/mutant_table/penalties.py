"""Bugs of ``kernels/penalties.py``."""

MUTANTS = [
    (
        "penalties: of the prompt counted as drawn",
        "drawn = (seen >> 1)",
        "drawn = ((seen + 1) >> 1)",
        "tests/kernels/test_penalties.py",
    ),
    (
        "penalties: presence counted",
        "tl.where(drawn > 0.0, tl.load(presence_ptr + row), 0.0)",
        "drawn * tl.load(presence_ptr + row)",
        "tests/kernels/test_penalties.py",
    ),
    (
        "penalties: seen read by the stride of the logits",
        "seen_ptr + row * seen_stride",
        "seen_ptr + row * logits_stride",
        "tests/kernels/test_penalties.py",
    ),
    (
        "penalties: the last block written to its end",
        "offs, z, mask=mask)",
        "offs, z)",
        "tests/kernels/test_penalties.py",
    ),
]
