"""K/V in pages [num_pages, page_size, num_kv_heads, head_dim]; slot s lies in page s // page_size, at s % page_size.

Pages of floats hold the values. Quantised pages hold codes, and [num_pages, page_size, num_kv_heads] scales:
    scale = max|x| / limit over the head_dim values of one token and head, rounded to float32
    code  = x / scale, rounded half to even: to an integer (int8, limit 127) or to an e4m3 number (limit 448)
    value = code * scale
NumPy has no e4m3, so here such pages are floats that e4m3 can hold. A row with an infinity or a NaN has scale NaN.
"""

import numpy as np

INT8_LIMIT = 127
E4M3_LIMIT = 448


def round_to_e4m3(x: np.ndarray) -> np.ndarray:
    """The nearest e4m3 number, ties to even: 3 bits after the leading one, exponents down to -6, at most 448."""
    _, exponent = np.frexp(np.abs(x))  # |x| = mantissa * 2^exponent, mantissa in [0.5, 1)
    step = np.ldexp(x.dtype.type(1), np.maximum(exponent - 1, -6) - 3)
    return np.clip(np.rint(x / step) * step, -E4M3_LIMIT, E4M3_LIMIT)


def quantize(x: np.ndarray, integer: bool) -> tuple[np.ndarray, np.ndarray]:
    """x [..., head_dim] -> (codes [..., head_dim], float32 scales [...])."""
    limit = INT8_LIMIT if integer else E4M3_LIMIT
    largest = np.max(np.abs(x), axis=-1)
    scale = np.where(np.isfinite(largest), largest / limit, np.nan).astype(np.float32)
    divisor = np.where(scale > 0, scale, 1).astype(x.dtype)[..., None]
    ratio = np.clip(np.nan_to_num(x / divisor), -limit, limit)
    return (np.rint(ratio).astype(np.int8) if integer else round_to_e4m3(ratio)), scale


def write_kv(
    k: np.ndarray,
    v: np.ndarray,
    k_pages: np.ndarray,
    v_pages: np.ndarray,
    slot_mapping: np.ndarray,
    k_scale: np.ndarray | None = None,
    v_scale: np.ndarray | None = None,
) -> None:
    """Write k, v [num_tokens, num_kv_heads, head_dim] to their slots; a negative slot writes nothing."""
    kept = slot_mapping >= 0
    page, slot_in_page = np.divmod(slot_mapping[kept], k_pages.shape[1])
    for x, pages, scales in ((k[kept], k_pages, k_scale), (v[kept], v_pages, v_scale)):
        if scales is None:
            pages[page, slot_in_page] = x
        else:
            dtype = np.result_type(x.dtype, np.float32)
            pages[page, slot_in_page], scales[page, slot_in_page] = quantize(x.astype(dtype), pages.dtype == np.int8)


def gather_kv(
    pages: np.ndarray,
    block_table: np.ndarray,
    seq_lens: np.ndarray,
    scale: np.ndarray | None = None,
    *,
    num_keys: int,
    dtype: object = None,
) -> np.ndarray:
    """The keys (or values) of all sequences one after the other, [num_keys, num_kv_heads, head_dim].

    ``num_keys`` is the sum of seq_lens. ``dtype`` is what the caller rounds the result to.
    """
    wide = pages.dtype if scale is None else np.result_type(pages.dtype, np.float32)
    rows = [np.empty((0, *pages.shape[2:]), wide)]
    for table, length in zip(block_table, seq_lens.tolist(), strict=True):
        index, slot_in_page = np.divmod(np.arange(length), pages.shape[1])
        values = pages[table[index], slot_in_page].astype(wide)
        rows.append(values if scale is None else values * scale[table[index], slot_in_page, :, None])
    return np.concatenate(rows)


def copy_pages(pages: np.ndarray, source: np.ndarray, target: np.ndarray) -> None:
    """pages[target[i]] = pages[source[i]], in place."""
    pages[target] = pages[source]
