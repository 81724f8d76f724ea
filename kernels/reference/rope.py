"""Rotary position embedding (Su et al., 2021, equation 34): each pair of a head's dimensions turns by an angle.

    (a, b) -> (a cos - b sin, b cos + a sin)
    pair j of rotary_dim / 2:  dimensions (j, j + rotary_dim / 2), or (2j, 2j + 1) if interleaved
Row p of the tables cos, sin [max_positions, rotary_dim / 2] holds position p's angles. Dimensions from rotary_dim on
pass through.
"""

import numpy as np

from .norm import rms_norm
from .paged_cache import write_kv


def rope(
    x: np.ndarray, cos: np.ndarray, sin: np.ndarray, positions: np.ndarray, *, interleaved: bool = False
) -> np.ndarray:
    """x [num_tokens, num_heads, head_dim], positions [num_tokens] -> like x."""
    out = x.astype(np.result_type(x.dtype, np.float32))
    cos, sin = (table[positions][:, None].astype(out.dtype) for table in (cos, sin))
    half = cos.shape[-1]
    first, second = (
        (np.s_[..., 0 : 2 * half : 2], np.s_[..., 1 : 2 * half : 2])
        if interleaved
        else (
            np.s_[..., :half],
            np.s_[..., half : 2 * half],
        )
    )
    a, b = out[first].copy(), out[second].copy()
    out[first], out[second] = a * cos - b * sin, b * cos + a * sin
    return out


def rope_and_cache_write(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    cos: np.ndarray,
    sin: np.ndarray,
    positions: np.ndarray,
    slot_mapping: np.ndarray,
    k_pages: np.ndarray,
    v_pages: np.ndarray,
    q_norm: np.ndarray | None = None,
    k_norm: np.ndarray | None = None,
    k_scale: np.ndarray | None = None,
    v_scale: np.ndarray | None = None,
    *,
    eps: float = 0.0,
    interleaved: bool = False,
) -> np.ndarray:
    """Norm each head (where weights are given), rotate q and k, write k and v to their slots; returns q."""
    if q_norm is not None:
        q = rms_norm(q, q_norm, eps)
    if k_norm is not None:
        k = rms_norm(k, k_norm, eps)
    k = rope(k, cos, sin, positions, interleaved=interleaved)
    write_kv(k, v, k_pages, v_pages, slot_mapping, k_scale, v_scale)
    return rope(q, cos, sin, positions, interleaved=interleaved)
