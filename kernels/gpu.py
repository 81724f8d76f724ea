"""The GPU that launches are made for: that of their tensors, or the one that a rehearsal is for (rehearsal.py)."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from triton.backends.compiler import GPUTarget


class _Stage(NamedTuple):
    """What tensors without memory stand for."""

    gpu: GPUTarget | None  # None: Triton's interpreter


_stage: ContextVar[_Stage | None] = ContextVar("rooflama_stage", default=None)


@contextmanager
def standing_for(gpu: GPUTarget | None) -> Iterator[None]:
    """Inside the block, tensors on the meta device stand for tensors on ``gpu``; None for Triton's interpreter."""
    token = _stage.set(_Stage(gpu))
    try:
        yield
    finally:
        _stage.reset(token)


def stands_for_gpu(device: torch.device) -> bool:
    """Whether ``device`` is the meta device, in a ``standing_for`` block."""
    return device.type == "meta" and _stage.get() is not None


def gpu_of(device: torch.device) -> GPUTarget | None:
    """The GPU that launches for tensors on ``device`` are compiled for; None where Triton interprets them."""
    stage = _stage.get() if device.type == "meta" else None
    return _gpu(device) if stage is None else stage.gpu


@functools.cache
def _gpu(device: torch.device) -> GPUTarget | None:
    if device.type != "cuda":
        return None
    if torch.version.hip:
        properties = torch.cuda.get_device_properties(device)
        return GPUTarget("hip", properties.gcnArchName.split(":")[0], properties.warp_size)
    major, minor = torch.cuda.get_device_capability(device)
    return GPUTarget("cuda", 10 * major + minor, 32)


def capability(device: torch.device) -> tuple[int, int]:
    """CUDA's compute capability of a device; (0, 0) for what is not Nvidia's."""
    gpu = gpu_of(device)
    if gpu is None or gpu.backend != "cuda":
        return 0, 0
    major, minor = divmod(int(gpu.arch), 10)
    return major, minor


def num_multiprocessors(device: torch.device) -> int:
    """How many a GPU has; 1 for tensors without memory, whose launches are compiled for any number and do not run."""
    return 1 if device.type == "meta" else torch.cuda.get_device_properties(device).multi_processor_count
