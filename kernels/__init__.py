"""Functions on tensors: Triton kernels, each with a NumPy definition of the same name in ``reference``."""

from .all_reduce import one_shot_sum, sum_parts
from .attention_decode import attention_decode
from .attention_prefill import attention_prefill
from .backend import INTERPRETED, backend_for, use_backend
from .dequantize import dequantize
from .embedding import embedding
from .errors import KernelInputError, RooflamaError
from .kernel import current_swaps, swap, swapped_only
from .mlp import geglu, swiglu
from .next_slots import next_slots
from .norm import add_rms_norm, rms_norm
from .paged_cache import copy_pages, gather_kv, write_kv
from .penalties import penalise
from .quantized_matmul import quantized_matmul, quantized_matmul_pair
from .rope import rope
from .rope_cache_write import rope_and_cache_write
from .sampling import sample
from .weight import LAYOUTS, Weight, resident_form

__all__ = [
    "INTERPRETED",
    "LAYOUTS",
    "KernelInputError",
    "RooflamaError",
    "Weight",
    "add_rms_norm",
    "attention_decode",
    "attention_prefill",
    "backend_for",
    "copy_pages",
    "current_swaps",
    "dequantize",
    "embedding",
    "gather_kv",
    "geglu",
    "next_slots",
    "one_shot_sum",
    "penalise",
    "quantized_matmul",
    "quantized_matmul_pair",
    "resident_form",
    "rms_norm",
    "rope",
    "rope_and_cache_write",
    "sample",
    "sum_parts",
    "swap",
    "swapped_only",
    "swiglu",
    "use_backend",
    "write_kv",
]
