"""Bugs of ``kernels/embedding.py``."""

MUTANTS = [
    (
        "embedding: row offset of the output in 32 bits",
        "offs = token * columns",
        "offs = token.to(tl.int32) * columns",
        "tests/kernels/test_embedding.py::test_output_beyond_int32",
    ),
    (
        "embedding: the row above",
        "tl.load(token_ids_ptr + token).to(tl.int64)",
        "tl.maximum(tl.load(token_ids_ptr + token).to(tl.int64) - 1, 0)",
        "tests/kernels/test_embedding.py",
    ),
    (
        "embedding: only the first block of columns",
        "step = tl.program_id(1)",
        "step = tl.program_id(1) * 0",
        "tests/kernels/test_embedding.py",
    ),
]
