"""Which implementation of a kernel runs: decided here and nowhere else.

A tensor on a CUDA or HIP device goes to the compiled Triton kernel. A tensor on the CPU goes to the NumPy definition,
or to the same Triton kernel under Triton's interpreter when the process was started with ``TRITON_INTERPRET=1``
(Triton reads that variable when a kernel is decorated, so it cannot be switched on later).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

import numpy as np
import torch
import triton
from torch import Tensor

from .errors import KernelInputError
from .gpu import stands_for_gpu
from .interpreter import repair_loop_bounds

Backend = Literal["triton", "numpy"]

INTERPRETED = triton.knobs.runtime.interpret
if INTERPRETED:
    repair_loop_bounds()

_forced: ContextVar[Backend | None] = ContextVar("rooflama_forced_backend", default=None)


@contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Run every kernel inside the ``with`` block on ``backend``, wherever the tensors are.

    ``use_backend("numpy")`` on a GPU computes the definition on the host, to find the first layer that differs.
    """
    if backend not in ("triton", "numpy"):
        raise KernelInputError(
            f"backend {backend!r}", rule="a backend is 'triton' or 'numpy'", remedy="Name one of the two"
        )
    token = _forced.set(backend)
    try:
        yield
    finally:
        _forced.reset(token)


def forced_backend() -> Backend | None:
    """What ``use_backend`` says here, if anything."""
    return _forced.get()


def backend_for(device: torch.device) -> Backend:
    """The implementation that runs for tensors on ``device``."""
    if stands_for_gpu(device):
        return "triton"
    if device.type not in ("cpu", "cuda"):  # HIP devices are called cuda, too
        raise KernelInputError(
            f"tensors on {device}",
            rule="kernels run on CUDA and HIP devices and on the CPU",
            remedy="Move them with .to(device)",
        )
    forced = _forced.get()
    if forced == "triton" and device.type == "cpu" and not INTERPRETED:
        raise KernelInputError(
            "backend 'triton' forced for CPU tensors",
            rule="Triton runs CPU tensors only in its interpreter",
            remedy="Start the process with TRITON_INTERPRET=1",
        )
    if forced is not None:
        return forced
    if device.type == "cpu" and not INTERPRETED:
        return "numpy"
    return "triton"


def runs_numpy(*tensors: Tensor | None, computes: bool = True) -> bool:
    """Whether the NumPy definition serves these tensors; refuses to compute bfloat16 in Triton's interpreter."""
    present = [t for t in tensors if t is not None]
    backend = backend_for(present[0].device)
    if computes and backend == "triton" and INTERPRETED and any(t.dtype == torch.bfloat16 for t in present):
        raise KernelInputError(
            "bfloat16 under Triton's interpreter",
            rule="the interpreter computes bfloat16 wrongly, without saying so",
            remedy="Use float16 or float32, or unset TRITON_INTERPRET",
        )
    return backend == "numpy"


def as_array(tensor: Tensor) -> np.ndarray:
    """The tensor as NumPy sees it; bfloat16 and float8, which NumPy lacks, are widened to float32 (exact)."""
    tensor = tensor.detach().cpu()
    if tensor.dtype in (torch.bfloat16, torch.float8_e4m3fn):
        tensor = tensor.float()
    return tensor.numpy()


def as_tensor(array: np.ndarray, *, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A NumPy result on the device of ``like``, rounded once to ``dtype`` (the dtype of ``like`` by default)."""
    return torch.from_numpy(np.ascontiguousarray(array)).to(device=like.device, dtype=dtype or like.dtype)
