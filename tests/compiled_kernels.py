"""Which kernels Triton compiles for some launches."""

import inspect

from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction


def kind(value, specialised=True):
    """What Triton compiles anew for, of an argument: its type, and of a number or an address whether 16 divides it."""
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, tuple):
        return type(value), *map(kind, value)
    if isinstance(value, int) and specialised:
        return int, value == 1, value % 16 == 0
    return type(value)


def compiled(launches):
    """The set of different kernels among launches."""
    found = set()
    for one in launches:
        parameters = inspect.signature(one.kernel.fn).parameters
        named = {**dict(zip(parameters, one.args, strict=False)), **one.options}
        options = one.kernel.kwargs if isinstance(one.kernel, InterpretedFunction) else vars(one.kernel)
        free = options.get("do_not_specialize") or ()
        constant = {name for name, p in parameters.items() if "constexpr" in str(p.annotation)}
        arguments = [
            (name, value if name in constant or name not in parameters else kind(value, name not in free))
            for name, value in named.items()
        ]
        found.add((one.kernel.fn.__name__, *arguments))
    return found
