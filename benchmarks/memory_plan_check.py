"""Compare the memory plan with measurements on a GPU: ``python benchmarks/memory_plan_check.py [--out FILE.csv]``.

Each case runs in a process of its own. It uploads a model of random weights as loading does, runs a short prompt twice,
so that its pass is captured as a CUDA graph, then prefills a prompt in full chunks, and decodes until the step is
captured too. Then it compares three figures with the plan:

    allocated  torch.cuda.max_memory_allocated       the plan's lines without rounding and context
    reserved   torch.cuda.max_memory_reserved        with rounding
    driver     memory.used of nvidia-smi, less what it was before the process    the total

The driver's figure is the larger of two, after the prompt and at the end. The reason: before a capture torch returns to
the driver what the prompt's pass no longer needs.

Exit status 1 if the first or the last figure is off by more than 2%. The GPU is the first that CUDA_VISIBLE_DEVICES
shows; no other program may use it meanwhile.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rooflama.kernels import Weight
from rooflama.loaders.checkpoint import TensorInfo
from rooflama.loaders.device import Device, open_device
from rooflama.loaders.gguf.types import row_nbytes
from rooflama.loading import start_runner
from rooflama.models import (
    CheckpointReader,
    Decoder,
    MemoryPlan,
    ModelConfig,
    Request,
    RopeSpec,
    SamplingParams,
    Sequence,
    TokenEngine,
    adapter_for,
)
from rooflama.models.memory.weights import DryRunSource, config_tensors
from rooflama.models.parallel import Ranks
from rooflama.models.serving.passes import captured_sizes
from rooflama.models.share import ALONE
from rooflama.planning import plan_for_device

ALLOWED = 0.02
NEW_TOKENS = 8
PROMPT_CHUNKS = 3  # the longest prompt; a pass takes no more memory with more chunks

CONTEXTS = {"SmolLM2-135M": (1024, 4096, 8192), "Llama-3-8B": (4096, 32768, 131072)}
KV_DTYPES = ("bfloat16", "int8")


def _config(
    name: str, layers: int, hidden: int, heads: int, kv_heads: int, width: int, vocab: int, tied: bool, base: float
):
    head_dim = hidden // heads
    return ModelConfig(
        architecture="llama",
        name=name,
        num_layers=layers,
        hidden_size=hidden,
        intermediate_size=width,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocab,
        context_length=CONTEXTS.get(name, (8192,))[-1],
        rms_norm_eps=1e-5,
        softmax_scale=head_dim**-0.5,
        rope=RopeSpec(head_dim=head_dim, rotary_dim=head_dim, base=base),
        sliding_windows=(0,) * layers,
        tied_embeddings=tied,
    )


def config_of(name: str) -> ModelConfig:
    if name == "SmolLM2-135M":
        return _config(name, 30, 576, 9, 3, 1536, 49152, True, 1e5)
    if name == "Llama-3-70B":
        return _config(name, 80, 8192, 64, 8, 28672, 128256, False, 5e5)
    if name == "tiny":  # whole blocks of 256, small enough for a CPU
        return _config(name, 2, 256, 4, 2, 256, 512, False, 5e5)
    return _config(name, 32, 4096, 32, 8, 14336, 128256, False, 5e5)


def type_of(config: ModelConfig) -> Callable[[str, tuple[int, ...]], str]:
    """Q4_K_M's mix where rows are whole blocks of 256, else Q4_1 with Q8_0 embeddings, as the demo checkpoint has."""
    if config.hidden_size % 256:
        return lambda name, shape: "Q8_0" if name.startswith("token_embd") else "Q4_1"
    return lambda name, shape: "Q6_K" if name.split(".")[-2] in ("attn_v", "ffn_down", "output") else "Q4_K"


class ShapesOnly:
    """A checkpoint of names, types and shapes."""

    interleaved_rope_rows = False
    norm_offset = 0.0

    def __init__(self, config: ModelConfig):
        rule = type_of(config)
        types = {name: (rule(name, s) if len(s) == 2 else "F32", s) for name, s in config_tensors(config)}
        self.tensors = {
            name: TensorInfo(name, kind, shape, math.prod(shape[:-1]) * row_nbytes(kind, shape[-1]), 0, 0)
            for name, (kind, shape) in types.items()
        }
        self.metadata: Mapping[str, Any] = {"general.architecture": "llama"}


class RandomSource(DryRunSource):
    """Uploads small random numbers and random codes, in the order in which loading uploads."""

    def __init__(
        self, reader: CheckpointReader, device: Device, ranks: Ranks | None = None, batch_invariant: bool = False
    ):
        super().__init__(reader, "triton", ALONE if ranks is None else ranks.share)
        self.device, self.ranks, self.batch_invariant = device, ranks, batch_invariant
        largest = max(info.nbytes for info in reader.checkpoint.tensors.values())
        self._codes = torch.from_numpy(np.random.default_rng(0).integers(0, 256, 2 * largest, np.uint8))

    def _upload(self, weight: Weight, label: str) -> Weight:
        return weight._replace(planes=tuple(self._place(plane, label) for plane in weight.planes))

    def _place(self, tensor: Tensor, label: str) -> Tensor:
        if tensor.dtype.is_floating_point or tensor.dtype.itemsize == 1:  # bytes are the scales of scales
            value = 0.002 if tensor.dtype.is_floating_point else 1
            values = torch.full(tensor.shape, value, dtype=tensor.dtype, device="cpu")
        else:
            values = self._codes[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        return self.device.upload(values, label=label).tensor


def run_case(name: str, context: int, kv_dtype: str, device: Device, prefilled: Callable[[], None]) -> MemoryPlan:
    """Load, prefill and decode on ``device``. Returns the plan that was made before.

    ``prefilled`` is called once, between prefill and decode of the last prompt, which is the longest.
    """
    config = config_of(name)
    reader = CheckpointReader(ShapesOnly(config))
    plan = plan_for_device(reader, config, device, context=context, dtype="auto", kv_dtype=kv_dtype)
    source = RandomSource(reader, device)
    decoder = Decoder.load(source, config, adapter_for("llama"))
    runner = start_runner(decoder, plan, device)
    engine = TokenEngine(runner, prefix_cache=False)  # the second prompt is read like the first
    longest = min(context - NEW_TOKENS, PROMPT_CHUNKS * plan.prefill_chunk)
    short = min(longest - 1, captured_sizes(config)[-1])
    for length in (short, short, longest):
        prompt = np.random.default_rng(0).integers(0, config.vocab_size, length).tolist()
        sequence = Sequence(Request(prompt, NEW_TOKENS, SamplingParams()))
        engine.add(sequence)
        engine.advance(sequence, until=lambda sequence=sequence: bool(sequence.token_ids))
        if length == longest:
            prefilled()
        engine.advance(sequence, until=lambda: False)
    return plan


def gpu_id(index: int = 0) -> str:
    """The driver's name for one of torch's GPUs. nvidia-smi also counts GPUs that CUDA_VISIBLE_DEVICES hides."""
    return f"GPU-{torch.cuda.get_device_properties(index).uuid}"


def driver_used(gpu: str) -> int:
    """Bytes in use on a GPU by all processes, as the driver reports them."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", f"--id={gpu}"]
    return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout) * 2**20


def measure_case(name: str, context: int, kv_dtype: str, gpu: str) -> dict[str, int]:
    """Planned and measured bytes of one case. The process must not have used ``gpu``, its first, before."""
    before = driver_used(gpu)
    used: list[int] = []

    def ask_driver() -> None:
        torch.cuda.synchronize()
        used.append(driver_used(gpu) - before)

    with open_device("cuda") as device:
        plan = run_case(name, context, kv_dtype, device, ask_driver)
        ask_driver()
        return compared(plan, used)


def compared(plan: MemoryPlan, used: list[int]) -> dict[str, int]:
    """Planned and measured bytes. ``used``: what the driver counted for this process, the last time at its end."""
    return {
        "planned_allocated": plan.allocated_bytes,
        "peak_allocated": torch.cuda.max_memory_allocated(),
        "planned_reserved": plan.total_bytes - plan.target.context_bytes,
        "peak_reserved": torch.cuda.max_memory_reserved(),
        "planned_total": plan.total_bytes,
        "driver_used": max(used),
        "outside_torch": used[-1] - torch.cuda.memory_reserved(),
    }


def as_row(name: str, context: int, kv_dtype: str, figures: Mapping[str, int]) -> dict[str, Any]:
    """A line of the table: figures in MiB, and the relative error of each against the measurement."""
    pairs = (("allocated", "peak_allocated"), ("reserved", "peak_reserved"), ("total", "driver_used"))
    row: dict[str, Any] = {"model": name, "context": context, "kv_dtype": kv_dtype}
    for planned, measured in pairs:
        row[f"planned_{planned}_mib"] = f"{figures[f'planned_{planned}'] / 2**20:.1f}"
        row[f"{measured}_mib"] = f"{figures[measured] / 2**20:.1f}"
        row[f"{planned}_error"] = f"{figures[f'planned_{planned}'] / figures[measured] - 1:+.4f}"
    row["outside_torch_mib"] = f"{figures['outside_torch'] / 2**20:.1f}"
    return row


def within(row: Mapping[str, Any]) -> bool:
    """Whether the figures of allocator and driver are within ``ALLOWED`` of the plan."""
    return all(abs(float(row[f"{figure}_error"])) <= ALLOWED for figure in ("allocated", "total"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "memory_plan.csv")
    parser.add_argument("--case", nargs=4, metavar=("MODEL", "CONTEXT", "KV_DTYPE", "GPU"), help="one case, as JSON")
    arguments = parser.parse_args()
    if arguments.case:
        name, context, kv_dtype, gpu = arguments.case
        print(json.dumps(measure_case(name, int(context), kv_dtype, gpu)))
        return
    if not torch.cuda.is_available():
        sys.exit("measuring needs a CUDA GPU")

    from timing import provenance

    arguments.out.parent.mkdir(exist_ok=True)
    all_within, gpu = True, gpu_id()
    cases = [(name, context, kv) for name, contexts in CONTEXTS.items() for context in contexts for kv in KV_DTYPES]
    with arguments.out.open("w", newline="") as file:
        writer = None
        for name, context, kv_dtype in cases:
            command = [sys.executable, __file__, "--case", name, str(context), kv_dtype, gpu]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{name} at {context} with {kv_dtype}:\n{done.stderr}")
            row = as_row(name, context, kv_dtype, json.loads(done.stdout.splitlines()[-1]))
            print("within  " if within(row) else "OUTSIDE ", "  ".join(f"{key} {value}" for key, value in row.items()))
            all_within &= within(row)
            row |= provenance()
            if writer is None:
                writer = csv.DictWriter(file, row)
                writer.writeheader()
            writer.writerow(row)
            file.flush()
    sys.exit(0 if all_within else 1)


if __name__ == "__main__":
    main()
