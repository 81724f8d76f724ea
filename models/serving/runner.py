"""Forward passes over prompts and over single tokens.

Sequences decode together in fixed slots, one token per step, entirely on the device. A step reads and writes only
tensors at fixed addresses: token ids, lengths, block tables and the sampler's rows advance on the device. A sequence
that joins or leaves writes its row; nothing is captured anew. On a GPU, one CUDA graph per number of rows (``bucket``)
and per set of sampling options is captured at its second step, and kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rooflama.kernels import current_swaps, next_slots
from rooflama.kernels.kernel import replays

from ..decoder import Decoder, Observer, Step
from ..errors import ArgumentError
from ..kv_cache import PagedKVCache
from ..rope.rotation import make_rotation
from ..rope.spec import FactorSetPolicy
from .passes import CapturedPasses, PassInputs, Span, captured_sizes, chunks
from .sampler import Options, Rows, Sampler
from .sequence import Request, Sequence


class ModelRunner:
    """Runs a decoder on a page cache: prompts in chunks, and all its passes with the model's rotation.

    Args:
        decoder: the weights.
        cache: holds keys and values; its pool limits how many sequences can run at once.
        max_context: the most tokens of a sequence, prompt included.
        dtype: of activations.
        prefill_chunk: the most tokens of a prefill pass.
        longrope: the choice between LongRoPE's two lists: by a sequence's planned length, or always the same.
        num_tokens: of the tokenizer; ids from here on are padding and never drawn. None if there is no padding.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: PagedKVCache,
        *,
        max_context: int,
        dtype: torch.dtype,
        prefill_chunk: int,
        longrope: FactorSetPolicy = "auto",
        num_tokens: int | None = None,
    ):
        self.decoder, self.cache, self.num_tokens = decoder, cache, num_tokens
        self.max_context, self.dtype, self.prefill_chunk = max_context, dtype, prefill_chunk
        self.device = cache.k_pages[0].device
        self._captured = CapturedPasses(cache.device, captured_sizes(decoder.config))
        self.rotation = make_rotation(
            decoder.config.rope,
            local=decoder.config.local_rope,
            max_context=max_context,
            longrope=longrope,
            device=cache.device,
        )

    def check(self, request: Request) -> None:
        """Raise ArgumentError if the prompt is empty or has unknown tokens, or if the context is too short."""
        if not request.prompt:
            raise ArgumentError(
                "an empty prompt",
                rule="generation continues at least one token",
                remedy="Give a prompt of one token or more",
            )
        vocab_size = self.decoder.config.vocab_size
        unknown = [token for token in request.prompt if not 0 <= token < vocab_size]
        if unknown:
            raise ArgumentError(
                f"token id {unknown[0]}",
                rule=f"the embedding has rows for ids 0 to {vocab_size - 1}",
                remedy="Encode the prompt with this model's own tokenizer, and leave out tokens without a row",
            )
        request.params.check(vocab_size if self.num_tokens is None else self.num_tokens)
        if request.max_new_tokens is None and len(request.prompt) >= self.max_context:
            raise ArgumentError(
                f"{len(request.prompt)} prompt tokens",
                rule=f"at least one more token must fit into the context of {self.max_context} tokens",
                remedy="Shorten the prompt, or load the model with a larger max_context",
            )
        if request.planned_tokens(self.max_context) > self.max_context:
            raise ArgumentError(
                f"{len(request.prompt)} prompt tokens and {request.max_new_tokens} new ones",
                rule=f"together they must fit into the context of {self.max_context} tokens",
                remedy="Shorten the prompt, ask for fewer tokens, or load the model with a larger max_context",
            )

    def identity(self, planned: int) -> bytes:
        """What changes the keys and values of given tokens: the model, dtypes, and the rotation of a planned length."""
        decoder, kv_dtype = self.decoder, self.cache.k_pages[0].dtype
        model = (decoder.config, decoder.fused, decoder.batch_invariant, self.dtype, kv_dtype)
        return hashlib.blake2b(repr((model, self.rotation.key(planned))).encode(), digest_size=16).digest()

    @property
    def table_width(self) -> int:
        """Pages of a full context."""
        return -(-self.max_context // self.cache.page_size)

    def block_table(self, sequence_ids: list[int]) -> Tensor:
        """int32 [num_seqs, table_width] on the device."""
        return self.upload(self.cache.block_table(sequence_ids, self.table_width))

    def upload(self, tensor: Tensor) -> Tensor:
        """A copy of a host tensor on the device, without waiting for the device."""
        if self.device.type != "cuda":
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def prefill(
        self,
        sequence_ids: list[int],
        prompts: list[list[int]],
        planned: list[int],
        observe: Observer | None = None,
    ) -> Iterator[tuple[list[Span], Tensor]]:
        """Run prompts through the layers, appending to the cache.

        Yields the spans of each chunk, and the residual stream [num_tokens, hidden_size] after the last layer, which
        the next pass may overwrite.
        ``planned``, the most tokens that each sequence may reach, decides its rotation. ``observe`` is called with the
        intermediates of each layer.
        """
        pins = self.rotation.pin(planned)
        cached = [self.cache.length(sequence_id) for sequence_id in sequence_ids]
        for chunk in chunks([len(prompt) for prompt in prompts], self.prefill_chunk):
            counts = [span.num_tokens for span in chunk]
            slots = [self.cache.append(sequence_ids[span.index], span.num_tokens) for span in chunk]
            positions = [cached[span.index] + np.arange(span.start, span.end) for span in chunk]
            inputs = PassInputs(
                block_table=self.cache.block_table([sequence_ids[span.index] for span in chunk], self.table_width),
                pins=pins[[span.index for span in chunk]],
                slot_mapping=torch.from_numpy(np.concatenate(slots)),
                token_ids=_int32([token for span in chunk for token in prompts[span.index][span.start : span.end]]),
                positions=_int32(np.concatenate(positions)),
                sequence_of=_int32(np.repeat(np.arange(len(chunk)), counts)),
                seq_lens=_int32([cached[span.index] + span.end for span in chunk]),
                query_start_loc=_int32(np.cumsum([0, *counts])),
            )
            yield chunk, self._pass(inputs, observe)  # not kept here while the next chunk runs

    def _pass(self, inputs: PassInputs, observe: Observer | None) -> Tensor:
        is_plain = observe is None and not current_swaps()  # a graph calls neither
        if is_plain and replays(self.device) and self._captured.serves(inputs):
            return self._captured(self.run_pass, inputs)
        return self.run_pass(PassInputs(*map(self.upload, inputs)), observe)

    def run_pass(self, inputs: PassInputs, observe: Observer | None = None) -> Tensor:
        return self.hidden_states(
            token_ids=inputs.token_ids,
            **self.rotation.rows(inputs.pins[inputs.sequence_of], inputs.positions),
            slot_mapping=inputs.slot_mapping,
            block_table=inputs.block_table,
            seq_lens=inputs.seq_lens,
            query_start_loc=inputs.query_start_loc,
            observe=observe,
        )

    def hidden_states(self, **batch: Any) -> Tensor:
        """One pass through the layers: the residual stream [num_tokens, hidden_size] after the last.

        ``batch`` holds what changes in ``Step`` from one pass to the next.
        """
        step = Step(config=self.decoder.config, cache=self.cache, fused=self.decoder.fused, **batch)
        return self.decoder.hidden_states(step, self.dtype)


def _int32(values: list[int] | np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.int32))


def bucket(count: int, num_slots: int) -> int:
    """The rows of the captured step for ``count`` sequences: 1, 2, 4, 8, 16, 32, 48, and so on up to ``num_slots``."""
    size = 1 << (count - 1).bit_length() if count <= 16 else -(-count // 16) * 16
    return min(size, num_slots)


Drawn = tuple[Tensor, tuple[Tensor, ...] | None]  # token ids and log probabilities of some rows


class DecodeSlots:
    """``num_slots`` rows, of which the first ``len(sequences)`` are taken, by sequences with the same ``swaps``.

    Attributes:
        sequences: in the order of their rows; each one's ``row`` is its index.
    """

    def __init__(self, runner: ModelRunner, num_slots: int, swaps: Mapping[str, Callable[..., Any]]):
        device = runner.device
        self.runner, self.num_slots, self.swaps = runner, num_slots, swaps
        self.sequences: list[Sequence] = []
        self.token_ids = torch.zeros(num_slots, dtype=torch.int32, device=device)
        self.lengths = torch.zeros(num_slots, dtype=torch.int32, device=device)  # tokens in the cache
        self.limits = torch.zeros(num_slots, dtype=torch.int32, device=device)  # a row at its limit does not advance
        self.pins = runner.upload(runner.rotation.pin([1] * num_slots))
        self.block_table = runner.block_table([]).new_zeros(num_slots, runner.table_width)
        # With batch_invariant as a prompt has it: preemption and shared beginnings let a drawn token be read later.
        starts = torch.arange(num_slots + 1, dtype=torch.int32, device=device)
        self.query_start_loc = starts if runner.decoder.batch_invariant else None
        self.arrivals = torch.zeros(num_slots, runner.decoder.config.num_heads, dtype=torch.int32, device=device)
        self.sampler = Sampler(
            num_slots,
            num_rows=runner.decoder.config.vocab_size,
            num_tokens=runner.num_tokens,
            device=device,
        )
        self._options = Options()
        self._graphs: dict[
            tuple[int, Options], tuple[torch.cuda.CUDAGraph, Drawn] | None
        ] = {}  # None: ran eagerly once
        self._memory_pool: object | None = None  # of all graphs, which never run at the same time

    def join(self, sequence: Sequence, limit: int) -> None:
        """Give a sequence the next row. ``limit`` is the most tokens that it has pages for."""
        row, request = len(self.sequences), sequence.request
        planned = request.planned_tokens(self.runner.max_context)
        self.sequences.append(sequence)
        sequence.row = row
        self._choose_options()
        self.place(row, sequence.cache_id, sequence.num_cached, limit, planned)
        self.sampler.set(row, request.params, request.prompt, sequence.token_ids)

    def place(self, row: int, cache_id: int | None, length: int, limit: int, planned: int) -> None:
        """Write a row's block table, its length, its limit, and the rotation of its planned length."""
        assert cache_id is not None
        self.block_table[row].copy_(self.runner.block_table([cache_id])[0])
        self.limits[row].fill_(limit)
        self.lengths[row].fill_(length)
        self.pins[row] = self.runner.upload(self.runner.rotation.pin([planned]))[0]

    def extend(self, sequences: list[Sequence]) -> None:
        """Give sequences in rows the last of their pages, which is new, and their present limits."""
        cache, cells = self.runner.cache, []
        for sequence in sequences:
            assert sequence.cache_id is not None
            column = (sequence.limit - 1) // cache.page_size
            cells.append((sequence.row, column, cache.page_at(sequence.cache_id, column), sequence.limit))
        on_device = self.runner.upload(torch.tensor(cells))
        (rows, columns), (pages, limits) = on_device[:, :2].unbind(1), on_device[:, 2:].int().unbind(1)
        self.block_table[rows, columns] = pages
        self.limits[rows] = limits

    def leave(self, sequence: Sequence) -> None:
        """Take a sequence out. The last one moves to its row, so that the taken rows are the first."""
        row, last = sequence.row, len(self.sequences) - 1
        moved, sequence.row = self.sequences.pop(), -1
        if moved is not sequence:
            self.sequences[row] = moved
            moved.row = row
            for tensor in (self.token_ids, self.lengths, self.limits, self.pins, self.block_table):
                tensor[row] = tensor[last]
            self.sampler.move(last, row)
        for tensor in (self.limits, self.lengths):
            tensor[last].zero_()  # an idle row writes nothing and reads no pages
        self._choose_options()

    def _choose_options(self) -> None:
        self._options = Options.of(sequence.request.params for sequence in self.sequences)
        self.sampler.prepare(self._options)

    def draw_first(self, logits: Tensor, sequences: list[Sequence]) -> Drawn:
        """Sample from float32 logits [n, vocab_size] for n sequences in slots; the tokens are their next inputs."""
        rows = self.runner.upload(torch.tensor([sequence.row for sequence in sequences]))
        return self.draw(logits, rows, self._options)

    def draw(self, logits: Tensor, rows: Rows, options: Options) -> Drawn:
        """Sample from float32 logits [n, vocab_size], one row of them per row of ``rows``.

        A row with a NaN gives -1, whose embedding is NaN again; nothing out of bounds is read.
        """
        tokens, logprobs = self.sampler.draw(logits, rows, options)
        self.token_ids[rows] = tokens
        return tokens, logprobs

    def step(self) -> Drawn:
        """Feed each sequence its last token and draw the next. The next step overwrites the result."""
        count = len(self.sequences)
        if not replays(self.runner.device):
            return self.run_step(count, self._options)
        key = (bucket(count, self.num_slots), self._options)
        if key not in self._graphs:
            self._graphs[key] = None
            return self.run_step(*key)  # compiles every kernel, which is impossible during a capture
        captured = self._graphs[key] = self._graphs[key] or self._capture(*key)
        graph, drawn = captured
        graph.replay()
        return drawn

    def _capture(self, count: int, options: Options) -> tuple[torch.cuda.CUDAGraph, Drawn]:
        """A step's graph, and where it writes what it draws."""
        self._memory_pool = self._memory_pool or torch.cuda.graph_pool_handle()
        graph = self.runner.cache.device.capture(lambda: self.run_step(count, options), self._memory_pool)
        return graph, (self.token_ids[:count], self.sampler.report(options, count))

    def run_step(self, count: int, options: Options) -> Drawn:
        runner, rows = self.runner, slice(0, count)
        lengths, block_table = self.lengths[rows], self.block_table[rows]
        positions, slots = next_slots(
            lengths, self.limits[rows], block_table, runner.cache.page_size, runner.max_context
        )
        hidden = runner.hidden_states(
            token_ids=self.token_ids[rows],
            **runner.rotation.rows(self.pins[rows], positions),
            slot_mapping=slots,
            block_table=block_table,
            seq_lens=lengths,
            query_start_loc=None if self.query_start_loc is None else self.query_start_loc[: count + 1],
            arrivals=self.arrivals[rows],
        )
        return self.draw(runner.decoder.logits(hidden), rows, options)
