"""Bugs of ``kernels/all_reduce.py``."""

MUTANTS = [
    (
        "all_reduce: a rank leaves its addend in the other slot",
        "tl.store(slots[RANK] + slot * capacity + offs, mine, mask=mask)",
        "tl.store(slots[RANK] + (1 - slot) * capacity + offs, mine, mask=mask)",
        "tests/kernels/test_all_reduce.py",
    ),
    (
        "all_reduce: one peer is not told",
        "tl.atomic_xchg(flags[rank] + place + RANK, number,",
        "tl.atomic_xchg(flags[rank] + place + RANK, number if rank > 1 else 0,",
        "tests/kernels/test_all_reduce.py",
    ),
    (
        "all_reduce: the last launch's number is not kept",
        "tl.store(launches_ptr + block, number)",
        "tl.store(launches_ptr + block, number - 1)",
        "tests/kernels/test_all_reduce.py",
    ),
    (
        "all_reduce: the residual joins in the order of its columns",
        "tl.load(residual_ptr + offs, mask=mask",
        "tl.load(residual_ptr + offs % columns, mask=mask",
        "tests/kernels/test_all_reduce.py",
    ),
    (
        "all_reduce: a wait that gives up passes what it has",
        'total = tl.where(tries < MOST_TRIES, total, float("nan"))',
        "total = total",
        "tests/kernels/test_all_reduce.py",
    ),
]
