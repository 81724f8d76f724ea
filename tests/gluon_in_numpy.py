"""The Gluon kernel of the wgmma regime on the CPU: its own source, with NumPy in the place of Gluon.

Triton's interpreter does not run Gluon. Here layouts mean nothing, since the compiler checks them. What is left is the
arithmetic: which words, columns, scales and stages belong together, and the inline assembly by instructions.

Asynchronous copies and products are done as late as they may be, when they are waited for, or at once (``late``). A
kernel that needs either order is wrong. bfloat16 numbers are float32 ones that were rounded.
"""

from __future__ import annotations

import ast
import inspect
import re
from types import ModuleType, SimpleNamespace

import numpy as np
import torch
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from rooflama.kernels import (
    quantized_fixed_point,
    quantized_wgmma,
    quantized_wgmma_codes,
    quantized_wgmma_ends,
    quantized_wgmma_output,
    quantized_wgmma_scales,
)
from rooflama.kernels.bound import Launch
from rooflama.kernels.reference.quant_layouts import QuantLayout


class DType:
    def __init__(self, name: str):
        self.name, self.numpy = name, np.dtype("float32" if name == "bfloat16" else name)

    def is_bf16(self) -> bool:
        return self.name == "bfloat16"


DTYPES = {n: DType(n) for n in ("int8", "uint8", "int16", "uint16", "int32", "int64", "float16", "float32", "bfloat16")}


def bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 rounded to bfloat16's bits."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).astype(np.uint32).view(np.float32)


class Tensor(np.ndarray):
    type = SimpleNamespace(layout=None)

    def reshape(self, shape) -> Tensor:
        return np.reshape(self, tuple(map(int, shape)))

    def to(self, dtype: DType, bitcast: bool = False) -> Tensor:
        if bitcast:
            return np.ascontiguousarray(self).view(dtype.numpy).view(Tensor)
        return (bfloat16(self) if dtype.is_bf16() else self.astype(dtype.numpy)).view(Tensor)

    def permute(self, *axes: int) -> Tensor:
        return self.transpose(*axes)

    def expand_dims(self, axis: int) -> Tensor:
        return np.expand_dims(self, axis)


def tensor(x) -> Tensor:
    return np.asarray(x).view(Tensor)


class Pointer:
    """Into ``memory`` [n], at element ``offset``."""

    def __init__(self, memory: np.ndarray, dtype: DType | None = None, offset=0):
        self.memory, self.offset, self.dtype = memory, offset, SimpleNamespace(element_ty=dtype)

    def __add__(self, distance) -> Pointer:
        return Pointer(self.memory, self.dtype.element_ty, self.offset + np.asarray(distance))

    def __sub__(self, distance) -> Pointer:
        return self + -distance

    def to(self, dtype: DType) -> Pointer:
        if dtype.is_bf16():
            return self
        assert self.offset == 0
        return Pointer(self.memory.view(dtype.numpy), dtype)

    def at(self, mask: np.ndarray) -> np.ndarray:
        """The offsets where the mask holds, all of them in the memory."""
        offsets = np.broadcast_to(self.offset, mask.shape)[mask]
        assert offsets.min(initial=0) >= 0
        assert offsets.max(initial=0) < len(self.memory)
        return offsets


class Box:
    """A tensor descriptor of ``memory`` [rows, columns]: its first ``height`` rows, or as many further down."""

    def __init__(self, memory: np.ndarray, height: int):
        self.memory, self.block_shape = memory, (height, memory.shape[1])


class Shared:
    """Shared memory, or a barrier in it: copies that are under way, the bytes that must arrive, the phase."""

    def __init__(self, array: np.ndarray):
        self.array, self.shape = array, array.shape
        self.copies: list = []
        self.num_bytes = self.phase = 0

    def index(self, i) -> Shared:
        return Shared(self.array[int(i)])

    def slice(self, start: int, length: int, dim: int) -> Shared:
        assert dim == 0
        return Shared(self.array[start : start + length])

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.array.transpose(order))

    def load(self, layout) -> Tensor:
        return tensor(self.array.copy())


class Product:
    """a @ b (+ what came before), computed when it is first wanted.

    A column's bits do not depend on how many there are, as on a tensor core.
    """

    def __init__(self, a, b, before):
        self.operands, self.result = (a, b, before), None

    def value(self) -> Tensor:
        if self.result is None:
            a, b, before = self.operands
            self.result = tensor((np.asarray(a, float) @ np.asarray(b.array, float)).astype(np.float32))
            if before is not None:
                self.result = self.result + (before.value() if isinstance(before, Product) else before)
        return self.result


def pick_bytes(a, b, selector) -> np.ndarray:
    """prmt: each nibble of the selector names one of the eight bytes of a and b."""
    a, b, selector = np.broadcast_arrays(a, b, selector)
    both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    assert not (selector & 0x8888).any()
    result = np.zeros(a.shape, np.uint32)
    for i in range(4):
        byte = (selector >> np.uint32(4 * i) & 7).astype(np.uint64)
        result |= ((both >> (8 * byte)) & 255).astype(np.uint32) << np.uint32(8 * i)
    return result


def multiply_add(a, b, c=None, exact: bool = True) -> np.ndarray:
    """Two float16 numbers times two others, plus two others: rounded once, or known to be ``exact``."""
    halves = []
    for shift in (0, 16):
        x, y, z = (
            (np.asarray(0 if word is None else word, np.uint32) >> np.uint32(shift) & 0xFFFF)
            .astype(np.uint16)
            .view(np.float16)
            .astype(float)
            for word in (a, b, c)
        )
        result = (x * y + z).astype(np.float16)
        assert not exact or (result == x * y + z).all()
        halves.append(result.view(np.uint16).astype(np.uint32))
    return halves[0] | (halves[1] << np.uint32(16))


INSTRUCTIONS = {
    "mov.b32": lambda a: a,
    "shr.u32": lambda a, n: a >> n,
    "shl.b32": lambda a, n: a << n,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "lop3.b32": lambda a, b, c, table: {0xEA: (a & b) | c}[int(table)],
    "prmt.b32": pick_bytes,
    "neg.f16x2": lambda a: a ^ np.uint32(0x80008000),
    "mul.f16x2": multiply_add,
    "mul.rn.f16x2": lambda a, b: multiply_add(a, b, exact=False),
    "fma.rn.f16x2": multiply_add,
}


def assembly(code: str, constraints, args, dtype, is_pure, pack):
    """``gl.inline_asm_elementwise``: results are 32-bit words, or the two halves of one.

    ``pack`` 2 takes rows r and r + 8 of 16 together, which a lane holds. Empty code changes nothing.
    """
    if not code:
        return args[0]
    dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
    words = [np.asarray(arg).astype(np.uint32) for arg in args]
    if pack == 2:
        words = [word.reshape(-1, 2, 8, *word.shape[1:])[:, row] for word in words for row in range(2)]
    names = {f"${len(dtypes) * pack + i}": word for i, word in enumerate(words)}
    for statement in re.sub(r"\.reg[^;]*;|[\n]", " ", code).split(";"):
        name, _, operands = statement.strip(" {}").partition(" ")
        if not name:
            continue
        target, *sources = re.findall(r"\$?\w+", operands)
        if operands.startswith("{"):
            word = names[sources[1]]
            names[target], names[sources[0]] = word & 0xFFFF, word >> np.uint32(16)
        elif "{" in operands:
            names[target] = names[sources[0]] | (names[sources[1]] << np.uint32(16))
        else:
            values = [names[s] if s in names else np.uint32(int(s, 0)) for s in sources]
            names[target] = np.asarray(INSTRUCTIONS[name](*values), np.uint32)
    results = []
    for i, kind in enumerate(dtypes):
        bits = names[f"${i}"]
        if pack == 2:
            bits = np.stack([names[f"${2 * i + row}"] for row in range(2)], axis=1).reshape(np.shape(args[0]))
        if kind.numpy.itemsize == 2:
            bits = bits.astype(np.uint16)
        results.append(tensor(bits).view(kind.numpy))
    return tuple(results) if isinstance(dtype, tuple) else results[0]


class Machine:
    """What the kernel's source finds under Gluon's names. ``program`` is the program's place in the grid."""

    def __init__(self, late: bool):
        self.late, self.program, self.grid = late, (0, 0), (1, 1)
        self.copies: list = []
        self.groups: list[list] = []
        self.running: list[Product] = []

    def copy(self, target: Shared, source: Pointer, mask) -> None:
        mask = np.broadcast_to(mask, target.shape)
        assert mask.all() or not mask.any()

        def run() -> None:
            target.array[...] = source.memory[source.at(mask)].reshape(target.shape)

        if mask.any() and self.late:
            self.copies.append(run)
        elif mask.any():
            run()

    def commit(self) -> None:
        self.groups.append(self.copies)
        self.copies = []

    def expect(self, barrier: Shared, num_bytes: int, pred=True) -> None:
        barrier.num_bytes += num_bytes * bool(pred)

    def copy_box(self, box: Box, place, barrier: Shared, target: Shared, pred=True) -> None:
        row, column = map(int, place)
        assert column == 0
        assert box.block_shape == target.shape
        assert not pred or 0 <= row <= len(box.memory) - len(target.array)

        def run() -> None:
            target.array[...] = box.memory[row : row + len(target.array)]

        if pred:
            barrier.num_bytes -= target.array.nbytes
            barrier.copies.append(run)
        if pred and not self.late:
            run()

    def wait_full(self, barrier: Shared, phase) -> None:
        assert barrier.num_bytes == 0
        assert barrier.copies
        assert barrier.phase == phase
        for run in barrier.copies if self.late else ():
            run()
        barrier.copies, barrier.phase = [], 1 - barrier.phase

    def wait(self, most: int) -> None:
        while len(self.groups) > most:
            for run in self.groups.pop(0):
                run()

    def multiply(self, a, b, before, use_acc=True, is_async=False) -> Product:
        product = Product(a, b, before if use_acc else None)
        self.running.append(product)
        if not self.late:
            product.value()
        return product

    def wait_products(self, most: int, deps: tuple):
        """The dependency's numbers, or itself if it is one of the last ``most`` products."""
        while len(self.running) > most:
            self.running.pop(0).value()
        (dep,) = deps
        return dep if dep in self.running or not isinstance(dep, Product) else dep.value()

    def load(self, pointer: Pointer, mask=True, other=0, cache_modifier="") -> Tensor:
        mask = np.broadcast_to(mask, np.shape(pointer.offset))
        loaded = np.full(mask.shape, other, pointer.memory.dtype)
        loaded[mask] = pointer.memory[pointer.at(mask)]
        return tensor(loaded)

    def store(self, pointer: Pointer, values, mask=True) -> None:
        mask = np.broadcast_to(mask, values.shape)
        pointer.memory[pointer.at(mask)] = values[mask]

    def add_atomically(self, pointer: Pointer, value, sem: str, scope: str):
        """What was there."""
        before = pointer.memory[int(pointer.offset)]
        pointer.memory[int(pointer.offset)] += value
        return before

    def allocate(self, dtype: DType, shape, layout) -> Shared:
        poison = np.nan if dtype.numpy.kind == "f" else 0x5A5A5A5A
        return Shared(np.full(shape, poison, dtype.numpy))

    def names(self) -> dict:
        def ignored(*args, **kwargs):
            return None

        layouts = ("Slice", "Blocked", "NVMMADistributed", "NVMMAShared", "DotOperand", "SwizzledShared")
        gl = SimpleNamespace(
            **DTYPES,
            **{f"{name}Layout": ignored for name in (*layouts, "DistributedLinear")},
            constexpr=lambda value: value,
            static_range=range,
            program_id=lambda axis: tensor(np.int64(self.program[axis])),
            num_programs=lambda axis: self.grid[axis],
            arange=lambda start, stop, layout: tensor(np.arange(start, stop, dtype=np.int32)),
            zeros=lambda shape, dtype, layout: tensor(np.zeros(shape, dtype.numpy)),
            full=lambda shape, value, dtype, layout: tensor(np.full(shape, value, dtype.numpy)),
            minimum=np.minimum,
            exp=np.exp,
            load=self.load,
            store=self.store,
            atomic_add=self.add_atomically,
            join=lambda a, b: tensor(np.stack([a, b], axis=-1)),
            split=lambda x: (x[..., 0], x[..., 1]),
            broadcast=lambda a, b: tuple(map(tensor, np.broadcast_arrays(a, b))),
            convert_layout=lambda x, layout, assert_trivial: x,
            pointer_type=lambda dtype: dtype,
            inline_asm_elementwise=assembly,
            allocate_shared_memory=self.allocate,
        )
        return {
            "gl": gl,
            "gluon": SimpleNamespace(jit=_undecorated, constexpr_function=_undecorated),
            "async_copy": SimpleNamespace(
                async_copy_global_to_shared=self.copy, commit_group=self.commit, wait_group=self.wait
            ),
            "tma": SimpleNamespace(async_copy_global_to_shared=self.copy_box),
            "mbarrier": SimpleNamespace(MBarrierLayout=ignored, init=ignored, expect=self.expect, wait=self.wait_full),
            "_barrier": ignored,
            "warpgroup_mma": self.multiply,
            "warpgroup_mma_wait": self.wait_products,
            "lookup_assembly": quantized_fixed_point.lookup_assembly,
            "QuantLayout": QuantLayout,
            "SUMS_UNIT": quantized_wgmma_ends.SUMS_UNIT.value,
        }


def _undecorated(function=None, **options):
    return function or (lambda decorated: decorated)


def _definitions(module: ModuleType) -> str:
    """A module's Gluon functions and its constants, but for those that name what only a compiler has."""
    kept = []
    for node in ast.parse(inspect.getsource(module)).body:
        is_gluon = isinstance(node, ast.FunctionDef) and any("gluon" in ast.unparse(d) for d in node.decorator_list)
        if is_gluon or (isinstance(node, ast.Assign) and "_barrier" not in ast.unparse(node)):
            kept.append(ast.unparse(node))
    return "from __future__ import annotations\n" + "\n".join(kept).replace("_LOOKUP.value", "_LOOKUP")


def run_wgmma(late: bool, grid: tuple[int, int], *args, **constants) -> None:
    """``_wgmma_kernel`` for every program of ``grid``, in order; ``args`` as it takes them, with ``Pointer``s."""
    machine = Machine(late)
    names = machine.names()
    for module in (quantized_wgmma_codes, quantized_wgmma_output, quantized_wgmma_scales, quantized_wgmma):
        exec(_definitions(module), names)
    machine.grid = grid
    for x in range(grid[0]):
        for y in range(grid[1]):
            machine.program = (x, y)
            with np.errstate(over="ignore"):  # silu(-100): exp is infinite, as on a GPU
                names["_wgmma_kernel"](*args, **constants)


OF_THE_COMPILER = ("num_warps", "maxnreg", "launch_pdl")


def run_launches(launches: list[Launch], late: bool = False) -> None:
    """A product's launches in order: that of Gluon here, the other by Triton's interpreter."""
    for one in launches:
        if one.kernel is quantized_wgmma._wgmma_kernel:
            constants = {name: value for name, value in one.options.items() if name not in OF_THE_COMPILER}
            run_wgmma(late, one.grid, *map(_in_numpy, one.args), **constants)
        else:
            one.kernel[one.grid](*one.args, **one.options)


def _in_numpy(value):
    """An argument of a launch: tensors as ``Pointer``s, descriptors as ``Box``es."""
    if isinstance(value, torch.Tensor):
        return Pointer(value.numpy().reshape(-1), DTYPES[str(value.dtype).removeprefix("torch.")])
    if isinstance(value, TensorDescriptor):
        return Box(value.base.numpy(), value.block_shape[0])
    return type(value)(*map(_in_numpy, value)) if isinstance(value, tuple) else value
