"""What is true of every kernel, written once.

    @kernel(checks=_check, output=like("x"), definition=reference.rms_norm)
    def rms_norm(out: Tensor, x: Tensor, weight: Tensor, eps: float) -> Launch:
        return launch(_rms_norm_kernel, (num_tokens,), x, weight, out, ..., BLOCK=block, num_warps=4)

The body gets the allocated result as its first argument, ``out``, which callers do not pass. It returns what to launch.
A call then goes this way:

    traced (torch.compile, make_fx)    the torch operator ``rooflama::rms_norm``, whose fake is ``output``; what is
                                       traced goes the ways below when it runs
    inside ``swap(rms_norm=mine)``     ``mine``, with the arguments as given
    tensors on the CPU                 the NumPy definition, or the launches under Triton's interpreter
    tensors without memory             noted as launches to compile, inside a rehearsal (rehearsal.py)
    tensors on a GPU                   the launches, bound once per signature and then replayed (bound.py)

Kernels compute no gradients: a tensor that requires one is refused.
"""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

from . import launch as configurations
from .backend import INTERPRETED, as_array, as_tensor, forced_backend, runs_numpy
from .bound import BoundLaunches, Launch, launch, scratch, signature_of, tensors_in
from .checks import check
from .errors import KernelInputError
from .facts import Facts
from .rehearsal import note

__all__ = ["KERNELS", "Kernel", "Launch", "kernel", "launch", "like", "nothing", "run_definition", "scratch", "swap"]

P = ParamSpec("P")
Out = TypeVar("Out")

MOST_BOUND = 1024  # signatures of one kernel; beyond that all are bound again

KERNELS: dict[str, Kernel] = {}  # every kernel by its name
_swapped: ContextVar[Mapping[str, Callable[..., Any]]] = ContextVar("rooflama_swapped", default=MappingProxyType({}))


class Kernel(Facts, Generic[P, Out]):
    """A function on tensors: checks, allocation, definition and launches of one kernel. Call it as the function."""

    def __init__(
        self,
        body: Callable[..., Any],
        checks: Callable[..., None],
        output: Callable[..., Any],
        definition: Callable[..., Any],
        mutates: tuple[str, ...],
        by_definition: Callable[[Kernel, dict[str, Any]], Any],
        moves_bits: bool,
    ):
        self.body, self.checks, self.output, self.definition, self.mutates = body, checks, output, definition, mutates
        self._by_definition, self.moves_bits = by_definition, moves_bits
        self.name = self.__name__ = self.__qualname__ = body.__name__
        self.__doc__, self.__module__, self.__wrapped__ = body.__doc__, body.__module__, body
        hints = typing.get_type_hints(body)
        result, *parameters = inspect.signature(body).parameters.values()
        self.__signature__ = inspect.Signature(
            [parameter.replace(annotation=hints[parameter.name]) for parameter in parameters],
            return_annotation=None if hints[result.name] is type(None) else hints[result.name],
        )
        self._names = tuple(parameter.name for parameter in parameters)
        self._defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        self._positional = sum(parameter.kind is parameter.POSITIONAL_OR_KEYWORD for parameter in parameters)
        self._bound: dict[Any, BoundLaunches | None] = {}  # per signature that passed the checks; None: not replayed
        self._operator = _register(self)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Out:
        if is_traced():
            return self._operator(*args, **kwargs)
        swapped = _swapped.get()
        if self.name in swapped:
            return self._call_swapped(swapped, args, kwargs)
        values = self._values(args, kwargs)
        if torch.is_grad_enabled():
            _refuse_gradients(self.name, values)
        return self.run(values)

    def __repr__(self) -> str:
        return f"<kernel {self.name}{self.__signature__}>"

    def rows(self) -> list[tuple[str, str]]:
        """The facts, as (label, value); ``rooflama kernel NAME`` has more."""
        written = [("writes", ", ".join(self.mutates))] if self.mutates else []
        return [
            ("kernel", f"{self.name}{self.__signature__}"),
            *written,
            ("what it does", inspect.getdoc(self) or ""),
            ("definition", inspect.getsource(self.definition).rstrip()),
        ]

    def __reduce__(self) -> str:
        """Copied and pickled by name, as a function is."""
        return self.name

    def _values(self, args: tuple, kwargs: dict[str, Any]) -> tuple:
        """Every argument in the signature's order, defaults filled in. Raises TypeError as a function would."""
        if len(args) <= self._positional:
            defaults, unused = self._defaults, dict(kwargs)
            try:
                rest = [unused.pop(name) if name in unused else defaults[name] for name in self._names[len(args) :]]
            except KeyError:
                pass
            else:
                if not unused:
                    return (*args, *rest)
        self.__signature__.bind(*args, **kwargs)
        raise AssertionError("the signature must have refused these arguments")

    def _call_swapped(self, swapped: Mapping[str, Callable], args: tuple, kwargs: dict[str, Any]) -> Any:
        """The replacement's result. Inside the replacement, this kernel is itself again."""
        with swapped_only({name: function for name, function in swapped.items() if name != self.name}):
            return swapped[self.name](*args, **kwargs)

    def define(self, arguments: dict[str, Any]) -> Any:
        """The definition of all arguments by name, as tensors. It writes the arguments that the kernel writes."""
        return self._by_definition(self, arguments)

    def run(self, values: tuple, out: Any = None) -> Any:
        """Check, then compute, whatever is current: device, gradients, swaps.

        Into ``out``, if another kernel's body has allocated it as ``output`` would.
        """
        first = next(tensors_in(values), None)
        if first is None:
            raise KernelInputError(
                f"{self.name} of no tensor", rule="kernels take tensors", remedy="Convert the arrays"
            )
        device = first.device
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return self._run(values, out, device)
        with torch.cuda.device(device):  # Triton launches on the current device
            return self._run(values, out, device)

    def _run(self, values: tuple, out: Any, device: torch.device) -> Any:
        signature = (configurations.version, signature_of((*values, out))) if replays(device) else None
        if bound := self._bound.get(signature):
            return bound(values, out)
        arguments = dict(zip(self._names, values, strict=True))
        if signature not in self._bound:
            self.checks(**arguments)
        given, out = out, self.output(**arguments) if out is None else out
        if signature is None:
            computed = [value for value in values if not _is_record(type(value))]  # a weight's planes are read as bits
            if runs_numpy(*tensors_in((*computed, out)), computes=not self.moves_bits):
                result = self.define(arguments)
                return result if given is None else given.copy_(result)
        scratches: list[Tensor] = []
        scratch.taken = scratches
        try:
            launches = self.body(out, **arguments)
        finally:
            scratch.taken = []
        bound = None
        if launches is not None:
            launches = [one for one in ([launches] if isinstance(launches, Launch) else launches) if all(one.grid)]
            compiled = list(map(note if device.type == "meta" else run, launches))
            if signature is not None:
                bound = BoundLaunches.bind(values, out, scratches, launches, compiled)
        if signature is not None:
            if len(self._bound) >= MOST_BOUND:
                self._bound.clear()
            self._bound[signature] = bound
        return out

    def forget(self) -> None:
        """Bind every launch anew: something other than the arguments, such as a tile table, has changed."""
        self._bound.clear()


def kernel(
    *,
    checks: Callable[..., None],
    output: Callable[..., Any],
    definition: Callable[..., Any],
    mutates: tuple[str, ...] = (),
    by_definition: Callable[[Kernel, dict[str, Any]], Any] | None = None,
    moves_bits: bool = False,
) -> Callable[[Callable[Concatenate[Out, P], Launch | list[Launch] | None]], Kernel[P, Out]]:
    """Make a kernel of the body that follows.

    Args:
        checks: called with all arguments by name; raises KernelInputError. On a GPU it is called once per signature
            (shapes, strides, dtypes, alignments and numbers). So there it must not depend on the values of tensors,
            nor on their addresses: whether two of them overlap is not checked.
        output: called the same way; allocates the result with ``torch.empty``: a tensor, a tuple of tensors, or None.
        definition: the NumPy function of the same parameters; results are rounded once, to the dtypes of ``output``.
        mutates: names of the arguments that the kernel writes.
        by_definition: how the definition is run on tensors, if ``run_definition`` would convert too much.
        moves_bits: the kernel computes nothing, so Triton's interpreter may run it on bfloat16.

    The body returns a ``launch``, or a list of them in order, and does nothing else. Each tensor that it launches with
    is an argument, a result, ``scratch``, or a view of one of these. A body that also calls torch does everything
    itself and returns None; it then runs at every call. A launch with a 0 in its grid is left out.

    A body uses another kernel through its ``body`` or ``run``, which no swap replaces.
    """

    def decorate(body: Callable[Concatenate[Out, P], Launch | list[Launch] | None]) -> Kernel[P, Out]:
        made: Kernel[P, Out] = Kernel(
            body, checks, output, definition, mutates, by_definition or run_definition, moves_bits
        )
        KERNELS[made.name] = made
        return made

    return decorate


def run_definition(one: Kernel, arguments: dict[str, Any]) -> Any:
    """Convert every argument to NumPy, call the definition, and round its results to tensors like ``output``'s."""
    arrays = {name: _arrays(value) for name, value in arguments.items()}
    results = one.definition(**arrays)
    for name in one.mutates:
        tensor, array = arguments[name], arrays[name]
        if tensor is not None and tensor.data_ptr() != array.ctypes.data:  # else it was written in place
            tensor.copy_(as_tensor(array, like=tensor))
    out = one.output(**arguments)
    if isinstance(out, tuple):
        return tuple(as_tensor(result, like=tensor) for result, tensor in zip(results, out, strict=True))
    return None if out is None else as_tensor(results, like=out)


def like(*names: str) -> Callable[..., Any]:
    """An ``output`` of one result per name, with the shape, dtype and device of the argument of that name."""

    def allocate(**arguments: Any) -> Any:
        tensors = [arguments[name] for name in names]
        results = tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in tensors)
        return results if len(results) > 1 else results[0]

    return allocate


def nothing(**arguments: Any) -> None:
    """The ``output`` of a kernel that only writes its arguments."""


@contextmanager
def swap(**replacements: Callable[..., Any]) -> Iterator[None]:
    """Run other functions in place of kernels inside the ``with`` block, inside loaded models too.

    Args:
        replacements: kernel name -> a callable with that kernel's signature (``rooflama kernel NAME`` shows it), which
            returns tensors of the same shapes and dtypes. Called inside a replacement, the kernel is itself.

    A swap holds for the thread (or asyncio task) that entered it. Blocks may be nested: the inner one wins, by name. A
    model's stream or generation keeps the swaps under which it was started, also when the block has ended. What
    torch.compile or make_fx traced runs the replacements of the block it runs in, wherever it was traced.

    Raises:
        KernelInputError: no kernel has that name, or the replacement cannot be called.
    """
    for name, function in replacements.items():
        known = ", ".join(sorted(KERNELS))
        check(name in KERNELS, f"no kernel is named {name}", f"the kernels are {known}", "Name one of these")
        check(callable(function), f"{name}={function!r}", "a replacement is callable", "Pass a function")
    with swapped_only({**_swapped.get(), **replacements}):
        yield


def current_swaps() -> Mapping[str, Callable[..., Any]]:
    """The replacements that hold here, by kernel name: what ``swapped_only`` takes."""
    return _swapped.get()


@contextmanager
def swapped_only(replacements: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Exactly these replacements inside the ``with`` block, whatever holds around it."""
    token = _swapped.set(replacements)
    try:
        yield
    finally:
        _swapped.reset(token)


def replays(device: torch.device) -> bool:
    """Whether calls for tensors on this device are bound and replayed; only those can be captured as CUDA graphs."""
    return device.type == "cuda" and not INTERPRETED and forced_backend() != "numpy"


def run(one: Launch) -> Any:
    """Launch as Triton does; returns the compiled kernel."""
    return one.kernel[one.grid](*one.args, **one.options)


def is_traced() -> bool:
    return bool(torch.compiler.is_compiling() or torch._C._is_tracing() or torch._C._len_torch_dispatch_stack())


def _arrays(value: Any) -> Any:
    if isinstance(value, Tensor):
        return as_array(value)
    if isinstance(value, torch.dtype):
        return None  # a definition computes in the precision of its inputs; results are rounded afterwards
    return value.numpy() if _is_record(type(value)) else value


def _register(made: Kernel) -> Callable[..., Any]:
    """``torch.ops.rooflama.<name>``, for torch.compile and opcheck; returns a call of it with the kernel's arguments.

    torch operators take no NamedTuples: each field of such an argument is an argument of the operator.
    """
    names, positional_count = made._names, made._positional
    flat: list[inspect.Parameter] = []
    for parameter in made.__signature__.parameters.values():
        if _is_record(parameter.annotation):
            hints = typing.get_type_hints(parameter.annotation)
            flat += [
                parameter.replace(name=f"{parameter.name}_{field}", annotation=_schema_type(hints[field]))
                for field in parameter.annotation._fields
            ]
        else:
            flat.append(parameter)
    for i, parameter in enumerate(flat):  # torch takes no tensor by keyword alone
        if Tensor in (parameter.annotation, *typing.get_args(parameter.annotation)):
            flat[i] = parameter.replace(kind=parameter.POSITIONAL_OR_KEYWORD)

    flat_signature = made.__signature__.replace(parameters=flat)

    def unflatten(args: tuple, kwargs: dict[str, Any]) -> tuple:
        bound = flat_signature.bind(*args, **kwargs)  # torch leaves out arguments that equal their default
        bound.apply_defaults()
        rest = iter(bound.arguments.values())
        return tuple(
            p.annotation(*(_as_tuple(next(rest)) for _ in p.annotation._fields))
            if _is_record(p.annotation)
            else next(rest)
            for p in made.__signature__.parameters.values()
        )

    def implementation(*args: Any, **kwargs: Any) -> Any:
        values = unflatten(args, kwargs)
        if made.name in (swapped := _swapped.get()):
            keywords = zip(names[positional_count:], values[positional_count:], strict=True)
            return made._call_swapped(swapped, values[:positional_count], dict(keywords))
        return made.run(values)

    def fake(*args: Any, **kwargs: Any) -> Any:
        return made.output(**dict(zip(names, unflatten(args, kwargs), strict=True)))

    implementation.__signature__ = flat_signature  # type: ignore[attr-defined]  # torch reads it there
    schema = torch.library.infer_schema(implementation, mutates_args=made.mutates)
    if made.mutates:
        # torch drops trailing arguments that equal their default, and torch 2.11 then fails on a mutated one.
        positional, star, keyword = schema.partition(", *, ")
        schema = re.sub(r"=\w+", "", positional) + star + keyword
    operator = torch.library.custom_op(
        f"rooflama::{made.name}", implementation, mutates_args=made.mutates, schema=schema
    )
    operator.register_fake(fake)
    records = [_is_record(p.annotation) for p in made.__signature__.parameters.values()]

    def call(*args: Any, **kwargs: Any) -> Any:
        values = made._values(args, kwargs)
        positional: list[Any] = []
        for value, record in zip(values[:positional_count], records, strict=False):
            positional += [list(v) if isinstance(v, tuple) else v for v in value] if record else [value]
        return operator(*positional, **dict(zip(names[positional_count:], values[positional_count:], strict=True)))

    return call


def _is_record(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, tuple) and hasattr(annotation, "_fields")


def _schema_type(annotation: Any) -> Any:
    """tuple[X, ...] and tuple[X, X] are lists to torch."""
    return list[typing.get_args(annotation)[0]] if typing.get_origin(annotation) is tuple else annotation  # type: ignore[misc]  # a list of what is known when it runs


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _refuse_gradients(name: str, values: Iterable[Any]) -> None:
    for tensor in tensors_in(values):
        if tensor.requires_grad:
            raise KernelInputError(
                f"{name} of a tensor {list(tensor.shape)} that requires grad",
                rule="kernels compute no gradients",
                remedy="Call it under torch.no_grad(), or detach the tensor",
            )
