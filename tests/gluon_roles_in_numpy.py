"""The Gluon kernel of prefill attention on the CPU: its own source, with NumPy in the place of Gluon.

Like ``gluon_in_numpy``, for a kernel whose partitions run side by side. Here they run on threads, one at a time.
Whenever a partition waits for a barrier, arrives at one or starts a copy, ``random`` chooses who goes on: a partition
that can, or a copy that has been started. So a seed is a schedule. Products are computed when they are waited for, or
at once: ``random`` chooses too. If nobody can go on, the partitions raise ``Deadlock``.
"""

from __future__ import annotations

import ast
import functools
import inspect
import random
import threading
from collections.abc import Callable
from types import CodeType, ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from gluon_in_numpy import DTYPES, DType, Pointer, Shared, Tensor
from rooflama.kernels import (
    attention_common,
    attention_prefill_blocks,
    attention_prefill_hopper,
    attention_prefill_hopper_roles,
    attention_prefill_hopper_softmax,
    attention_prefill_hopper_tiles,
)
from rooflama.kernels.bound import Launch

MODULES = (
    attention_common,
    attention_prefill_blocks,
    attention_prefill_hopper_tiles,
    attention_prefill_hopper_softmax,
    attention_prefill_hopper_roles,
    attention_prefill_hopper,
)


class Deadlock(Exception):
    """Every partition waits for another one."""


class Schedule:
    """Which of several partitions runs, or whether a copy arrives instead."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.late = self.random.random() < 0.5  # copies arrive when nothing else can happen
        self.copies: list[Callable[[], None]] = []
        self.failed: BaseException | None = None
        self.waiting: dict[int, Callable[[], bool]] = {}
        self.batons: list[threading.Semaphore] = []
        self.local = threading.local()

    def run(self, partitions: list[Callable[[], None]]) -> None:
        def work(number: int, function: Callable[[], None]) -> None:
            self.local.number, self.local.products = number, []
            self.batons[number].acquire()
            try:
                if not self.failed:
                    function()
            except BaseException as error:
                self.failed = self.failed or error
            self._go_on()

        self.waiting = {number: lambda: True for number in range(len(partitions))}
        self.batons = [threading.Semaphore(0) for _ in partitions]
        threads = [threading.Thread(target=work, args=one) for one in enumerate(partitions)]
        for thread in threads:
            thread.start()
        self._go_on()
        for thread in threads:
            thread.join()
        if self.failed:
            raise self.failed

    def _go_on(self) -> None:
        while self.waiting and not self.failed:
            able = [number for number, is_ready in self.waiting.items() if is_ready()]
            if not able and not self.copies:
                self.failed = Deadlock()
                break
            chosen = self.random.randrange(len(able) + (bool(self.copies) and not (self.late and able)))
            if chosen < len(able):
                del self.waiting[able[chosen]]
                self.batons[able[chosen]].release()
                return
            self._copy()
        for baton in self.batons:  # so that those who wait end too
            baton.release()

    def _copy(self) -> None:
        self.copies.pop(self.random.randrange(len(self.copies)))()

    def pause(self, is_ready: Callable[[], bool] = lambda: True) -> None:
        """Let others go on until it is chosen again, which it can be when ``is_ready``."""
        self.waiting[self.local.number] = is_ready
        self._go_on()
        self.batons[self.local.number].acquire()
        if self.failed:
            raise self.failed


class Barrier:
    """An mbarrier: its phase is complete when all have arrived and all bytes too."""

    def __init__(self) -> None:
        self.count = self.missing = self.bytes = self.phase = 0

    def settle(self) -> None:
        assert self.missing >= 0, "more arrive than the barrier counts"
        if self.missing == 0 and self.bytes == 0:
            self.phase, self.missing = self.phase + 1, self.count


class Barriers:
    def __init__(self, number: int):
        self.barriers, self.shape = [Barrier() for _ in range(number)], (number, 1)

    def index(self, i: int) -> Barrier:
        return self.barriers[int(i)]


class Box(NamedTuple):
    """A tensor descriptor of ``pages`` [num_pages, num_kv_heads, page_size, head_dim]."""

    pages: np.ndarray
    block_shape: list[int]  # [1, 1, rows, columns]
    layout: Any = None

    @property
    def shape(self) -> list[Values]:
        return [values(np.int32(length)) for length in self.pages.shape]

    def at(self, page: int, head: int, slot: int, column: int) -> np.ndarray:
        """[rows, columns]; 0 outside of the pages."""
        rows, columns = self.block_shape[2:]
        box = np.zeros((rows, columns), self.pages.dtype)
        if 0 <= page < len(self.pages):
            found = self.pages[page, head, slot : slot + rows, column : column + columns]
            box[: found.shape[0], : found.shape[1]] = found
        return box


class Tiles(Shared):
    """Shared memory [..., rows, columns]."""

    def __init__(self, array: np.ndarray, dtype: DType):
        super().__init__(array)
        self.dtype = dtype

    def index(self, i: int) -> Tiles:
        return Tiles(self.array[int(i)], self.dtype)

    def slice(self, start: int, length: int, dim: int) -> Tiles:
        assert dim == 0
        return Tiles(self.array[start : start + length], self.dtype)

    def permute(self, order: tuple[int, ...]) -> Tiles:
        return Tiles(self.array.transpose(order), self.dtype)

    def store(self, values: Tensor) -> None:
        self.array[...] = values

    def _reinterpret(self, dtype: DType, shape: list[int], layout: Any) -> SimpleNamespace:
        """A stage's parts of ``columns`` lie one after another, each from its first rows to its last."""
        _, _, _, rows, columns = shape
        _, height, width = self.shape
        down, across = height // rows, width // columns
        assert shape[0] == self.shape[0] * down * across

        def index(i: int) -> np.ndarray:
            stage, part, box = int(i) // (down * across), int(i) // down % across, int(i) % down
            return self.array[
                stage, box * rows : (box + 1) * rows, part * columns : (part + 1) * columns
            ]  # fmt: skip

        return SimpleNamespace(index=index)


class Values(Tensor):
    """A tensor whose ``type.layout`` says nothing."""

    @property
    def type(self) -> SimpleNamespace:
        return _TYPE


_LAYOUT = SimpleNamespace()
_LAYOUT.parent = _LAYOUT
_TYPE = SimpleNamespace(layout=_LAYOUT)


def values(x: Any) -> Values:
    return np.asarray(x).view(Values)


class Machine:
    """What the kernel's source finds under Gluon's names. ``program`` is the program's number."""

    def __init__(self, seed: int, num_programs: int):
        self.schedule, self.program, self.num_programs = Schedule(seed), 0, num_programs

    def wait(self, barrier: Barrier, parity: int) -> None:
        self.schedule.pause(lambda: barrier.phase % 2 != parity)

    def arrive(self, barrier: Barrier, count: int = 1) -> None:
        barrier.missing -= count
        barrier.settle()
        self.schedule.pause()

    def expect(self, barrier: Barrier, num_bytes: int) -> None:
        barrier.bytes += num_bytes
        barrier.missing -= 1

    def copy(self, box: Box, where: list[int], barrier: Barrier, place: np.ndarray) -> None:
        def arrive() -> None:
            place[...] = box.at(*map(int, where))
            barrier.bytes -= place.nbytes
            barrier.settle()

        self.schedule.copies.append(arrive)
        self.schedule.pause()

    def multiply(self, a: Any, b: Tiles, acc: Any, use_acc: bool = True, is_async: bool = True) -> list:
        """A list that will hold the product."""
        result: list = []

        def compute() -> None:
            left = a.array if isinstance(a, Tiles) else a
            before = acc[0] if isinstance(acc, list) else acc
            product = np.asarray(left, np.float32) @ np.asarray(b.array, np.float32)
            result.append(values(product + before if use_acc else product))

        self.schedule.local.products.append(compute)
        if self.schedule.random.random() < 0.5:
            self._compute(0)
        return result

    def _compute(self, most: int) -> None:
        products = self.schedule.local.products
        while len(products) > most:
            products.pop(0)()

    def wait_products(self, most: int, deps: tuple) -> Any:
        self._compute(most)
        found = tuple(one[0] if isinstance(one, list) else one for one in deps)
        return found if len(found) > 1 else found[0]

    def specialize(self, partitions: list[tuple], warps: list[int], registers: list[int]) -> None:
        self.schedule.run([lambda f=f, args=args: f(*args) for f, args in partitions])

    def load(self, pointer: Pointer, mask: Any = True, other: Any = 0) -> Values:
        offsets, mask = np.broadcast_arrays(pointer.offset, mask)
        assert ((offsets >= 0) & (offsets < len(pointer.memory)) | ~mask).all()
        return values(np.where(mask, pointer.memory[np.where(mask, offsets, 0)], pointer.memory.dtype.type(other)))

    def store(self, pointer: Pointer, stored: np.ndarray, mask: np.ndarray) -> None:
        mask = np.broadcast_to(mask, stored.shape)
        offsets = np.broadcast_to(pointer.offset, stored.shape)[mask]
        assert (offsets >= 0).all()
        pointer.memory[offsets] = stored[mask]

    def allocate(self, dtype: DType, shape: list[int], layout: Any) -> Tiles | Barriers:
        poison = np.nan if dtype.numpy.kind == "f" else 0
        return Tiles(np.full(shape, poison, dtype.numpy), dtype) if dtype.name != "int64" else Barriers(shape[0])

    def names(self) -> dict[str, Any]:
        def ignored(*args: Any, **kwargs: Any) -> Any:
            return _LAYOUT

        layouts = ("Slice", "Blocked", "NVMMADistributed", "NVMMAShared", "DotOperand")
        gl = SimpleNamespace(
            **DTYPES,
            **{f"{name}Layout": ignored for name in layouts},
            constexpr=lambda value: value,
            static_range=range,
            program_id=lambda axis: np.int64(self.program),
            num_programs=lambda axis: np.int64(self.num_programs),
            arange=lambda start, stop, layout: values(np.arange(start, stop, dtype=np.int32)),
            zeros=lambda shape, dtype, layout: values(np.zeros(shape, dtype.numpy)),
            zeros_like=lambda x: values(np.zeros_like(x)),
            full=lambda shape, value, dtype, layout: values(np.full(shape, value, dtype.numpy)),
            where=lambda mask, a, b: values(np.where(mask, a, b).astype(np.result_type(a, b))),
            cdiv=lambda a, b: -(-a // b),
            cast=lambda x, dtype: values(np.asarray(x).astype(dtype.numpy)),
            minimum=np.minimum,
            maximum=np.maximum,
            max=lambda x, axis: values(np.max(x, axis)),
            sum=lambda x, axis: values(np.sum(x, axis)),
            abs=np.abs,
            exp2=np.exp2,
            log2=np.log2,
            fma=lambda a, b, c: values((np.asarray(a, np.float64) * b + c).astype(np.float32)),
            load=self.load,
            store=self.store,
            join=lambda a, b: values(np.stack([a, b], axis=-1)),
            split=lambda x: (x[..., 0], x[..., 1]),
            convert_layout=lambda x, layout: x,
            allocate_shared_memory=self.allocate,
            inline_asm_elementwise=_assembly,
            warp_specialize=self.specialize,
        )
        barriers = SimpleNamespace(wait=self.wait, arrive=self.arrive, expect=self.expect, init=_init)
        barriers.MBarrierLayout = ignored
        return {
            "gl": gl,
            "tl": gl,
            "triton": triton,
            "gluon": None,
            "mbarrier": barriers,
            "tma": SimpleNamespace(async_copy_global_to_shared=self.copy),
            "warpgroup_mma": self.multiply,
            "warpgroup_mma_wait": self.wait_products,
            "fence_async_shared": ignored,
            "thread_barrier": ignored,
            **{name: getattr(attention_prefill_hopper_tiles, name) for name in ("Block", "Rings", "Work")},
            "Softmax": attention_prefill_hopper_softmax.Softmax,
        }


def _init(barrier: Barrier, count: int) -> None:
    barrier.count = barrier.missing = count


def _assembly(code: str, constraints: str, args: list, dtype: Any, is_pure: bool, pack: int) -> Any:
    """A move, two float32 rounded to the halves of a word, or a word's halves."""
    if code.startswith("cvt.rn.f16x2.f32 $0, $2, $1"):
        low, high = (np.asarray(one).astype(np.float16).view(np.uint16).astype(np.uint32) for one in args)
        return values(low | high << np.uint32(16)).view(np.int32)
    if code.startswith("mov.b32 {$0, $1}, $2"):
        word = np.ascontiguousarray(args[0]).view(np.uint32)
        return tuple(values((word >> np.uint32(shift)).astype(np.uint16).view(np.float16)) for shift in (0, 16))
    assert code == "mov.b32 $0, $1;"
    return args[0]


@functools.cache
def _definitions(module: ModuleType) -> CodeType:
    """A module's functions for a compiler and its constants, without decorators and what only a compiler has."""
    kept = []
    for node in ast.parse(inspect.getsource(module)).body:
        decorators = [ast.unparse(one).partition("(")[0] for one in getattr(node, "decorator_list", ())]
        is_compiled = any(one.startswith(("gluon.", "triton.")) for one in decorators)
        if is_compiled:
            node.decorator_list = []
        if is_compiled or (isinstance(node, ast.Assign) and "thread_barrier" not in ast.unparse(node)):
            kept.append(ast.unparse(node))
    return compile("from __future__ import annotations\n" + "\n".join(kept), module.__name__, "exec")


def _in_numpy(value: Any) -> Any:
    """A launch's argument, on the memory of its tensors."""
    if isinstance(value, torch.Tensor):
        length = value.untyped_storage().nbytes() // value.element_size() - value.storage_offset()
        memory = value.as_strided((length,), (1,)).numpy()
        return Pointer(memory, DTYPES[str(memory.dtype)])
    if isinstance(value, TensorDescriptor):
        return Box(value.base.as_strided(value.shape, value.strides).numpy(), value.block_shape)
    return type(value)(*map(_in_numpy, value)) if isinstance(value, tuple) else value


def run_hopper(launch: Launch, seed: int) -> None:
    """A launch of ``_attention_prefill_hopper_kernel`` on CPU tensors, its programs in order."""
    machine = Machine(seed, launch.grid[0])
    names = machine.names()
    for module in MODULES:
        exec(_definitions(module), names)
    constants = {name: value for name, value in launch.options.items() if name.isupper()}
    for machine.program in range(launch.grid[0]):
        names[launch.kernel.__name__](*map(_in_numpy, launch.args), **constants)
