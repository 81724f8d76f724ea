"""``rooflama.compare``: how far a function departs from a kernel inside a real model, and how fast it is there."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rooflama.kernels import swap
from rooflama.kernels.backend import as_array
from rooflama.kernels.checks import FLOATS
from rooflama.kernels.kernel import KERNELS, Kernel
from rooflama.models import ArgumentError

from . import arguments
from .comparison import Comparison, LayerError, Speed
from .kernel_calls import DECODING, Place, run, sequence_of, visited_calls
from .model import Model
from .testing.definition import copied, in_float64, outputs, with_copies

PLAIN_PROMPT = "The quick brown fox jumps over the lazy dog."
UNITS = 4.0  # in the last place of the largest value, allowed beyond twice the kernel's own error
LEAST_SECONDS, LEAST_RUNS = 0.5, 10  # of a timing on the CPU
QUANTILES = [0.5, 0.2, 0.8]


def compare(model: Model, *, prompt: arguments.Prompt = PLAIN_PROMPT, **replacement: Callable[..., Any]) -> Comparison:
    """Run a function beside the kernel that it could replace, on every call that a model makes over a prompt.

    Each call goes to the kernel, whose result the model continues with, to the function, and to the NumPy definition in
    float64. So errors do not accumulate from layer to layer. Then the prompt runs with the function in the kernel's
    place, and the drift of the residual stream shows how they do accumulate.

    Args:
        model: from ``rooflama.load``.
        prompt: text or token ids. The last token is run as a step of decoding, the others as a prompt.
        replacement: one kernel's name = a function with that kernel's signature, as for ``rooflama.swap``. It may
            return None for a result that the model does not use, such as the log-sum-exp of attention.

    Returns:
        The error of each layer, the tolerance derived for it, the drift, and the time of both. It shows itself in a
        terminal and in Jupyter; ``plot()`` draws it.

    Raises:
        ArgumentError: not exactly one replacement, a prompt that ``Model.logits`` refuses, or results whose number,
            shape or dtype differ from the kernel's.
        KernelInputError: no kernel has that name, or the replacement cannot be called.
    """
    if len(replacement) != 1:
        raise ArgumentError(
            f"{len(replacement)} replacements",
            rule="one comparison is of one kernel",
            remedy="Pass one, such as attention_decode=mine",
        )
    with swap(**replacement):
        pass  # refuses names that are no kernel's
    ((name, mine),) = replacement.items()
    token_ids = (
        model.tokenizer.encode(prompt, parse_special=True) if isinstance(prompt, str) else arguments.token_ids(prompt)
    )
    kernel = KERNELS[name]
    found: list[LayerError] = []
    calls: dict[str, list[tuple]] = {}

    def visit(place: Place, args: tuple, kwargs: dict[str, Any]) -> Any:
        bound = kernel.__signature__.bind(*args, **kwargs)
        calls.setdefault(place.phase, []).append((args, kwargs))
        bound.apply_defaults()
        result, error = _compared(kernel, mine, args, kwargs, bound.arguments)
        found.append(LayerError(place.phase, place.layer, *error))
        return result

    with visited_calls(model, name, token_ids, visit) as (way, runner, done):
        speeds = {phase: _speed(kernel, mine, made, model.device.torch_device, phase) for phase, made in calls.items()}
    with sequence_of(model, len(token_ids)) as sequence_id, swap(**replacement):
        swapped = run(runner, sequence_id, token_ids)
    drift = {key: _relative(swapped.hidden[key], hidden) for key, hidden in done.hidden.items()}
    return Comparison(
        kernel=name,
        replacement=getattr(mine, "__name__", None) or type(mine).__name__,
        model=model.name,
        device=model.describe(),
        way=way,
        num_tokens=len(token_ids),
        layers=_worst_of_each_layer(found),
        drift=drift,
        same_token=bool((swapped.logits.argmax(-1) == done.logits.argmax(-1)).all()),
        speeds=speeds,
    )


def _worst_of_each_layer(found: list[LayerError]) -> list[LayerError]:
    worst: dict[tuple[str, int | None], LayerError] = {}
    for one in found:
        before = worst.setdefault((one.phase, one.layer), one)
        if one.excess > before.excess:
            worst[one.phase, one.layer] = one
    return list(worst.values())


def _compared(
    kernel: Kernel, mine: Callable, args: tuple, kwargs: dict[str, Any], named: dict[str, Any]
) -> tuple[Any, tuple[float, float, float]]:
    """(the kernel's result; ``_error`` of the output that is furthest off)."""
    before = {name: copied(named[name]) for name in kernel.mutates if named[name] is not None}
    bound = kernel.__signature__.bind(*args, **kwargs)
    bound.arguments.update(with_copies(kernel, bound.arguments))
    wanted = in_float64(kernel, named)
    result = kernel(*args, **kwargs)
    ours = outputs(kernel, result, named)
    theirs = outputs(kernel, mine(*bound.args, **bound.kwargs), bound.arguments)
    errors = []
    for output, own in ours.items():
        other = theirs.get(output)
        if other is None and output not in before:
            continue  # not returned
        if not isinstance(other, Tensor) or (other.shape, other.dtype) != (own.shape, own.dtype):
            shown = f"{list(other.shape)} {other.dtype}" if isinstance(other, Tensor) else repr(other)[:60]
            raise ArgumentError(
                f"{output} of the replacement is {shown}",
                rule=f"{kernel.name} returns {list(own.shape)} {own.dtype}",
                remedy=f"Return that; `rooflama kernel {kernel.name}` shows every result",
            )
        written = None
        if output in before:
            written = _differs(own, before[output]) | _differs(other, before[output])
        errors.append(_error(other, own, wanted[output], written))
    if not errors:
        raise ArgumentError(
            "a replacement that returns nothing", rule=f"{kernel.name} returns a result", remedy="Return the tensors"
        )
    return result, max(errors, key=lambda error: error[0] / error[1] if error[1] else error[0])


def _differs(one: Tensor, other: Tensor) -> np.ndarray:
    a, b = as_array(one), as_array(other)
    return (a != b) & ~((a != a) & (b != b))


def _error(other: Tensor, own: Tensor, wanted: Tensor, written: np.ndarray | None) -> tuple[float, float, float]:
    """(error, tolerance, the kernel's own error), each relative to the largest value of the definition's result.

    tolerance = 2 max|kernel - definition| + UNITS eps max|definition|. Of token ids, the share
    that differs from the kernel's.
    """
    if own.dtype in (torch.int32, torch.int64):
        return float((other != own).float().mean()), 0.0, 0.0
    everything = np.ones(own.shape, bool) if written is None else written
    got, ours, exact = (as_array(tensor)[everything].astype(np.float64) for tensor in (other, own, wanted))
    finite = np.isfinite(exact)
    if not np.array_equal(got[~finite], exact[~finite], equal_nan=True):
        return float("inf"), 0.0, 0.0
    if not finite.any():
        return 0.0, 0.0, 0.0
    largest = float(np.abs(exact[finite]).max())
    error, rounding = (_largest_difference(one[finite], exact[finite]) for one in (got, ours))
    if own.is_floating_point():
        unit = torch.finfo(own.dtype).eps * largest * (UNITS if own.dtype in FLOATS else 1.0)
    else:
        unit = 1.0 if own.dtype == torch.int8 else 0.0  # one code
    scale = largest or 1.0
    return error / scale, (2 * rounding + unit) / scale, rounding / scale


def _largest_difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.nan_to_num(np.abs(one - other), nan=np.inf, posinf=np.inf).max())


def _relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-300))


def _speed(kernel: Kernel, mine: Callable, calls: list[tuple], device: torch.device, phase: str) -> Speed:
    """Median times of all calls of a pass, which read different buffers: no call finds its data in a cache."""

    def all_calls(function: Callable) -> Callable[[], None]:
        def run_all() -> None:
            for args, kwargs in calls:
                function(*args, **kwargs)

        return run_all

    runs = [all_calls(function) for function in (kernel, mine)]
    if device.type == "cpu":
        return _of(_cpu_seconds(*runs), "wall clock")
    from triton.testing import do_bench, do_bench_cudagraph

    def milliseconds(bench: Callable) -> list[list[float]]:
        return [[value / 1e3 for value in bench(one, quantiles=QUANTILES)] for one in runs]

    if phase != DECODING:
        return _of(milliseconds(do_bench), "CUDA events, launches included")
    try:
        return _of(milliseconds(do_bench_cudagraph), "CUDA events around a CUDA graph")
    except RuntimeError as error:
        how = f"CUDA events, launches included: it fits in no CUDA graph, which decoding needs ({error})"
        return _of(milliseconds(do_bench), how)


def _of(seconds: list[list[float]], how: str) -> Speed:
    (kernel, *_), (replacement, *_) = seconds
    return Speed(kernel, replacement, max((high - low) / middle for middle, low, high in seconds), how)


def _cpu_seconds(*functions: Callable[[], None]) -> list[list[float]]:
    """QUANTILES of each, after a run to warm up. They take turns at going first, on the same busy machine."""
    taken: list[list[float]] = [[] for _ in functions]
    for function in functions:
        function()
    turn = list(zip(taken, functions, strict=True))
    while sum(map(sum, taken)) < LEAST_SECONDS or len(taken[0]) < LEAST_RUNS:
        turn.reverse()
        for times, function in turn:
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
    return [np.quantile(times, QUANTILES).tolist() for times in taken]
