"""Where the next token of each sequence goes."""

import numpy as np


def next_slots(
    lengths: np.ndarray, limits: np.ndarray, block_table: np.ndarray, page_size: int, most_positions: int
) -> tuple[np.ndarray, np.ndarray]:
    """(positions [num_seqs], slots [num_seqs], -1 at the limit). ``lengths`` [num_seqs] grows by 1 below the limit."""
    active = lengths < limits
    positions = np.minimum(lengths, most_positions - 1)
    pages = np.take_along_axis(block_table, positions[:, None] // page_size, axis=1)[:, 0]
    slots = np.where(active, pages.astype(np.int64) * page_size + positions % page_size, -1)
    lengths += active
    return positions, slots
