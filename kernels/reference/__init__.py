"""The NumPy definition of every kernel.

Each function has the name and the signature of the launcher it defines. It computes in the precision of its inputs:
given float64 arrays it is the oracle that the property tests compare with, given float32 arrays it is what runs a model
on a machine without a GPU. Imports NumPy and nothing else.
"""

from .all_reduce import one_shot_sum, sum_parts
from .attention import attention_decode, attention_prefill
from .dequantize import dequantize
from .embedding import embedding
from .mlp import geglu, swiglu
from .next_slots import next_slots
from .norm import add_rms_norm, rms_norm
from .paged_cache import copy_pages, gather_kv, write_kv
from .penalties import penalise
from .quantized_matmul import quantized_matmul, quantized_matmul_pair
from .rope import rope, rope_and_cache_write
from .sampling import sample

__all__ = [
    "add_rms_norm",
    "attention_decode",
    "attention_prefill",
    "copy_pages",
    "dequantize",
    "embedding",
    "gather_kv",
    "geglu",
    "next_slots",
    "one_shot_sum",
    "penalise",
    "quantized_matmul",
    "quantized_matmul_pair",
    "rms_norm",
    "rope",
    "rope_and_cache_write",
    "sample",
    "sum_parts",
    "swiglu",
    "write_kv",
]
