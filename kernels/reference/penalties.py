"""Penalties on the logits of tokens that a text holds already, in the order and by the definitions of vLLM."""

import numpy as np


def penalise(
    logits: np.ndarray, seen: np.ndarray, repetition: np.ndarray, frequency: np.ndarray, presence: np.ndarray
) -> np.ndarray:
    """logits [num_seqs, vocab], penalised in place and returned.

    seen [num_seqs, vocab]: 2 for each time that a token was drawn, and 1 more if the prompt holds it. The others
    [num_seqs].
    """
    columns = (repetition, frequency, presence)
    repetition, frequency, presence = (column[:, None].astype(logits.dtype) for column in columns)
    with np.errstate(all="ignore"):
        repeated = np.where(logits < 0, logits * repetition, logits / repetition)
        z = np.where(seen != 0, repeated, logits)
        drawn = seen // 2
        logits[...] = z - frequency * drawn.astype(logits.dtype) - np.where(drawn > 0, presence, 0)
    return logits
