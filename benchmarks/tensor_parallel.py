"""One model on several GPUs of one host.

    torchrun --nproc-per-node 2 benchmarks/tensor_parallel.py [--out FILE.csv] [--only REGEX]

Weights are random, of the shapes of real models.

    Llama-3-8B BF16, Q4_K_M   decoding one sequence, and prompts of 4,096 tokens; each GPU first runs the model alone
    Llama-3-70B Q8_0          the same, on all GPUs together, and the plan of a rank beside what its driver saw
    sum of N bytes            one sum over ranks in a CUDA graph: NCCL's all-reduce, gathered addends and ``sum_parts``,
                              ``one_shot_sum``, and torch's one-shot all-reduce over symmetric memory

Sums are first compared in every bit, over many rounds of new numbers. Exit status 1 if they differ.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed import _symmetric_memory

import memory_plan_check
from memory_plan_check import RandomSource, ShapesOnly, config_of, driver_used, gpu_id
from rooflama.kernels import one_shot_sum
from rooflama.loaders.device import open_device
from rooflama.loading import start_runner
from rooflama.models import CheckpointReader, Decoder, MemoryPlan, ModelRunner, adapter_for
from rooflama.models.parallel import Ranks
from rooflama.models.share import ALONE
from rooflama.planning import plan_for_device
from step import STEPS, captured
from timing import by_kernel, measure, provenance, write_rows

PROMPT = 4096  # tokens
CONTEXT = PROMPT + 512
SIZES = (4 << 10, 8 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 32 << 20)  # bytes of an addend in bfloat16
ROUNDS = 2000  # of sums that are compared; fewer of large ones
IN_A_GRAPH = 32  # sums
Row = dict[str, object]


@contextmanager
def running(model: str, types: str, ranks: Ranks | None) -> Iterator[tuple[ModelRunner, MemoryPlan]]:
    """A model with random weights on this GPU, or this rank's share of it."""
    config = replace(config_of(model), context_length=CONTEXT)
    rule = memory_plan_check.type_of if types == "Q4_K_M" else lambda config: lambda name, shape: types
    with mock.patch.object(memory_plan_check, "type_of", rule), open_device("cuda") as device:
        reader, share = CheckpointReader(ShapesOnly(config)), ALONE if ranks is None else ranks.share
        plan = plan_for_device(reader, config, device, context=CONTEXT, dtype="auto", kv_dtype="auto", share=share)
        decoder = Decoder.load(RandomSource(reader, device, ranks), config, adapter_for("llama"))
        with torch.inference_mode():
            runner = start_runner(decoder, plan, device)
            if ranks is not None:
                ranks.connect(device, plan.dtype, plan.addend_elements)
            yield runner, plan


def decode_seconds(runner: ModelRunner, *, profile: bool) -> float:
    """Seconds of a step of one sequence. ``profile`` prints the kernels' times on rank 0."""
    slots = captured(runner, 1, 64)
    dist.barrier()
    started = time.perf_counter()
    for _ in range(STEPS):
        slots.step()
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - started) / STEPS
    if profile:
        kernels = by_kernel(slots.step, repeats=8)
        for name, (launches, us) in kernels.items() if dist.get_rank() == 0 else ():
            print(f"  {us:9.1f} us {launches:6.0f} x {name[:80]}", flush=True)
    for sequence in slots.sequences:
        runner.cache.free(sequence.cache_id)
    return seconds


def prompt_seconds(runner: ModelRunner) -> float:
    """Seconds of a prompt of PROMPT tokens and the logits of its last; the median."""
    times = []
    for _ in range(7):
        sequence = runner.cache.add()
        dist.barrier()
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _, hidden in runner.prefill([sequence], [list(range(PROMPT))], [PROMPT]):
            runner.decoder.logits(hidden[-1:])
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
        runner.cache.free(sequence)
    return statistics.median(times[2:])


def model_rows(model: str, types: str, ranks: Ranks, *, alone: bool, profile: bool) -> Iterator[Row]:
    """Decoding and prompts, on one GPU and on all."""
    baseline: dict[str, float] = {}
    for shared in (None, ranks) if alone else (ranks,):
        gpu, gpus = torch.cuda.current_device(), 1 if shared is None else ranks.share.size
        with running(model, types, shared) as (runner, plan):
            found = {"prompt": prompt_seconds(runner)}
            used = [driver_used(gpu_id(gpu))]
            found["decode"] = decode_seconds(runner, profile=profile and shared is not None)
            used.append(driver_used(gpu_id(gpu)))
            outside = used[-1] - torch.cuda.memory_reserved()
        for name, seconds in found.items():
            tokens = PROMPT if name == "prompt" else 1
            before = baseline.setdefault(name, seconds) if alone else None
            yield {
                "case": f"{model} {types} {name}",
                "gpus": gpus,
                "us": f"{seconds * 1e6:.1f}",
                "tokens_per_s": f"{tokens / seconds:.1f}",
                "speedup": f"{before / seconds:.2f}" if before else "",
                "planned_mib": f"{plan.total_bytes / 2**20:.0f}",
                "driver_mib": f"{max(used) / 2**20:.0f}",
                "outside_torch_mib": f"{outside / 2**20:.0f}",
            }


def sum_rows(ranks: Ranks, group: dist.ProcessGroup) -> Iterator[Row]:
    """The ways of summing addends, each in a CUDA graph of IN_A_GRAPH sums."""
    with open_device("cuda") as device:
        ranks.connect(device, torch.bfloat16, max(SIZES) // 2)
        peers, gathering = ranks._peers, Ranks(group)
        for num_bytes in SIZES:
            columns = min(8192, num_bytes // 2)
            addend = torch.randn(num_bytes // 2 // columns, columns, device="cuda", dtype=torch.bfloat16)
            shared = _symmetric_memory.empty(addend.shape, dtype=addend.dtype, device=addend.device)
            _symmetric_memory.rendezvous(shared, group)
            reduced = addend.clone()
            ways: dict[str, Callable[[], object]] = {
                "NCCL all_reduce": lambda a=reduced: dist.all_reduce(a, group=group),
                "gathered, sum_parts": lambda a=addend: gathering.total(a),
                "torch one_shot": lambda s=shared: torch.ops.symm_mem.one_shot_all_reduce(s, "sum", group.group_name),
            }
            if peers is not None and addend.numel() <= peers.capacity:
                ways["one_shot_sum"] = lambda a=addend: one_shot_sum(a, peers)
                for round_ in range(min(ROUNDS, (1 << 30) // num_bytes)):
                    addend.normal_()
                    if not torch.equal(one_shot_sum(addend, peers), gathering.total(addend)):
                        raise SystemExit(f"one_shot_sum of {num_bytes} bytes differs in round {round_}")
            for name, way in ways.items():
                dist.barrier()
                yield {
                    "case": f"sum of {num_bytes} bytes, {name}",
                    "gpus": ranks.share.size,
                    "us": f"{measure([way] * IN_A_GRAPH).p50:.2f}",
                }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the rows there, as CSV")
    parser.add_argument("--only", default="", metavar="REGEX", help="of 'sums', '8B BF16', '8B Q4_K_M', '70B Q8_0'")
    parser.add_argument("--profile", action="store_true", help="print launches and microseconds per step and kernel")
    options = parser.parse_args()
    gpu = int(os.environ["LOCAL_RANK"])
    before = driver_used(gpu_id(gpu))  # without this process, which has no context yet
    torch.cuda.set_device(gpu)
    dist.init_process_group("cpu:gloo,cuda:nccl")
    group = dist.group.WORLD
    torch.manual_seed(dist.get_rank())  # ranks' addends differ
    shown = {"profile": options.profile}
    parts: dict[str, Callable[[Ranks], Iterator[Row]]] = {
        "sums": lambda ranks: sum_rows(ranks, group),
        "8B BF16": lambda ranks: model_rows("Llama-3-8B", "BF16", ranks, alone=True, **shown),
        "8B Q4_K_M": lambda ranks: model_rows("Llama-3-8B", "Q4_K_M", ranks, alone=True, **shown),
        "70B Q8_0": lambda ranks: model_rows("Llama-3-70B", "Q8_0", ranks, alone=False, **shown),
    }
    rows = []
    for name, part in parts.items():
        if not re.search(options.only, name):
            continue
        for row in part(Ranks(group)):
            if "driver_mib" in row:
                row["driver_mib"] = int(str(row["driver_mib"])) - (before >> 20)
                row["outside_torch_mib"] = int(str(row["outside_torch_mib"])) - (before >> 20)
            rows.append(row)
            if dist.get_rank() == 0:
                print("  ".join(f"{key} {value}" for key, value in row.items() if value != ""), flush=True)
    if options.out and dist.get_rank() == 0:
        columns = dict.fromkeys(key for row in rows for key in row)
        write_rows(options.out, [{key: row.get(key, "") for key in columns} | provenance() for row in rows])
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
