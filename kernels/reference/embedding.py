"""Embedding: out[t] = dequantize(table)[token_ids[t]], dequantising only the rows that are read."""

from types import SimpleNamespace

import numpy as np

from .dequantize import dequantize


def embedding(token_ids: np.ndarray, table, dtype=None) -> np.ndarray:
    """token_ids [num_tokens], table [vocab, hidden] -> [num_tokens, hidden]."""
    planes = tuple(plane[token_ids] for plane in table.planes)
    rows = SimpleNamespace(ggml_type=table.ggml_type, planes=planes, shape=(len(token_ids), table.shape[1]))
    return dequantize(rows, dtype)
