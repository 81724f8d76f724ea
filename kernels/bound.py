"""Launches, bound once per signature and replayed.

Triton's own launch examines every argument of a kernel at each call: about 30 us for twenty arguments. The outcome
follows from the signature of the public function's arguments. So the first call keeps the compiled kernels and, for
each tensor, which argument, result or scratch its address comes from. Later calls fill in addresses and run.
"""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.jit import JITFunction


class Launch(NamedTuple):
    """One launch of a Triton kernel."""

    kernel: JITFunction
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]  # constexprs, num_warps, num_stages, launch_pdl


def launch(kernel: JITFunction, grid: tuple[int, ...], *args: Any, **options: Any) -> Launch:
    """What a kernel's body returns: run ``kernel[grid](*args, **options)``."""
    return Launch(kernel, grid, args, options)


class _Scratch(threading.local):
    """Memory that lasts as long as one call's launches."""

    taken: list[Tensor]

    def __init__(self) -> None:
        self.taken = []

    def __call__(self, *shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        tensor = torch.empty(shape, dtype=dtype, device=device)
        self.taken.append(tensor)
        return tensor


scratch = _Scratch()
_constants: dict[int, Tensor] = {}  # by id; kept, so that no other tensor gets that id


@functools.cache
def constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """A float32 tensor that is never freed nor written, for launches to read."""
    tensor = torch.tensor(values, dtype=torch.float32, device=device)
    _constants[id(tensor)] = tensor
    return tensor


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from tensors_in(value)


class Bindable(tuple):
    """A record of tensors that never change: what ``signature_of`` and ``addresses_of`` say of it is remembered."""

    @functools.cached_property
    def signature(self) -> tuple:
        return signature_of(tuple(self))

    @functools.cached_property
    def addresses(self) -> list[int]:
        return addresses_of(tuple(self))

    def __getstate__(self) -> None:
        """A copy or a pickle has tensors of its own, so what is remembered of these stays behind."""


def signature_of(values: tuple | list) -> tuple:
    """All that the launches of a call depend on, apart from addresses; hashable."""
    return tuple(
        [
            (value.shape, value.stride(), value.dtype, value.device, value.data_ptr() & 15)
            if isinstance(value, Tensor)
            else value
            if not isinstance(value, (tuple, list))
            else value.signature
            if isinstance(value, Bindable)
            else signature_of(value)
            for value in values
        ]
    )


def addresses_of(values: Iterable[Any]) -> list[int]:
    """The address of each tensor, in the order of ``tensors_in``."""
    found: list[int] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value.data_ptr())
        elif isinstance(value, Bindable):
            found += value.addresses
        elif isinstance(value, (tuple, list)):
            found += addresses_of(value)
    return found


class _Address(NamedTuple):
    """Where a tensor of a launch begins."""

    source: int  # of the arguments' tensors, then the results, then scratch
    offset: int  # bytes


class _Boxes(NamedTuple):
    """A tensor descriptor of a launch. Triton encodes it at each launch, so it is given the address of the call."""

    descriptor: TensorDescriptor  # without its tensor
    address: _Address

    def at(self, address: int) -> TensorDescriptor:
        made = copy.copy(self.descriptor)
        made.base = _Memory(address)
        return made


class _Memory(NamedTuple):
    """What a tensor descriptor asks of its tensor."""

    address: int

    def data_ptr(self) -> int:
        return self.address


class BoundLaunches:
    """Compiled kernels with all they are launched with, apart from addresses."""

    def __init__(self, results: list[Tensor], is_tuple: bool, scratches: list[Tensor], runs: list[tuple]):
        self._results = [(tensor.shape, tensor.dtype, tensor.device) for tensor in results]
        self._scratches = [(tensor.shape, tensor.dtype, tensor.device) for tensor in scratches]
        self._is_tuple, self._runs = is_tuple, runs

    @classmethod
    def bind(
        cls, values: tuple, out: Any, scratches: list[Tensor], launches: list[Launch], compiled: list[Any]
    ) -> BoundLaunches | None:
        """None where an address could come from two sources: the call then goes the long way each time."""
        results = [] if out is None else list(out) if isinstance(out, tuple) else [out]
        sources = [*tensors_in(values), *results, *scratches]
        runs = []
        for one, kernel in zip(launches, compiled, strict=True):
            named = {**dict(zip(one.kernel.arg_names, one.args, strict=False)), **one.options}
            template = [_templated(named[name], sources) for name in one.kernel.arg_names]
            if any(_is_unknown(entry) for entry in template):
                return None
            grid = (*one.grid, 1, 1)[:3]
            pointers = [(i, entry.source, entry.offset) for i, entry in enumerate(template) if type(entry) is _Address]
            tuples = [(i, entry) for i, entry in enumerate(template) if _holds_address(entry)]
            runs.append((kernel[grid], template, pointers, tuples))
        return cls(results, isinstance(out, tuple), scratches, runs)

    def __call__(self, values: tuple, out: Any = None) -> Any:
        """Launch, into ``out`` if it is given."""
        if out is None:
            results = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in self._results]
        else:
            results = list(out) if isinstance(out, tuple) else [out]
        scratches = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in self._scratches]
        addresses = addresses_of((*values, *results, *scratches))
        for run, template, pointers, tuples in self._runs:
            args = template.copy()
            for position, source, offset in pointers:
                args[position] = addresses[source] + offset
            for position, entry in tuples:
                args[position] = _filled(entry, addresses)
            run(*args)
        if self._is_tuple:
            return tuple(results)
        return results[0] if results else None


_UNKNOWN = object()


def _templated(value: Any, sources: list[Tensor]) -> Any:
    """A tensor's source, a descriptor with it, a tuple of such, or the value itself."""
    if isinstance(value, tuple):
        return tuple(_templated(one, sources) for one in value)
    if isinstance(value, TensorDescriptor):
        without = copy.copy(value)
        without.base = None
        return _Boxes(without, _templated(value.base, sources))
    if not isinstance(value, Tensor):
        return value
    if id(value) in _constants:
        return value.data_ptr()
    same = [i for i, source in enumerate(sources) if source is value]
    if not same:  # a view
        storage = value.untyped_storage().data_ptr()
        same = [i for i, source in enumerate(sources) if source.untyped_storage().data_ptr() == storage]
    if len(same) != 1:
        return _UNKNOWN
    return _Address(same[0], value.data_ptr() - sources[same[0]].data_ptr())


def _is_unknown(entry: Any) -> bool:
    return entry is _UNKNOWN or (isinstance(entry, tuple) and any(map(_is_unknown, entry)))


def _holds_address(entry: Any) -> bool:
    """Whether it is a tuple with an address somewhere in it."""
    return (
        type(entry) is not _Address
        and isinstance(entry, tuple)
        and any(type(one) is _Address or _holds_address(one) for one in entry)
    )


def _filled(entry: Any, addresses: list[int]) -> Any:
    if type(entry) is _Address:
        return addresses[entry.source] + entry.offset
    if type(entry) is _Boxes:
        return entry.at(_filled(entry.address, addresses))
    return tuple([_filled(one, addresses) for one in entry]) if isinstance(entry, tuple) else entry
