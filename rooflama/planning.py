"""Memory plans of checkpoints and configs, for a device that is here or not."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch

from rooflama.kernels import backend_for
from rooflama.loaders.checkpoint import Checkpoint
from rooflama.loaders.device import Device, DeviceUnavailable, open_device
from rooflama.loaders.opening import open_headers
from rooflama.models import (
    ArgumentError,
    CheckpointReader,
    MemoryPlan,
    ModelConfig,
    Target,
    adapter_for,
    checkpoint_weights,
    config_weights,
)
from rooflama.models.memory.amounts import parse_bytes
from rooflama.models.memory.weights import WeightBytes
from rooflama.models.rope.override import override_rope
from rooflama.models.share import ALONE, Share

from . import arguments

PAGE_SIZE = 64  # tokens; the waste is at most one page per sequence
PREFILL_CHUNK = 2048  # tokens; larger passes gain nothing on an H100 and take more workspace

ACTIVATION_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
KV_DTYPES = {**ACTIVATION_DTYPES, "fp8": torch.float8_e4m3fn, "int8": torch.int8}


def plan_memory(
    path_or_config: str | os.PathLike[str] | ModelConfig,
    *,
    context: int | None = None,
    sequences: int = 1,
    kv_dtype: str = "auto",
    dtype: str = "auto",
    device: str = "auto",
    limit: int | str | None = None,
    batch_invariant: bool = False,
    rope: Mapping[str, Any] | str | None = None,
    tensor_parallel: int = 1,
    weight_types: str | Callable[[str, tuple[int, ...]], str] = "F16",
) -> MemoryPlan:
    """The memory that a model would take, without loading it.

    Args:
        path_or_config: a checkpoint as for ``load``, of which the header is read; or a config.
        context: the most tokens of each sequence; None for the model's own context. A longer one is a warning.
        sequences: how many sequences hold pages at once.
        kv_dtype, dtype, batch_invariant, rope: as for ``load``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``. The GPU need not be here.
        limit: bytes, or text such as ``24GiB``, that the process may take on the device; on a CPU, without Python and
            torch. None for the device's free memory, or for no limit if the device is not here.
        tensor_parallel: how many ranks share the model; the plan is that of the one that takes most.
        weight_types: for a config, the ggml type of its matrices, or a function of name and shape that returns it.

    Raises:
        UnknownCheckpointError, HubError, GGUFError, HuggingFaceError: the checkpoint cannot be found or read.
        ConfigError: it describes a model that rooflama does not support, or that so many ranks cannot share.
        ArgumentError: an argument is out of range.
        RopeError: ``rope`` describes no rotation.
        DeviceUnavailable: ``device`` is no device's name.
    """
    rule = "tensor_parallel counts ranks, from 1 to 1024"
    ranks = arguments.whole("tensor_parallel", tensor_parallel, rule)
    if not 1 <= ranks <= 1024:
        raise ArgumentError(f"tensor_parallel {tensor_parallel!r}", rule=rule, remedy="Give the number of GPUs")
    share = Share(0, ranks)
    target, free_bytes = _target(device)
    if isinstance(path_or_config, ModelConfig):
        config = with_rope(path_or_config, rope)
        type_of = weight_types if callable(weight_types) else lambda name, shape: weight_types
        weights = config_weights(config, type_of, target.backend, share)
    else:
        with open_headers(path_or_config) as checkpoint:
            adapter, reader = adapter_of(checkpoint), CheckpointReader(checkpoint)
            config = with_rope(adapter.read_config(reader), rope)
            weights = checkpoint_weights(reader, config, adapter, target.backend, share)
    plan = _plan(
        share.of(config),
        weights,
        target,
        context=config.context_length if context is None else context,
        sequences=sequences,
        dtype=dtype,
        kv_dtype=kv_dtype,
        batch_invariant=batch_invariant,
        limit=parse_bytes(limit) if isinstance(limit, str) else limit,
        free_bytes=free_bytes,
        ranks=share.size,
    )
    warn_beyond_training(plan)
    return plan


def plan_for_device(
    reader: CheckpointReader,
    config: ModelConfig,
    device: Device,
    *,
    context: int,
    dtype: str,
    kv_dtype: str,
    sequences: int = 1,
    batch_invariant: bool = False,
    share: Share = ALONE,
) -> MemoryPlan:
    """The plan of sequences of ``context`` tokens on an open device, within its limit and its free memory.

    ``share``: of the rank that runs on the device.
    """
    target = _device_target(device)
    weights = checkpoint_weights(reader, config, adapter_of(reader.checkpoint), target.backend, share)
    return _plan(
        share.of(config),
        weights,
        target,
        context=context,
        sequences=sequences,
        dtype=dtype,
        kv_dtype=kv_dtype,
        batch_invariant=batch_invariant,
        limit=device.memory_limit,
        free_bytes=device.free_bytes,
        ranks=share.size,
    )


def _plan(
    config: ModelConfig, weights: WeightBytes, target: Target, *, dtype: str, kv_dtype: str, **options: Any
) -> MemoryPlan:
    activations, pages = choose_dtypes(dtype, kv_dtype, target.kind)
    return MemoryPlan(
        config,
        weights,
        target=target,
        page_size=PAGE_SIZE,
        prefill_chunk=PREFILL_CHUNK,
        dtype=activations,
        kv_dtype=pages,
        **{"sequences": 1, **options},
    )


def with_rope(config: ModelConfig, rope: Mapping[str, Any] | str | None) -> ModelConfig:
    """``config`` with its rotation changed by ``rope``, if that is not None. Raises RopeError."""
    return config if rope is None else override_rope(config, rope)


def warn_beyond_training(plan: MemoryPlan) -> None:
    """Warn of a context beyond the model's training and its RoPE scaling."""
    config = plan.config
    if plan.context > config.context_length and config.rope.kind != "dynamic":
        warnings.warn(
            f"a context of {plan.context:,} tokens is more than the {config.context_length:,} that {config.name} was "
            f"trained for or that its RoPE ({config.rope.kind}) stretches to: text degrades there. A scaling such as "
            "rope={'kind': 'yarn', 'factor': 4} reaches further",
            stacklevel=3,
        )


def adapter_of(checkpoint: Checkpoint):
    """The adapter of a checkpoint's architecture. Raises ConfigError if there is none."""
    return adapter_for(checkpoint.metadata["general.architecture"])


def choose_dtypes(dtype: str, kv_dtype: str, kind: str) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes (of activations, of keys and values) on such a device. Raises ArgumentError for an unknown name."""
    activations = _choose("dtype", dtype, ACTIVATION_DTYPES, torch.float32 if kind == "cpu" else torch.bfloat16)
    return activations, _choose("kv_dtype", kv_dtype, KV_DTYPES, activations)


def _choose(name: str, value: str, known: dict[str, torch.dtype], default: torch.dtype) -> torch.dtype:
    if isinstance(value, str) and value == "auto":
        return default
    if not isinstance(value, str) or value not in known:
        raise ArgumentError(f"{name} {value!r}", rule=f"{name} is auto, {', '.join(known)}", remedy="Name one of these")
    return known[value]


def _target(spec: str) -> tuple[Target, int | None]:
    """The device that ``spec`` names, and its free bytes; None for a GPU that is not here."""
    try:
        with open_device(spec) as device:
            return _device_target(device), device.free_bytes
    except DeviceUnavailable:
        absent = re.fullmatch("(cuda|hip)(:[0-9]{1,3})?", spec)
        if absent is None:
            raise
        return Target.gpu(absent[1]), None


def _device_target(device: Device) -> Target:
    if device.kind == "cpu":
        return Target("cpu", backend_for(device.torch_device))
    hopper = device.kind == "cuda" and torch.cuda.get_device_capability(device.torch_device) >= (9, 0)
    return Target.gpu(device.kind, hopper=hopper)
