"""Functions on tensors: Triton kernels, each with a NumPy definition of the same name in ``reference``."""

from .attention_decode import attention_decode
from .attention_prefill import attention_prefill
from .backend import INTERPRETED, backend_for, use_backend
from .errors import KernelInputError, RooflamaError
from .norm import add_rms_norm, rms_norm

__all__ = [
    "INTERPRETED",
    "KernelInputError",
    "RooflamaError",
    "add_rms_norm",
    "attention_decode",
    "attention_prefill",
    "backend_for",
    "rms_norm",
    "use_backend",
]
