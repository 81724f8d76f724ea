"""Compile every kernel at the shapes of real models for four targets, without a GPU.

    python benchmarks/compile_matrix.py                    the whole matrix, written to docs/compile_matrix.csv
    python benchmarks/compile_matrix.py --kernels REGEX    kernels whose name matches; replaces only their rows
    python benchmarks/compile_matrix.py --fast             each kernel once, for two targets; nothing written
    python benchmarks/compile_matrix.py --check            compare the table's launches with today's; compile nothing

``registry`` calls each kernel at the shapes of a model, on tensors that claim to be on a GPU but have no memory. Each
launch is intercepted on its way to Triton, with the arguments, tile sizes and options that were chosen for that target.
So the matrix cannot drift from the code.

Fails on a compile error, on spilled registers beyond ``SPILLS_ALLOWED``, on more shared memory than a block may have,
and on a kernel of ``rooflama.kernels`` that no call reaches.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fnmatch
import hashlib
import importlib
import io
import json
import multiprocessing
import os
import pkgutil
import re
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)  # an interpreted kernel cannot be compiled

import numpy as np
import torch
import triton
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.jit import JITFunction, MockTensor

from compile_table import Row, differences, launches_in, summary, write
from model_calls import EVERYTHING
from registry import calls

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "compile_matrix.csv"
CACHE = ROOT / "build" / "compile_matrix"


@dataclass(frozen=True)
class Target:
    """A GPU to compile for: what Triton and torch report about it."""

    gpu: GPUTarget
    shared_bytes: int  # the most a block may use
    multiprocessors: int
    capability: tuple[int, int]


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 166_912, 108, (8, 0)),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 232_448, 132, (9, 0)),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 232_448, 148, (10, 0)),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 65_536, 304, (9, 4)),
}

# (kernel, target), shell patterns: the spilled bytes (Nvidia) or registers (AMD) that pass, and why they do.
SPILLS_ALLOWED: dict[tuple[str, str], tuple[int, str]] = {
    ("_attention_prefill_kernel", "sm_80"): (
        8,
        "255 registers are not quite enough for head_dim 128 with codes; a smaller tile would have to be measured on "
        "such a chip first",
    ),
    ("_attention_prefill_kernel", "sm_100"): (
        16,
        "head_dim 64, where the compiler stays at 128 registers; the tile is that of sm_90, unmeasured on such a chip",
    ),
    ("_attention_prefill_hopper_kernel", "sm_90"): (
        68,
        "windows and pages of 16: mostly what a consumer needs of its block, stored before its walk over the keys and "
        "loaded after it",
    ),
    ("_wgmma_kernel", "sm_90"): (
        64,
        "Q4_K and Q2_K at 64 tokens in splits: four words per block of 256 columns. With as many registers as they ask "
        "for, one program fits a multiprocessor instead of two",
    ),
    ("_fixed_point_kernel", "sm_100"): (
        16,
        "Q6_K with the norm and SwiGLU joined, at 255 registers; the tile is that of sm_90, unmeasured on such a chip",
    ),
    ("_gemv_kernel", "sm_100"): (
        8,
        "Q4_K with the norm and SwiGLU joined, at 255 registers; the tile is that of sm_90, unmeasured on such a chip",
    ),
}

# The first that occurs counts: a tcgen05 kernel may also contain mma.sync.
MATRIX_INSTRUCTIONS = ("tcgen05.mma", "wgmma.mma_async", "mma.sync", "v_mfma", "v_smfmac")


@dataclass(frozen=True)
class Launch:
    """One specialisation of a kernel, as Triton would compile it."""

    kernel: str
    arguments: str  # one per parameter: type, ":16" if divisible by 16, or name=value of a constant
    options: str
    call: str  # the first call that led here
    function: JITFunction = dataclasses.field(compare=False)
    source: ASTSource = dataclasses.field(compare=False)
    compile_options: dict[str, Any] = dataclasses.field(compare=False)


def _index_without_device(tensor: FakeTensor, index: Any) -> torch.Tensor:
    """``tensor[index]`` for slices and numbers. torch's own indexing needs a driver."""
    with unset_fake_temporarily():
        view = torch.empty_strided(tensor.shape, tensor.stride(), device="meta")[index]
    return tensor.as_strided(view.shape, view.stride(), tensor.storage_offset() + view.storage_offset())


def _copy_without_device(tensor: FakeTensor, source: torch.Tensor) -> FakeTensor:
    source.expand(tensor.shape)  # raises if it does not fit
    return tensor


def _assign_without_device(tensor: FakeTensor, index: Any, value: torch.Tensor) -> None:
    _copy_without_device(_index_without_device(tensor, index), value)


def _tensor_without_device(data: Any, *, dtype: torch.dtype = torch.float32, device: Any = "cuda") -> torch.Tensor:
    return torch.empty(np.shape(data), dtype=dtype, device=device)


@contextlib.contextmanager
def pretend_device(target: Target) -> Iterator[None]:
    """Allow tensors on "cuda", and report ``target`` as the device."""
    properties = SimpleNamespace(
        name=str(target.gpu.arch),
        shared_memory_per_block_optin=target.shared_bytes,
        multi_processor_count=target.multiprocessors,
        warp_size=target.gpu.warp_size,
        major=target.capability[0],
        minor=target.capability[1],
        gcnArchName=str(target.gpu.arch),
    )
    driver = SimpleNamespace(get_current_target=lambda: target.gpu, get_current_device=lambda: 0)
    with (
        mock.patch.object(triton.runtime.driver, "_active", driver),
        mock.patch("torch.version.hip", "6.4" if target.gpu.backend == "hip" else None),
        mock.patch("torch.cuda.is_available", return_value=True),
        mock.patch("torch._subclasses.fake_tensor.init_gpu_context"),  # of torch 2.11, which asks is_available
        mock.patch("torch.cuda.current_device", return_value=0),
        mock.patch("rooflama.kernels.kernel.is_traced", return_value=False),
        mock.patch("rooflama.kernels.kernel.signature_of", return_value=None),  # a fake tensor has no address
        mock.patch("rooflama.kernels.kernel.BoundLaunches.bind", return_value=None),
        mock.patch("torch.cuda.get_device_properties", return_value=properties),
        mock.patch("torch.cuda.get_device_capability", return_value=target.capability),
        mock.patch("torch.tensor", _tensor_without_device),
        mock.patch.object(FakeTensor, "__getitem__", _index_without_device, create=True),
        mock.patch.object(FakeTensor, "__setitem__", _assign_without_device, create=True),
        mock.patch.object(FakeTensor, "copy_", _copy_without_device, create=True),
        FakeTensorMode(),
        torch.device("cuda"),
    ):
        yield


class _Pointer(MockTensor):
    """The properties of a tensor that specialise a kernel: its dtype and the alignment of its first element."""

    def __init__(self, tensor: torch.Tensor):
        super().__init__(tensor.dtype)
        self.offset = tensor.storage_offset() * tensor.element_size()

    def data_ptr(self) -> int:
        return self.offset


def _without_memory(value: Any) -> Any:
    """A launch's argument in the form that Triton's binder takes, with the tensors of tuples replaced too."""
    if isinstance(value, torch.Tensor):
        return _Pointer(value)
    if isinstance(value, TensorDescriptor):
        return dataclasses.replace(value, base=_Pointer(value.base))
    if isinstance(value, tuple):
        return getattr(type(value), "_make", tuple)(map(_without_memory, value))
    return value


def _describe(arguments: dict, signature: dict, constants: dict, attributes: dict) -> str:
    def word(path: tuple[int, ...], name: str, value: Any, kind: Any) -> str:
        if path in constants:
            return f"{name}={constants[path]}"
        if isinstance(kind, tuple):
            fields = getattr(value, "_fields", map(str, range(len(value))))
            items = enumerate(zip(fields, value, kind, strict=True))
            return f"{name}({' '.join(word((*path, i), *item) for i, item in items)})"
        return kind + (":16" if any("divisibility" in str(a) for a in attributes.get(path, [])) else "")

    return " ".join(word((i,), name, arguments[name], kind) for i, (name, kind) in enumerate(signature.items()))


class Recorder:
    """Records launches instead of running them while its ``with`` block runs. ``call`` names the current call."""

    def __init__(self) -> None:
        self.launches: dict[Launch, None] = {}
        self.call = ""

    def _catch(self, function: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        args = tuple(map(_without_memory, args))
        _, _, _, backend, bind = function.create_binder()
        bound, specialization, options = bind(*args, **{"debug": False, **kwargs})
        options, signature, constants, attributes = function._pack_args(backend, kwargs, bound, specialization, options)
        defaults = backend.parse_options({})
        changed = {k: v for k, v in vars(options).items() if v != getattr(defaults, k) and k != "debug"}
        changed |= {"num_warps": options.num_warps, "num_stages": options.num_stages}
        launch = Launch(  # its ASTSource is create_binder's: Gluon has one of its own
            kernel=function.__name__,
            arguments=_describe(bound, signature, constants, attributes),
            options=" ".join(f"{k}={v}" for k, v in sorted(changed.items())),
            call=self.call,
            function=function,
            source=function.ASTSource(function, signature, constants, attributes),
            compile_options=vars(options),
        )
        key = dataclasses.replace(launch, call="")
        self.launches.setdefault(key, launch)

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        recorder = self

        def run(function: JITFunction, *args: Any, **kwargs: Any) -> None:
            recorder._catch(function, *args, **kwargs)

        with mock.patch.object(JITFunction, "run", run):
            yield


def record(target: Target, models: list[str]) -> tuple[list[Launch], list[str]]:
    """(launches of all calls of ``models`` on ``target``, each specialisation once; calls that failed)."""
    recorder, failed = Recorder(), []
    with pretend_device(target), recorder.recording():
        for model, call in calls(models):
            recorder.call = " ".join(filter(None, (model, call.function.__name__, call.note)))
            try:
                call.function(*call.args, **call.kwargs)
            except Exception as error:
                failed.append(f"{recorder.call}: {type(error).__name__}: {error}")
    return list(recorder.launches.values()), failed


def resources(launch: Launch, target: Target) -> tuple[int, int, int, str, str]:
    """(registers, spills, shared bytes, matrix instruction, problem) of a launch compiled for ``target``.

    Cached between runs for as long as the kernel's source and Triton stay the same.
    """
    identity = (launch.source.hash(), target.gpu, sorted(launch.compile_options.items()), triton.__version__)
    cached = CACHE / f"{hashlib.sha256(repr(identity).encode()).hexdigest()}.json"
    if cached.exists():
        return tuple(json.loads(cached.read_text()))
    log = io.StringIO()
    try:
        with contextlib.redirect_stdout(log):
            kernel = triton.compile(launch.source, target=target.gpu, options=launch.compile_options)
    except Exception as error:
        reason = str(error).strip().splitlines()
        return 0, 0, 0, "", f"{type(error).__name__}: {' '.join(reason[-3:])}"
    if target.gpu.backend == "cuda":
        code, report = kernel.asm["ptx"], log.getvalue()
        registers = max(map(int, re.findall(r"Used (\d+) registers", report)))
        spills = sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", report)))
    else:
        code = report = kernel.asm["amdgcn"]
        registers = max(map(int, re.findall(r"\.vgpr_count:\s+(\d+)", report)))
        spills = sum(map(int, re.findall(r"\.vgpr_spill_count:\s+(\d+)", report)))
    instruction = next((name for name in MATRIX_INSTRUCTIONS if name in code), "")
    found = (registers, spills, kernel.metadata.shared, instruction, "")
    cached.write_text(json.dumps(found))
    return found


def problem_of(row: Row) -> str:
    """The rule that this row breaks, or an empty string."""
    if row.problem:
        return row.problem
    limit = TARGETS[row.target].shared_bytes
    if row.shared_bytes > limit:
        return f"{row.shared_bytes:,} bytes of shared memory, a block has {limit:,}"
    allowed = max(
        (
            bound
            for (kernel, target), (bound, _) in SPILLS_ALLOWED.items()
            if fnmatch.fnmatch(row.kernel, kernel) and fnmatch.fnmatch(row.target, target)
        ),
        default=0,
    )
    return f"{row.spills} spilled, {allowed} allowed" if row.spills > allowed else ""


def compile_target(name: str, models: list[str], pattern: str, fast: bool) -> tuple[list[Row], list[str]]:
    """(the table's rows for one target, calls that failed). Needs a process of its own: launchers cache the device."""
    CACHE.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
    triton.knobs.compilation.always_compile = True  # ptxas reports registers only while it runs
    triton.knobs.nvidia.dump_ptxas_log = True
    target, rows = TARGETS[name], []
    launches, failed = record(target, models)
    if fast:
        launches = list({launch.kernel: launch for launch in reversed(launches)}.values())
    for launch in launches:
        if not re.search(pattern, launch.kernel):
            continue
        (CACHE / f"{name}.current").write_text(f"{launch.call}: {launch.kernel} {launch.arguments}")
        start = time.perf_counter()
        found = resources(launch, target)
        row = Row(launch.kernel, name, launch.call, launch.arguments, launch.options, *found, triton.__version__)
        rows.append(dataclasses.replace(row, problem=problem_of(row), seconds=time.perf_counter() - start))
    return rows, [f"{name}: {failure}" for failure in failed]


def specialisations(name: str) -> set[tuple[str, ...]]:
    """The columns of the table's rows for one target that need no compilation."""
    launches, _ = record(TARGETS[name], [])
    return {(launch.kernel, name, launch.call, launch.arguments, launch.options) for launch in launches}


def all_kernels() -> set[str]:
    """Every kernel that a launcher of rooflama.kernels can start: jitted functions named ``..._kernel``."""
    package = importlib.import_module("rooflama.kernels")
    found = set()
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        found |= {n for n, f in vars(module).items() if isinstance(f, JITFunction) and n.endswith("_kernel")}
    return found


def check_table(path: Path) -> int:
    """1 if the table lacks a launch of today's code, or has one that no longer exists."""
    written = launches_in(path)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=spawn, max_tasks_per_child=1) as pool:
        launched = set().union(*pool.map(specialisations, TARGETS))
    found = differences(written, launched)
    print(f"{len(written)} rows, {len(launched)} launches, {len(found)} of one alone")
    if found:
        print(*found, "Run make compile-matrix.", sep="\n", file=sys.stderr)
    return 1 if found else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="each kernel once, for sm_90 and gfx942; nothing written")
    parser.add_argument("--check", action="store_true", help="compare the table's rows with today's launches")
    parser.add_argument(
        "--kernels", default="", metavar="REGEX", help="only kernels whose name matches; no other rows are written"
    )
    parser.add_argument(
        "--targets", nargs="+", choices=TARGETS, default=list(TARGETS), help="only these; nothing written"
    )
    parser.add_argument("--models", nargs="+", default=[], help="only these, by name; nothing written")
    parser.add_argument("--output", type=Path, default=TABLE)
    options = parser.parse_args()
    if options.check:
        return check_table(options.output)
    if options.fast:
        options.targets, options.models = ["sm_90", "gfx942"], [EVERYTHING]

    start = time.perf_counter()
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=spawn, max_tasks_per_child=1) as pool:
        jobs = [
            pool.submit(compile_target, name, options.models, options.kernels, options.fast) for name in options.targets
        ]
        try:
            parts = [job.result() for job in jobs]
        except BrokenProcessPool:
            for current in sorted(CACHE.glob("*.current")):
                print(f"the compiler crashed; {current.stem} was at {current.read_text()}", file=sys.stderr)
            return 1
    rows = [row for part, _ in parts for row in part]
    print(summary(rows))

    problems = [failure for _, failed in parts for failure in failed]
    problems += [
        f"{row.kernel} {row.target} ({row.call}): {row.problem}\n    {row.arguments}" for row in rows if row.problem
    ]
    missed = {name for name in all_kernels() if re.search(options.kernels, name)} - {row.kernel for row in rows}
    problems += [f"{name}: no call in benchmarks/registry reaches it" for name in sorted(missed)]
    print(f"{len(rows)} specialisations in {time.perf_counter() - start:.0f} s, {len(problems)} problems")
    for problem in problems:
        print(problem, file=sys.stderr)
    if not (problems or options.models) and options.targets == list(TARGETS):
        write(rows, options.output, options.kernels)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
