"""The launches of a model, found by its own passes on tensors without memory (``kernels.rehearsal``)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rooflama.kernels.gpu import GPUTarget
from rooflama.kernels.rehearsal import Launch, rehearsal
from rooflama.loaders.device import Device

from ..config import ModelConfig
from ..decoder import Adapter, Decoder
from ..memory.plan import MemoryPlan
from ..memory.weights import DryRunSource
from ..shapes_only import ShapesOnly, shapes_only
from ..weights import CheckpointReader
from .engine import MOST_SLOTS
from .passes import MOST_SEQUENCES, PassInputs, captured_sizes
from .runner import DecodeSlots, ModelRunner, bucket
from .sampler import Options
from .starting import start_runner

OPTIONS = (Options(), Options(("temperature", "seeds")), Options(("temperature", "seeds", "top_p")))  # most in use
FIRST_PASSES = (8, 64)  # of ``captured_sizes``: prompts of a line or two


def rehearse(
    reader: CheckpointReader,
    config: ModelConfig,
    adapter: Adapter,
    plan: MemoryPlan,
    gpu: GPUTarget | None,
    *,
    num_tokens: int | None = None,
    fused: bool = True,
    first_answer: bool = False,
) -> list[Launch]:
    """The launches of a model that no other rank shares.

    These are prompt passes of each captured size and of a whole chunk, and greedy and sampled decode steps of up to
    ``plan.sequences`` sequences. Nothing is read, allocated or run. One layer of each kind stands for all of them.

    Args:
        reader: the one that ``read_config`` used.
        config, adapter: the model.
        plan: its sizes.
        gpu: what the launches are made for; None for Triton's interpreter.
        num_tokens, fused: as for ``start_runner`` and ``TensorSource``.
        first_answer: only those of prompt passes of ``FIRST_PASSES`` tokens and of a greedy step of one sequence.
    """
    source = DryRunSource(reader, "triton")
    source.batch_invariant, source.fused = plan.batch_invariant, fused
    with shapes_only():
        decoder = Decoder.load(source, config, adapter)
    kinds = {_kind(source, config, index): layer for index, layer in enumerate(decoder.layers)}
    decoder = replace(decoder, layers=[*kinds.values()])
    with rehearsal(gpu) as found, ShapesOnly():
        runner = start_runner(decoder, plan, _NoMemory(), num_tokens=num_tokens)
        for inputs in prompt_passes(runner):
            if not first_answer or inputs.num_tokens in FIRST_PASSES:
                runner.run_pass(inputs)
        if first_answer:
            steps(runner, 1, OPTIONS[:1])
        else:
            steps(runner, plan.sequences, OPTIONS)
    return found.launches


def _kind(reader: CheckpointReader, config: ModelConfig, index: int) -> tuple:
    """What the launches of a layer follow from: types and shapes of its tensors, its window and its rotation."""
    prefix = f"blk.{index}."
    infos = {name.removeprefix(prefix): i for name, i in reader.checkpoint.tensors.items() if name.startswith(prefix)}
    tensors = tuple((name, info.ggml_type, tuple(info.shape)) for name, info in infos.items())
    is_local = config.rope_of(index) is config.local_rope
    return tensors, config.sliding_windows[index], index in config.unrotated_layers, is_local


def prompt_passes(runner: ModelRunner) -> Iterator[PassInputs]:
    """Inputs of each kind of prompt pass, on the runner's device, with undefined contents."""

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=runner.device)

    size = runner.prefill_chunk
    chunk = PassInputs(
        block_table=empty(1, runner.table_width),
        pins=runner.upload(runner.rotation.pin([1])),
        slot_mapping=empty(size, dtype=torch.int64),
        token_ids=empty(size),
        positions=empty(size),
        sequence_of=empty(size),
        seq_lens=empty(1),
        query_start_loc=empty(2),
    )
    sizes = captured_sizes(runner.decoder.config)
    captured = chunk.empty_like(sizes[-1], MOST_SEQUENCES, runner.device)
    yield from map(captured.first, sizes)
    yield chunk


def steps(runner: ModelRunner, sequences: int, drawn: Iterable[Options]) -> None:
    """The first draw after a prompt, and decode steps of up to ``sequences`` sequences."""
    num_slots = max(MOST_SLOTS, sequences)
    slots = DecodeSlots(runner, num_slots, {})
    config = runner.decoder.config
    for options in drawn:
        slots.sampler.prepare(options)
        hidden = torch.empty(1, config.hidden_size, dtype=runner.dtype, device=runner.device)
        slots.draw(runner.decoder.logits(hidden), runner.upload(torch.tensor([0])), options)
        for rows in sorted({bucket(count, num_slots) for count in range(1, sequences + 1)}):
            slots.run_step(rows, options)


class _NoMemory(Device):
    """A device of tensors without memory."""

    def __init__(self) -> None:
        self.torch_device = torch.device("meta")

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype, *, label: str) -> Any:
        return SimpleNamespace(tensor=torch.empty(shape, dtype=dtype, device="meta"))

    def upload(self, source: Tensor | np.ndarray, *, label: str, **_: Any) -> Any:
        return SimpleNamespace(tensor=torch.as_tensor(source).to("meta"))
