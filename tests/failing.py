"""Failures of the driver, one at a time, inside torch's operations."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Failing(TorchDispatchMode):
    """Raises out-of-memory at the n-th operation that makes or copies a tensor; counts them."""

    NAMES = ("empty", "zeros", "full", "arange", "_to_copy", "clone", "cat", "stack", "new_", "copy_", "lift_fresh")

    def __init__(self, fail_at):
        super().__init__()
        self.fail_at, self.count = fail_at, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(name in function.name() for name in self.NAMES):
            self.count += 1
            if self.count == self.fail_at:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
        return function(*args, **(kwargs or {}))
