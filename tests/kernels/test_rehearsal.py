"""Kernels on tensors without memory: what they launch, and for which GPU."""

import os
import subprocess
import sys

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.tools.tensor_descriptor import TensorDescriptor

from rooflama.kernels import INTERPRETED, KernelInputError, attention_decode, rms_norm, swap, swiglu
from rooflama.kernels import launch as configurations
from rooflama.kernels.bound import launch
from rooflama.kernels.gpu import capability, standing_for
from rooflama.kernels.rehearsal import Rehearsal, rehearsal

META = torch.device("meta")
HOPPER = GPUTarget("cuda", 90, 32)


def empty(*shape, dtype=torch.float16):
    return torch.empty(shape, dtype=dtype, device=META)


def test_a_call_allocates_its_result_and_is_noted():
    with rehearsal(HOPPER if not INTERPRETED else None) as found:
        y = rms_norm(empty(3, 64), empty(64, dtype=torch.float32), 1e-5)
    assert (y.shape, y.dtype, y.device) == ((3, 64), torch.float16, META)
    (one,) = found.launches
    assert one.grid == (3,)


def test_calls_that_compile_to_one_kernel_are_noted_once():
    with rehearsal(None) as found:
        for _ in range(2):
            swiglu(empty(4, 64), empty(4, 64))
        assert len(found.launches) == 1
        swiglu(empty(4, 64, dtype=torch.float32), empty(4, 64, dtype=torch.float32))
        assert len(found.launches) == 2
        buffer = empty(4 * 64 + 1)
        swiglu(buffer[1:].view(4, 64), empty(4, 64))  # at an address that 16 does not divide
        assert len(found.launches) == 3


def test_descriptors_are_told_apart_by_tensor_and_box():
    found = Rehearsal()
    for dtype, box in ((torch.float16, 16), (torch.float16, 16), (torch.float16, 32), (torch.float32, 16)):
        described = TensorDescriptor.from_tensor(empty(64, 64, dtype=dtype), [box, box])
        found.note(launch(rms_norm, (1,), described))
    assert len(found.launches) == 3


def test_checks_and_swaps_hold():
    with rehearsal(None) as found:
        with pytest.raises(KernelInputError, match="weight"):
            rms_norm(empty(3, 64), empty(32, dtype=torch.float32), 1e-5)
        with swap(rms_norm=lambda x, weight, eps: x):
            rms_norm(empty(3, 64), empty(64, dtype=torch.float32), 1e-5)
    assert found.launches == []


def test_rehearsals_do_not_mix():
    with rehearsal(None) as outer:
        with rehearsal(None) as inner:
            swiglu(empty(4, 64), empty(4, 64))
        assert (len(inner.launches), outer.launches) == (1, [])
        swiglu(empty(4, 64), empty(4, 64))
    assert len(outer.launches) == 1


def test_outside_a_rehearsal_no_kernel_takes_tensors_without_memory():
    with pytest.raises(KernelInputError, match="tensors on meta"):
        swiglu(empty(4, 64), empty(4, 64))


@pytest.mark.parametrize(
    ("gpu", "names", "version"),
    [
        (HOPPER, ("sm90", "sm90", "any"), (9, 0)),
        (GPUTarget("cuda", 89, 32), ("sm89", "sm80", "any"), (8, 9)),
        (GPUTarget("cuda", 100, 32), ("sm100", "sm90", "any"), (10, 0)),
        (GPUTarget("cuda", 120, 32), ("sm120", "sm80", "any"), (12, 0)),
        (GPUTarget("hip", "gfx942", 64), ("gfx942", "hip", "any"), (0, 0)),
        (None, ("interpreter", "any"), (0, 0)),
    ],
)
def test_tensors_without_memory_stand_for_tensors_on_a_gpu(gpu, names, version):
    with standing_for(gpu):
        assert configurations.gpu_names(META) == names
        assert capability(META) == version
        assert configurations.overlaps(META) == (version >= (9, 0) and not INTERPRETED)


def test_tiles_are_those_of_the_gpu():
    """Of attention over 16-bit pages, which has a row for each GPU."""
    pages, table = empty(4, 16, 2, 64), empty(1, 4, dtype=torch.int32)
    stages = []
    for gpu in (GPUTarget("cuda", 80, 32), GPUTarget("hip", "gfx942", 64)):
        with rehearsal(gpu) as found:
            attention_decode(empty(1, 4, 64), pages, pages, table, empty(1, dtype=torch.int32), softmax_scale=0.125)
        stages.append(found.launches[0].options["num_stages"])
    assert stages == [5, 1]


PROGRAM = """
import torch, triton
from triton.backends.compiler import GPUTarget
from rooflama.kernels import swiglu
from rooflama.kernels.rehearsal import compile_launches, rehearsal, without_gpu

def real(value):
    return torch.empty_like(value, device="cpu") if isinstance(value, torch.Tensor) else value

gpu, calls = GPUTarget("cuda", 90, 32), []
with rehearsal(gpu) as found:
    for size in (64, 128, 100):
        swiglu(*torch.empty(2, 4, size, device="meta", dtype=torch.bfloat16))
with without_gpu(gpu):
    kernels = compile_launches(found.launches, None, lambda done, total: calls.append((done, total)))
    with_memory = [one._replace(args=tuple(map(real, one.args))) for one in found.launches]
    both = compile_launches([*found.launches, *with_memory], None)
print(len(found.launches), kernels, both, calls)
"""


def test_compiling_needs_no_gpu_and_fills_tritons_cache(tmp_path):
    """Tensors with memory need the same kernels. In a process of its own, since this one may interpret its kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.stdout == "3 2 2 [(1, 2), (2, 2)]\n", done.stderr
    assert len(list(tmp_path.rglob("*.cubin"))) == 2
