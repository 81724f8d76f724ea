"""What a family is, and how a forward pass is composed."""

from .adapter import ADAPTERS, Adapter, adapter_for
from .config import ModelConfig
from .decoder import Decoder, Step
from .engine import DecodeBatch, Engine
from .generate import Generation, NaNLogits, Request, Timings
from .kv_cache import OutOfPages, PagedKVCache, PagePool
from .memory_plan import MemoryPlan, Target
from .memory_weights import checkpoint_weights, config_weights
from .metadata import ConfigError
from .rope import RopeSpec, rope_tables
from .sampling import SamplingParams, TokenLogprob
from .weights import CheckpointReader, TensorSource

__all__ = [
    "ADAPTERS",
    "Adapter",
    "CheckpointReader",
    "ConfigError",
    "DecodeBatch",
    "Decoder",
    "Engine",
    "Generation",
    "MemoryPlan",
    "ModelConfig",
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
    "adapter_for",
    "checkpoint_weights",
    "config_weights",
    "rope_tables",
]
