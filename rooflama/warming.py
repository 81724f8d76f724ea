"""Kernels compiled ahead: beside the upload of the weights, or by ``warm`` before any process needs them.

A rehearsal (``models.serving.rehearsal``) finds the launches of a model from its header. They are compiled in parallel
into Triton's cache on disk, the folder ``TRITON_CACHE_DIR``, where every later process finds them.
"""

from __future__ import annotations

import os
import re
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from rooflama.kernels import INTERPRETED
from rooflama.kernels.facts import Facts
from rooflama.kernels.gpu import gpu_of
from rooflama.kernels.kernel import replays
from rooflama.kernels.rehearsal import compile_launches, without_gpu
from rooflama.loaders.device.query import find_device
from rooflama.loaders.opening import locate, open_headers
from rooflama.loaders.text import open_tokenizer
from rooflama.models import ArgumentError, CheckpointReader, MemoryPlan, TensorSource
from rooflama.models.memory.amounts import count
from rooflama.models.serving.rehearsal import rehearse

from .planning import adapter_of, plan_memory

Progress = Callable[[int, int], object]  # called with the number of kernels that are ready, and of all


class Compiling:
    """Compiles the kernels of a first answer in other threads, from its creation until ``wait``."""

    def __init__(self, source: TensorSource, plan: MemoryPlan, device: torch.device, *, num_tokens: int):
        self._done = self._total = 0
        thread = ThreadPoolExecutor(1)
        self._result = thread.submit(self._compile, source, plan, device, num_tokens)
        thread.shutdown(wait=False)

    def _compile(self, source: TensorSource, plan: MemoryPlan, device: torch.device, num_tokens: int) -> None:
        adapter, gpu, fused = adapter_of(source.checkpoint), gpu_of(device), source.fused
        launches = rehearse(
            source, plan.config, adapter, plan, gpu, num_tokens=num_tokens, fused=fused, first_answer=True
        )
        compile_launches(launches, device, self._progress)

    def _progress(self, done: int, total: int) -> None:
        self._done, self._total = done, total

    def wait(self, progress: Progress) -> None:
        """Wait until all are compiled, calling ``progress`` now and then.

        A failure is a warning: what could not be compiled ahead is compiled, or fails, when it is first used.
        """
        while not self._result.done():
            progress(self._done, self._total)
            wait([self._result], timeout=0.1)
        if error := self._result.exception():
            warnings.warn(f"kernels are compiled when they are first used, not ahead: {error}", stacklevel=3)


@dataclass(frozen=True)
class Warmed(Facts):
    """What ``warm`` did. Shows itself in a terminal and in Jupyter.

    Attributes:
        gpu: for which the kernels were compiled, such as "sm_90"; None on a CPU, which compiles nothing.
        kernels: how many the model needs; one function counts once for each set of types, tile sizes and alignments.
        compiled: those that Triton's cache did not hold.
        seconds: how long it took.
        cache: Triton's cache.
    """

    gpu: str | None
    kernels: int
    compiled: int
    seconds: float
    cache: str

    def rows(self) -> list[tuple[str, str]]:
        """The facts, as (label, value)."""
        if self.gpu is None:
            return [("warm", "nothing to compile: the CPU runs the NumPy definitions, or Triton's interpreter")]
        made = f"{count(self.kernels, 'kernel')} for {self.gpu}, {self.compiled} compiled in {self.seconds:.1f} s"
        return [
            ("warm", made),
            ("cache", self.cache),
        ]


def warm(
    path: str | os.PathLike[str],
    *,
    target: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    kv_dtype: str = "auto",
    max_context: int | None = None,
    max_sequences: int = 1,
    rope: Mapping[str, Any] | str | None = None,
    batch_invariant: bool = False,
    fused: bool = True,
    progress: Progress = lambda done, total: None,
) -> Warmed:
    """Compile the kernels that a model needs, from its header alone. Nothing is uploaded.

    A later ``load`` with the same arguments finds them in Triton's cache, the folder ``TRITON_CACHE_DIR``.

    Args:
        path: as for ``load``. Of a Hub reference, only headers and the tokenizer are downloaded.
        target: compile for this GPU, which need not be here: ``sm_90`` (compute capability 9.0), ``gfx942``. None
            compiles for ``device``, and then builds Triton's launchers for it, too.
        device: the GPU. On a CPU there is nothing to compile.
        dtype, kv_dtype, max_context, max_sequences, rope, batch_invariant, fused: as for ``load``.
        progress: called with the number of kernels that are ready, and with that of all.

    Raises:
        UnknownCheckpointError, HubError, GGUFError, HuggingFaceError, ConfigError: as for ``load``.
        ArgumentError: ``target`` is no GPU, or the process interprets Triton's kernels.
    """
    started, cache = time.perf_counter(), triton.knobs.cache.dir
    place = None if target is not None else find_device(device)[0]
    if place is not None and not replays(place):
        return Warmed(None, 0, 0, 0.0, cache)
    gpu = gpu_of(place) if place is not None else parse_target(str(target))
    assert gpu is not None
    plan = plan_memory(
        path,
        context=max_context,
        sequences=max_sequences,
        dtype=dtype,
        kv_dtype=kv_dtype,
        device=gpu.backend if place is None else str(place),
        batch_invariant=batch_invariant,
        rope=rope,
    )
    with open_headers(path) as checkpoint:
        reader, adapter = CheckpointReader(checkpoint), adapter_of(checkpoint)
        adapter.read_config(reader)  # counts what it reads
        # headers of a folder are without the tokenizer's files
        tokenizer = open_tokenizer(checkpoint if checkpoint.folder is None else locate(path, weights=False).path)
        num_tokens = min(tokenizer.vocab_size, plan.config.vocab_size)
        launches = rehearse(reader, plan.config, adapter, plan, gpu, num_tokens=num_tokens, fused=fused)
    compiled: list[str] = []

    def listen(*, src: Any, cache_hit: bool, **_: Any) -> None:
        if not cache_hit:
            compiled.append(src.name)

    with triton.knobs.compilation.scope(), without_gpu(gpu) if place is None else nullcontext():
        triton.knobs.compilation.listener = listen
        kernels = compile_launches(launches, place, progress)
    name = f"sm_{gpu.arch}" if gpu.backend == "cuda" else str(gpu.arch)
    return Warmed(name, kernels, len(compiled), time.perf_counter() - started, cache)


def parse_target(name: str) -> GPUTarget:
    """``sm_90`` or ``gfx942`` as Triton's target. Raises ArgumentError."""
    if INTERPRETED:
        raise ArgumentError(
            f"target {name} in Triton's interpreter",
            rule="the interpreter compiles nothing",
            remedy="Unset TRITON_INTERPRET",
        )
    if match := re.fullmatch(r"sm_([1-9][0-9]{1,2})", name):
        return GPUTarget("cuda", int(match[1]), 32)
    if re.fullmatch(r"gfx[0-9a-f]{3,4}", name):
        return GPUTarget("hip", name, 64 if name.startswith("gfx9") else 32)
    raise ArgumentError(
        f"target {name!r}",
        rule="a target is sm_ and a compute capability, such as sm_90, or AMD's name, such as gfx942",
        remedy="rooflama env shows the capability of a GPU that is here",
    )
