"""Passes over prompts. On a GPU, short ones are captured as CUDA graphs.

A pass of some hundred tokens launches as many kernels as one of thousands, so the host takes longer to launch them than
the device to run them. A graph replays them at once. A graph has a fixed number of tokens, so a pass is padded to the
next size of a list: a padding token belongs to no sequence, attends to nothing and writes no key or value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from rooflama.loaders.device import Device

    from ..config import ModelConfig

SIZES = (8, 16, 32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)  # tokens of captured passes
MOST_WORK = 2**38  # tokens times weights of a layer: beyond, the device takes longer than a host of 1 ms per layer
MOST_SEQUENCES = 32  # of a captured pass
NO_SLOT = -1


@dataclass(frozen=True)
class Span:
    """Tokens ``start`` to ``end`` (exclusive) of sequence ``index`` of a batch."""

    index: int
    start: int
    end: int

    @property
    def num_tokens(self) -> int:
        return self.end - self.start


def chunks(lengths: list[int], limit: int) -> Iterator[list[Span]]:
    """Cut sequences of these lengths into passes of at most ``limit`` tokens; a pass may span several sequences."""
    chunk: list[Span] = []
    room = limit
    for index, length in enumerate(lengths):
        start = 0
        while start < length:
            span = Span(index, start, min(length, start + room))
            chunk.append(span)
            start, room = span.end, room - span.num_tokens
            if room == 0:
                yield chunk
                chunk, room = [], limit
    if chunk:
        yield chunk


def captured_sizes(config: ModelConfig) -> tuple[int, ...]:
    """Tokens of the passes that are captured, ascending: those whose device time may be below the host's."""
    heads = 2 * (config.num_heads + config.num_kv_heads) * config.head_dim
    weights = config.hidden_size * (heads + 3 * config.intermediate_size)
    return tuple(size for size in SIZES if size * weights <= MOST_WORK or size == SIZES[0])


def padded(num_tokens: int, sizes: tuple[int, ...]) -> int:
    """The tokens of the graph that runs a pass of ``num_tokens``; as many if there is none."""
    return next((size for size in sizes if size >= num_tokens), num_tokens)


class PassInputs(NamedTuple):
    """What changes from one prompt pass to the next.

    block_table: int32 [num_seqs, max_pages_per_seq].
    pins: [num_seqs, ...], each sequence's rotation, as ``Rotation.pin`` gives it.
    slot_mapping: int64 [num_tokens], see ``Step``.
    token_ids, positions: int32 [num_tokens].
    sequence_of: int32 [num_tokens], each token's row in ``block_table``.
    seq_lens: int32 [num_seqs], keys of each sequence, those of this pass included.
    query_start_loc: int32 [num_seqs + 1], where each sequence's tokens start.
    """

    block_table: Tensor
    pins: Tensor
    slot_mapping: Tensor
    token_ids: Tensor
    positions: Tensor
    sequence_of: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_seqs(self) -> int:
        return len(self.seq_lens)

    def empty_like(self, num_tokens: int, num_seqs: int, device: torch.device) -> PassInputs:
        """Inputs of another size, of zeros."""
        per_sequence = {
            "block_table": num_seqs,
            "pins": num_seqs,
            "seq_lens": num_seqs,
            "query_start_loc": num_seqs + 1,
        }
        return PassInputs(
            *(
                torch.zeros((per_sequence.get(name, num_tokens), *tensor.shape[1:]), dtype=tensor.dtype, device=device)
                for name, tensor in zip(self._fields, self, strict=True)
            )
        )

    def first(self, num_tokens: int) -> PassInputs:
        """Views of the first tokens, of all sequences."""
        names = ("slot_mapping", "token_ids", "positions", "sequence_of")
        return self._replace(**{name: getattr(self, name)[:num_tokens] for name in names})

    def take(self, given: PassInputs) -> None:
        """Become ``given``, which is on the host and not larger, and padding after it."""
        for target, value in zip(self, given, strict=True):
            target[: len(value)].copy_(value.pin_memory() if target.is_cuda else value, non_blocking=True)
        self.slot_mapping[given.num_tokens :].fill_(NO_SLOT)
        self.seq_lens[given.num_seqs :].zero_()
        self.query_start_loc[given.num_seqs + 1 :].fill_(given.num_tokens)


class CapturedPasses:
    """Runs passes of at most ``sizes[-1]`` tokens and ``MOST_SEQUENCES`` sequences as graphs.

    The first pass of a size runs as it is, which compiles its kernels; the second is captured.

    Args:
        device: a GPU.
        sizes: tokens of the graphs, ascending.
    """

    def __init__(self, device: Device, sizes: tuple[int, ...]):
        self._device, self._sizes = device, sizes
        self._graphs: dict[int, torch.cuda.CUDAGraph | None] = {}  # by size; None after the first pass
        self._inputs: PassInputs | None = None  # of every graph, with room for the largest
        self._memory_pool: object | None = None  # of all graphs, since one runs at a time
        self._hidden: Tensor | None = None  # [sizes[-1], hidden_size], the result of every graph

    def serves(self, inputs: PassInputs) -> bool:
        return 0 < inputs.num_tokens <= self._sizes[-1] and inputs.num_seqs <= MOST_SEQUENCES

    def __call__(self, run: Callable[[PassInputs], Tensor], given: PassInputs) -> Tensor:
        """``run(given)``, the residual stream [num_tokens, hidden_size], for inputs on the host.

        ``run`` does the same at each call. The next pass may overwrite the result.
        """
        size = padded(given.num_tokens, self._sizes)
        if self._inputs is None:
            self._inputs = given.empty_like(self._sizes[-1], MOST_SEQUENCES, self._device.torch_device)
        inputs = self._inputs.first(size)
        inputs.take(given)
        if size not in self._graphs:
            hidden = run(inputs)
            if self._hidden is None:
                self._hidden = hidden.new_empty(self._sizes[-1], hidden.shape[1])
            self._graphs[size] = None
            return hidden[: given.num_tokens]
        graph = self._graphs[size]
        if graph is None:
            graph = self._graphs[size] = self._capture(run, inputs)
        graph.replay()
        return self._result(given.num_tokens)

    def _capture(self, run: Callable[[PassInputs], Tensor], inputs: PassInputs) -> torch.cuda.CUDAGraph:
        result = self._result(inputs.num_tokens)
        self._memory_pool = self._memory_pool or torch.cuda.graph_pool_handle()
        return self._device.capture(lambda: result.copy_(run(inputs)), self._memory_pool)

    def _result(self, num_tokens: int) -> Tensor:
        assert self._hidden is not None  # made by the first pass
        return self._hidden[:num_tokens]
