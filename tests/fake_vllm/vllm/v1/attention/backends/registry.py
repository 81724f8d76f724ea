"""The registry of attention backends."""

from enum import Enum
from importlib import import_module

_ATTN_OVERRIDES = {}


class AttentionBackendEnum(Enum):
    TRITON_ATTN = "vllm.v1.attention.backends.triton_attn.TritonAttentionBackend"
    CUSTOM = None

    def get_path(self, include_classname=True):
        path = _ATTN_OVERRIDES.get(self, self.value)
        if not path:
            raise ValueError(f"Backend {self.name} must be registered before use.")
        return path

    def get_class(self):
        module, _, name = self.get_path().rpartition(".")
        return getattr(import_module(module), name)

    def is_overridden(self):
        return self in _ATTN_OVERRIDES

    def clear_override(self):
        _ATTN_OVERRIDES.pop(self, None)


def register_backend(backend, class_path=None, is_mamba=False):
    _ATTN_OVERRIDES[backend] = class_path
    return lambda cls: cls
