"""Replays of bound launches on the CPU: a stand-in for a compiled kernel gives Triton's interpreter tensors again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rooflama.kernels import kernel as module
from rooflama.kernels.bound import BoundLaunches, Launch, tensors_in


def replay_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bind and replay calls for tensors on the CPU too. Launches may not take views at an offset."""
    at: dict[int, Tensor] = {}  # tensors of the current call by address
    plain_empty, plain_run, plain_call = torch.empty, module.run, BoundLaunches.__call__

    def empty(*args: Any, **kwargs: Any) -> Tensor:
        tensor = plain_empty(*args, **kwargs)
        at[tensor.data_ptr()] = tensor
        return tensor

    def call(bound: BoundLaunches, values: tuple, out: Any = None) -> Any:
        at.clear()
        at.update({tensor.data_ptr(): tensor for tensor in tensors_in((*values, out))})
        return plain_call(bound, values, out)

    def with_tensors(launched: Any, entry: Any) -> Any:
        """What was launched at first, with the tensors that begin at the addresses in ``entry``."""
        if isinstance(launched, Tensor):
            return at[entry]
        if hasattr(launched, "_fields"):
            return type(launched)(*map(with_tensors, launched, entry))
        return entry

    def run(one: Launch) -> Any:
        plain_run(one)
        named = {**dict(zip(one.kernel.arg_names, one.args, strict=False)), **one.options}

        def replay(*entries: Any) -> None:
            launched = [named[name] for name in one.kernel.arg_names]
            one.kernel[one.grid](*map(with_tensors, launched, entries))

        return {(*one.grid, 1, 1)[:3]: replay}

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(BoundLaunches, "__call__", call)
    monkeypatch.setattr(module, "run", run)
    monkeypatch.setattr(module, "replays", lambda device: True)
