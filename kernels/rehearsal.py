"""Launches that are collected and not run, so that they can be compiled before there is anything to run them on.

Inside ``rehearsal(gpu)``, kernels take tensors on torch's meta device: shapes, dtypes and offsets without memory. A
call makes its checks, allocates its result and chooses its tiles as for tensors on that GPU; its launches are kept
instead of run. So a forward pass on such tensors finds the kernels that a model needs, with neither weights nor a GPU.

``compile_launches`` compiles them in parallel into Triton's cache on disk (``TRITON_CACHE_DIR``), where a later process
finds them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from .bound import Launch
from .gpu import standing_for


class Rehearsal:
    """The launches of a ``with rehearsal(gpu)`` block, each signature once."""

    def __init__(self) -> None:
        self._found: dict[Hashable, Launch] = {}

    def note(self, one: Launch) -> None:
        options = tuple((name, _signature(value)) for name, value in one.options.items())
        self._found.setdefault((one.kernel, _signature(one.args), options), one)

    @property
    def launches(self) -> list[Launch]:
        return list(self._found.values())


_current: ContextVar[Rehearsal] = ContextVar("rooflama_rehearsal")


@contextmanager
def rehearsal(gpu: GPUTarget | None) -> Iterator[Rehearsal]:
    """Collect the launches of calls on meta tensors inside the block, made as for ``gpu``; None: the interpreter."""
    found = Rehearsal()
    token = _current.set(found)
    try:
        with standing_for(gpu):
            yield found
    finally:
        _current.reset(token)


def note(one: Launch) -> None:
    """Keep a launch for the rehearsal of the ``with`` block around."""
    _current.get().note(one)


MOST_THREADS = 8  # a kernel takes the interpreter's lock for a fifth of the time: more would keep it from others


class _Compilers(ThreadPoolExecutor):
    """Threads that compile kernels, and build what Triton launches them with."""

    def submit(self, compile_kernel: Callable[[], Any], /, *args: Any, **kwargs: Any) -> Future:
        return super().submit(self._prepared, compile_kernel)

    @staticmethod
    def _prepared(compile_kernel: Callable[[], Any]) -> Any:
        kernel, driver = compile_kernel(), triton.runtime.driver.active
        if not isinstance(driver, _NoGPU):
            driver.launcher_cls(kernel.src, kernel.metadata)  # which Triton 3.6 compiles in C, and keeps on disk
        return kernel


def compile_launches(
    launches: Sequence[Launch],
    device: torch.device | None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> int:
    """Compile launches in parallel, into Triton's cache. Returns the number of different kernels among them.

    Args:
        launches: of a rehearsal.
        device: the GPU that they will run on; None inside ``without_gpu``.
        progress: called with the number of kernels that are ready, and with that of all.
    """
    place = nullcontext() if device is None else torch.cuda.device(device)
    with place, _Compilers(MOST_THREADS) as pool, triton.AsyncCompileMode(pool):
        kernels = dict.fromkeys(one.kernel.warmup(*one.args, grid=one.grid, **one.options) for one in launches)
        for done, kernel in enumerate(kernels, 1):
            if isinstance(kernel, triton.FutureKernel):
                kernel.result()
            progress(done, len(kernels))
    return len(kernels)


class _NoGPU(NamedTuple):
    """What Triton asks of a driver in order to compile. The GPU stands for its own number, which no device has."""

    gpu: GPUTarget

    def get_current_target(self) -> GPUTarget:
        return self.gpu

    def get_current_device(self) -> GPUTarget:
        return self.gpu

    def get_current_stream(self, device: GPUTarget) -> int:
        return 0


@contextmanager
def without_gpu(gpu: GPUTarget) -> Iterator[None]:
    """Let Triton compile for ``gpu`` in this process, which need not have one."""
    driver = triton.runtime.driver
    before, driver._active = driver._active, _NoGPU(gpu)  # ``active`` would look for a GPU
    try:
        yield
    finally:
        driver._active = before


def _signature(value: Any) -> Hashable:
    """What distinguishes two launches, of an argument; a tensor's place is its alignment."""
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() & 15
    if isinstance(value, (tuple, list)):
        return type(value), *map(_signature, value)
    if is_dataclass(value) and not isinstance(value, type):  # a tensor descriptor
        return type(value), *(_signature(getattr(value, field.name)) for field in fields(value))
    return type(value), value
