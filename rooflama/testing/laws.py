"""The laws of each kernel, as functions that take any implementation with the kernel's signature.

    laws.attention_decode(my_kernel)                       every law of attention_decode
    laws.attention_decode(my_kernel, head_dim=64)          with numbers fixed, for a kernel that takes no others
    @pytest.mark.parametrize("law", laws.rms_norm)         each law as a test of its own: law(my_kernel)

A law draws problems with hypothesis, in the current profile, and raises AssertionError with the drawn numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rooflama.kernels.kernel import KERNELS, Kernel

from . import attention_laws
from .assertions import assert_bit_equal, assert_guards_intact, assert_within_rounding
from .attention import decodes, prefills
from .attention_laws import DECODE, PREFILL
from .calls import MAKERS, Call, calls
from .definition import in_float64, outputs, with_copies
from .strategies import exact

Implementation = Callable[..., Any]


@dataclass(frozen=True)
class Law:
    """One law: ``check`` raises AssertionError for an implementation and a drawn problem that break it."""

    name: str
    problems: Callable[..., st.SearchStrategy]
    check: Callable[[Implementation, Any], None]

    def __call__(self, implementation: Implementation, **fixed: Any) -> None:
        """Draw problems, with some numbers ``fixed``, and check each."""

        @settings(deadline=None, suppress_health_check=list(HealthCheck))
        @given(problem=self.problems(**fixed))
        def holds(problem: Any) -> None:
            self.check(implementation, problem)

        holds()

    def __repr__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Laws:
    """All laws of one kernel. Call it to check them all, or iterate over them."""

    kernel: str
    each: tuple[Law, ...]

    def __call__(self, implementation: Implementation, **fixed: Any) -> None:
        for law in self.each:
            law(implementation, **fixed)

    def __iter__(self) -> Iterator[Law]:
        return iter(self.each)

    def __len__(self) -> int:
        return len(self.each)


def _results(kernel: Kernel, implementation: Implementation, arguments: dict[str, Any]) -> dict[str, Any]:
    """``outputs`` of a call whose written arguments are copies."""
    own = with_copies(kernel, arguments)
    bound = kernel.__signature__.bind(**own)
    return outputs(kernel, implementation(*bound.args, **bound.kwargs), own)


def equals_definition(kernel: Kernel, implementation: Implementation, call: Call) -> None:
    """Within the tolerance that the definition in the same precision, rounded once, has."""
    complete = kernel.__signature__.bind(**call.arguments)
    complete.apply_defaults()
    got = _results(kernel, implementation, call.arguments)
    wanted = in_float64(kernel, complete.arguments)
    rounded = with_copies(kernel, complete.arguments)
    same_dtype = outputs(kernel, kernel.define(rounded), rounded)
    for name, tensor in got.items():
        if tensor is None:
            continue
        context = f"{name}; {call.numbers}"
        if tensor.dtype.is_floating_point and tensor.element_size() > 1:
            reference = exact(wanted[name])
            largest = float(np.abs(reference[np.isfinite(reference)]).max(initial=0.0)) or 1.0
            c = 4.0 + call.slack / (torch.finfo(tensor.dtype).eps * largest)
            assert_within_rounding(tensor, reference, same_dtype[name], c=c, context=context)
        else:  # tokens and codes
            assert_bit_equal(_bits(tensor), _bits(same_dtype[name]), context=context)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor


def the_same_call_gives_the_same_bits(kernel: Kernel, implementation: Implementation, call: Call) -> None:
    one, other = (_results(kernel, implementation, call.arguments) for _ in range(2))
    for name, tensor in one.items():
        if tensor is not None:
            assert_bit_equal(_bits(tensor), _bits(other[name]), context=f"{name}; {call.numbers}")


def only_what_it_may_write_is_written(kernel: Kernel, implementation: Implementation, call: Call) -> None:
    """Neither the other arguments nor the memory around any argument."""
    before = {name: buffer.clone() for name, buffer in call.buffers.items() if name not in kernel.mutates}
    bound = kernel.__signature__.bind(**call.arguments)
    implementation(*bound.args, **bound.kwargs)
    for name, buffer in call.buffers.items():
        assert_guards_intact(buffer, context=f"{name}; {call.numbers}")
        if name in before:
            assert_bit_equal(buffer, before[name], context=f"{name} was written; {call.numbers}")


def rows_do_not_depend_on_each_other(kernel: Kernel, implementation: Implementation, call: Call) -> None:
    """A token's bits are the same alone and between others."""
    together = _results(kernel, implementation, call.arguments)["result 0"]
    for row in range(len(call.arguments[call.rows[0]])):
        alone = {name: call.arguments[name][row : row + 1] for name in call.rows}
        got = _results(kernel, implementation, call.arguments | alone)["result 0"]
        assert_bit_equal(got, together[row : row + 1], context=f"row {row}; {call.numbers}")


_TOKENWISE = ("add_rms_norm", "embedding", "geglu", "quantized_matmul", "rms_norm", "rope", "sample", "swiglu")


def _of(kernel_name: str) -> Laws:
    checks = [equals_definition, the_same_call_gives_the_same_bits, only_what_it_may_write_is_written]
    checks += [rows_do_not_depend_on_each_other] if kernel_name in _TOKENWISE else []
    kernel = KERNELS[kernel_name]
    return Laws(
        kernel_name,
        tuple(Law(check.__name__, partial(calls, kernel_name), partial(check, kernel)) for check in checks),
    )


def _of_attention(kernel_name: str, kind: attention_laws.Kind, problems: Callable[..., Any], *own: Any) -> Laws:
    shared = (
        attention_laws.equals_definition,
        attention_laws.the_same_call_gives_the_same_bits,
        attention_laws.grouped_heads_equal_repeated_heads,
        attention_laws.placement_of_pages_changes_no_bit,
        attention_laws.neighbours_change_no_bit,
        attention_laws.keys_out_of_sight_are_not_read,
    )
    return Laws(kernel_name, tuple(Law(law.__name__, problems, partial(law, kind)) for law in (*shared, *own)))


attention_decode = _of_attention(
    "attention_decode", DECODE, decodes, attention_laws.order_of_keys_matters_only_to_rounding
)
attention_prefill = _of_attention(
    "attention_prefill",
    PREFILL,
    prefills,
    attention_laws.a_finite_future_changes_no_bit_of_the_past,
    attention_laws.chunks_change_no_bit,
)
LAWS = {name: _of(name) for name in MAKERS} | {
    "attention_decode": attention_decode,
    "attention_prefill": attention_prefill,
}
add_rms_norm = LAWS["add_rms_norm"]
copy_pages = LAWS["copy_pages"]
dequantize = LAWS["dequantize"]
embedding = LAWS["embedding"]
gather_kv = LAWS["gather_kv"]
geglu = LAWS["geglu"]
next_slots = LAWS["next_slots"]
penalise = LAWS["penalise"]
quantized_matmul = LAWS["quantized_matmul"]
quantized_matmul_pair = LAWS["quantized_matmul_pair"]
rms_norm = LAWS["rms_norm"]
rope = LAWS["rope"]
rope_and_cache_write = LAWS["rope_and_cache_write"]
sample = LAWS["sample"]
sum_parts = LAWS["sum_parts"]
swiglu = LAWS["swiglu"]
write_kv = LAWS["write_kv"]
