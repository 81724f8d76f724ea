"""Drawing the next token from logits [num_seqs, vocab]. In this order, as transformers does:

    temperature  0: the largest logit, the lowest token among equals. Else p = softmax(logit / temperature), and:
    top_k        keeps the tokens whose logit is at least the k-th largest; all of those that equal it; 0 keeps all
    top_p        of these, keeps a token if the tokens of larger logit hold less than top_p of the probability: the
                 fewest that reach top_p, with all of those that equal the last; the largest always; 1 keeps all
    min_p        of these, keeps a token if its p is at least min_p times the largest; 0 keeps all
    draw         argmax of log p + g over the tokens kept, g = -log(e) Gumbel noise, e = -log(1 - u) (Gumbel, 1954)

u is a function of (seed, step, token) alone: the first word of Philox4x32-10 (Salmon et al., 2011) with the seed as
key and (token, step's low word, step's high word, 0) as counter; as float32, word / 2^32 + 2^-33, at most 1 - 2^-24.
So what a sequence draws depends neither on its neighbours nor on tokens that the filters drop.
A NaN logit makes the row's token -1.
Out of range, which ``kernels.sample`` refuses on the CPU: a NaN temperature is 0; a min_p that keeps nothing, as one
above 1 or NaN does, makes the token 0.
"""

import numpy as np

_LOW = np.uint64(0xFFFFFFFF)
_WORD = np.uint64(32)


def philox_4x32(counter: tuple[np.ndarray | int, ...], key: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """Ten rounds of Philox on four counter words with two key words -> four uint32 arrays of random bits."""
    c0, c1, c2, c3 = np.broadcast_arrays(*(np.asarray(word, np.uint64) for word in counter))
    k0, k1 = (int(word) for word in key)
    for _ in range(10):
        a, b = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (b >> _WORD) ^ c1 ^ np.uint64(k0), b & _LOW, (a >> _WORD) ^ c3 ^ np.uint64(k1), a & _LOW
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return tuple(word.astype(np.uint32) for word in (c0, c1, c2, c3))


def uniforms(seed: int, step: int, tokens: np.ndarray) -> np.ndarray:
    """float32 in (0, 1), one for each token."""
    words = philox_4x32(
        (tokens, step & 0xFFFFFFFF, (step >> 32) & 0xFFFFFFFF, 0), (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    )
    return np.minimum(words[0].astype(np.float32) * np.float32(2**-32) + np.float32(2**-33), np.float32(1 - 2**-24))


def allowed_tokens(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """logits [vocab] -> bool [vocab], the tokens that the three filters keep."""
    keep = np.ones(logits.shape, bool)
    if 0 < top_k < logits.size:
        keep &= logits >= np.partition(logits, -top_k)[-top_k]
    if top_p < 1:
        ordered = np.sort(logits[keep])[::-1]
        mass = np.cumsum(np.exp(relative(ordered, temperature)))
        mass_above = np.concatenate([[0], mass[:-1]])
        reach = max(top_p * mass[-1], np.finfo(np.float32).tiny)
        keep &= logits >= ordered[mass_above < reach][-1]
    if min_p != 0:
        with np.errstate(invalid="ignore"):
            keep &= relative(logits, temperature) >= np.log(logits.dtype.type(min_p))
    return keep


def relative(logits: np.ndarray, temperature: float) -> np.ndarray:
    """(logits - largest) / temperature: 0 at the largest even if that is infinite."""
    largest = logits.max()
    with np.errstate(invalid="ignore", over="ignore"):
        return np.where(logits == largest, 0, (logits - largest) / logits.dtype.type(temperature))


def sample(
    logits: np.ndarray,
    temperature: np.ndarray | None = None,
    top_k: np.ndarray | None = None,
    top_p: np.ndarray | None = None,
    min_p: np.ndarray | None = None,
    seeds: np.ndarray | None = None,
    steps: np.ndarray | None = None,
    *,
    vocab_size: int | None = None,
) -> np.ndarray:
    """One token for each row of logits, int32, below vocab_size. Each parameter [num_seqs], or None for off."""
    logits = logits[:, :vocab_size].astype(np.result_type(logits.dtype, np.float32))
    tokens = np.empty(logits.shape[0], np.int32)
    for row, z in enumerate(logits):
        if np.isnan(z).any():
            tokens[row] = -1
            continue
        if temperature is None or not temperature[row] > 0:
            tokens[row] = np.argmax(z)
            continue
        if seeds is None or steps is None:
            raise TypeError("temperature needs seeds and steps")
        kept = np.flatnonzero(
            allowed_tokens(
                z,
                temperature[row],
                0 if top_k is None else int(top_k[row]),
                1.0 if top_p is None else top_p[row],
                0.0 if min_p is None else min_p[row],
            )
        )
        u = uniforms(int(seeds[row]), int(steps[row]), kept).astype(z.dtype)
        scores = relative(z, temperature[row])[kept] - np.log(-np.log1p(-u))
        tokens[row] = kept[np.argmax(scores)] if kept.size else 0
    return tokens
