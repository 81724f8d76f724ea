"""Bugs of ``kernels/attention_prefill_blocks.py``."""

MUTANTS = [
    (
        "prefill_blocks: sequences share a block",
        "group // BLOCK_M + sequence",
        "group // BLOCK_M",
        "tests/kernels/test_attention_prefill.py",
    ),
    (
        "prefill_blocks: one block too few",
        "return num_rows // block_m + num_seqs + 1",
        "return num_rows // block_m + num_seqs",
        "tests/kernels/test_attention_prefill.py",
    ),
]
