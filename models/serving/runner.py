"""Forward passes over prompts and over single tokens.

A decode step reads and writes only tensors at fixed addresses: token ids, lengths, slots and the sampler advance on the
device. So on a GPU the step is captured once as a CUDA graph and replayed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..decoder import Decoder, Observer, Step
from ..kv_cache import PagedKVCache
from ..rope.rotation import make_rotation
from ..rope.spec import FactorSetPolicy
from .sampling import Sampler, SamplingParams
from .turns import Turns


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
        self.turns = Turns()
        self.rotation = make_rotation(
            decoder.config.rope,
            local=decoder.config.local_rope,
            max_context=max_context,
            longrope=longrope,
            device=cache.device,
        )

    def block_table(self, sequence_ids: list[int]) -> Tensor:
        width = -(-self.max_context // self.cache.page_size)
        return self.cache.block_table(sequence_ids, width).to(self.device)

    def prefill(
        self,
        sequence_ids: list[int],
        prompts: list[list[int]],
        planned: list[int],
        observe: Observer | None = None,
    ) -> Iterator[tuple[list[Span], Tensor]]:
        """Run prompts through the layers, appending to the cache.

        Yields the spans of each chunk, and the residual stream [num_tokens, hidden_size] after the last layer.
        ``planned``, the most tokens that each sequence may reach, decides its rotation. ``observe`` is called with the
        intermediates of each layer.
        """
        pins = self.rotation.pin(planned)
        cached = [self.cache.length(sequence_id) for sequence_id in sequence_ids]
        for chunk in chunks([len(prompt) for prompt in prompts], self.prefill_chunk):
            slots = [self.cache.append(sequence_ids[span.index], span.num_tokens) for span in chunk]
            tokens = [token for span in chunk for token in prompts[span.index][span.start : span.end]]
            positions = [cached[span.index] + np.arange(span.start, span.end) for span in chunk]
            sequence_of = np.repeat([span.index for span in chunk], [span.num_tokens for span in chunk])
            starts = np.cumsum([0, *(span.num_tokens for span in chunk)])
            batch = {
                "token_ids": self._int32(tokens),
                **self.rotation.rows(
                    pins[torch.from_numpy(sequence_of).to(self.device)], self._int32(np.concatenate(positions))
                ),
                "slot_mapping": torch.from_numpy(np.concatenate(slots)).to(self.device),
                "block_table": self.block_table([sequence_ids[span.index] for span in chunk]),
                "seq_lens": self._int32([cached[span.index] + span.end for span in chunk]),
                "query_start_loc": self._int32(starts),
                "observe": observe,
            }
            yield chunk, self.hidden_states(**batch)  # not kept here while the next chunk runs

    def hidden_states(self, **batch: Any) -> Tensor:
        """One pass through the layers: the residual stream [num_tokens, hidden_size] after the last.

        ``batch`` holds what changes in ``Step`` from one pass to the next.
        """
        step = Step(config=self.decoder.config, cache=self.cache, fused=self.decoder.fused, **batch)
        return self.decoder.hidden_states(step, self.dtype)

    def _int32(self, values: list[int] | np.ndarray) -> Tensor:
        return torch.as_tensor(np.asarray(values, dtype=np.int32), device=self.device)


class DecodeBatch:
    """Sequences that advance together, one token per step, entirely on the device.

    Args:
        runner: the model.
        sequence_ids: in the cache; each has pages for the tokens up to its limit.
        limits: the most tokens of each sequence in the cache; a row at its limit writes nothing and does not advance.
        planned: as given to ``ModelRunner.prefill``.
        params, prompts, drawn: each sequence's parameters, its prompt, and the tokens drawn so far.
    """

    def __init__(
        self,
        runner: ModelRunner,
        sequence_ids: list[int],
        limits: list[int],
        planned: list[int],
        params: list[SamplingParams],
        prompts: list[list[int]],
        drawn: list[list[int]],
    ):
        device = runner.device
        self.runner = runner

        def column(values: list, dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        lengths = [runner.cache.length(sequence_id) for sequence_id in sequence_ids]
        self.block_table = runner.block_table(sequence_ids)
        self.token_ids = column([0] * len(sequence_ids), torch.int32)
        self.lengths = column(lengths, torch.int32)  # tokens in the cache
        self.limits = column(limits, torch.int32)
        self.pins = runner.rotation.pin(planned)
        self.sampler = Sampler(
            params,
            prompts,
            drawn,
            num_rows=runner.decoder.config.vocab_size,
            num_tokens=runner.num_tokens,
            device=device,
        )
        self._graph: torch.cuda.CUDAGraph | None = None
        self._stepped_eagerly = False

    def draw(self, logits: Tensor) -> Tensor:
        """Sample each sequence's next token from logits [num_seqs, vocab_size]; it becomes the next step's input.

        A row with a NaN gives -1, whose embedding is NaN again; nothing out of bounds is read.
        """
        self.token_ids.copy_(self.sampler.draw(logits))
        return self.token_ids

    def rest(self, row: int) -> None:
        """Stop a finished sequence: it writes nothing from now on."""
        self.limits[row] = 0

    def extend(self, row: int, sequence_id: int, limit: int) -> None:
        """Give a sequence that has not reached its limit a higher one, for which it has pages."""
        self.block_table[row].copy_(self.runner.block_table([sequence_id])[0])
        self.limits[row] = limit

    def step(self) -> Tensor:
        """Feed each sequence its last token and draw the next: int32 [num_seqs], overwritten by the next step."""
        if self.runner.device.type == "cpu" or not self._stepped_eagerly:
            self._stepped_eagerly = True  # compiles every kernel, which is impossible during a capture
            return self._step()
        if self._graph is None:
            self._graph = self.runner.cache.device.capture(self._step)
        self._graph.replay()
        return self.token_ids

    def _step(self) -> Tensor:
        runner, page_size = self.runner, self.runner.cache.page_size
        active = self.lengths < self.limits
        position = self.lengths.clamp(max=runner.max_context - 1)
        page = self.block_table.gather(1, (position // page_size).long().unsqueeze(1)).squeeze(1)
        slot = page.long() * page_size + position % page_size
        self.lengths += active
        hidden = runner.hidden_states(
            token_ids=self.token_ids,
            **runner.rotation.rows(self.pins, position),
            slot_mapping=torch.where(active, slot, -1),
            block_table=self.block_table,
            seq_lens=self.lengths,
        )
        return self.draw(runner.decoder.logits(hidden))
