"""What a family is, and how a forward pass is composed."""

from .config import ModelConfig
from .decoder import Adapter, Decoder, Step
from .errors import ArgumentError, ConfigError, ModelClosed
from .families import ADAPTERS, adapter_for
from .kv_cache import OutOfPages, PagedKVCache, PagePool
from .memory.budget import Target
from .memory.plan import MemoryPlan
from .memory.weights import checkpoint_weights, config_weights
from .rope.spec import RopeSpec, rope_tables
from .serving.generate import NaNLogits, Request, Timings, TokenRun
from .serving.runner import DecodeBatch, ModelRunner
from .serving.sampling import SamplingParams, TokenLogprob
from .weights import CheckpointReader, TensorSource

__all__ = [
    "ADAPTERS",
    "Adapter",
    "ArgumentError",
    "CheckpointReader",
    "ConfigError",
    "DecodeBatch",
    "Decoder",
    "MemoryPlan",
    "ModelClosed",
    "ModelConfig",
    "ModelRunner",
    "NaNLogits",
    "OutOfPages",
    "PagePool",
    "PagedKVCache",
    "Request",
    "RopeSpec",
    "SamplingParams",
    "Step",
    "Target",
    "TensorSource",
    "Timings",
    "TokenLogprob",
    "TokenRun",
    "adapter_for",
    "checkpoint_weights",
    "config_weights",
    "rope_tables",
]
