"""What a family is, and how a forward pass is composed."""

from .config import ModelConfig
from .decoder import Adapter, Decoder, Step
from .errors import ArgumentError, ConfigError, ModelClosed
from .families import ADAPTERS, adapter_for
from .kv_cache import OutOfPages, PagedKVCache, PagePool
from .memory.budget import Target
from .memory.plan import MemoryPlan
from .memory.weights import checkpoint_weights, config_weights
from .page_table import PageTable
from .rope.spec import RopeSpec, rope_tables
from .serving.engine import TokenEngine
from .serving.runner import DecodeSlots, ModelRunner
from .serving.sampling import SamplingParams, TokenLogprob
from .serving.sequence import NaNLogits, Request, Sequence, Timings
from .weights import CheckpointReader, TensorSource

__all__ = [
    "ADAPTERS",
    "Adapter",
    "ArgumentError",
    "CheckpointReader",
    "ConfigError",
    "DecodeSlots",
    "Decoder",
    "MemoryPlan",
    "ModelClosed",
    "ModelConfig",
    "ModelRunner",
    "NaNLogits",
    "OutOfPages",
    "PagePool",
    "PageTable",
    "PagedKVCache",
    "Request",
    "RopeSpec",
    "SamplingParams",
    "Sequence",
    "Step",
    "Target",
    "TensorSource",
    "Timings",
    "TokenEngine",
    "TokenLogprob",
    "adapter_for",
    "checkpoint_weights",
    "config_weights",
    "rope_tables",
]
