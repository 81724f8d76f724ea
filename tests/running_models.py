"""Checkpoints as engines on the CPU, and the ways to run them that the parity tests compare."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from rooflama.loaders.checkpoint import Checkpoint
from rooflama.loaders.device import open_device
from rooflama.models import Decoder, DecodeSlots, ModelRunner, PagedKVCache, TensorSource, adapter_for
from rooflama.models.parallel import Ranks
from rooflama.models.serving.sampler import Options

PAGE_SIZE = 16


@contextmanager
def running(
    checkpoint: Checkpoint,
    *,
    max_context: int = 96,
    num_seqs: int = 1,
    prefill_chunk: int = 1024,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    kv_dtype: torch.dtype | None = None,
    longrope: str = "auto",
    batch_invariant: bool = False,
    fused: bool = True,
    ranks: Ranks | None = None,
) -> Iterator[ModelRunner]:
    """The checkpoint's runner, with pages (of ``kv_dtype``) for ``num_seqs`` sequences of ``max_context`` tokens."""
    adapter = adapter_for(checkpoint.metadata["general.architecture"])
    with open_device(device) as owner:
        source = TensorSource(checkpoint, owner, batch_invariant=batch_invariant, fused=fused, ranks=ranks)
        config = adapter.read_config(source)
        decoder = Decoder.load(source, config, adapter)
        num_pages = num_seqs * -(-max_context // PAGE_SIZE)
        if ranks is not None:
            ranks.connect(owner, dtype, 1 << 20)
        cache = PagedKVCache(
            decoder.config,
            num_pages=num_pages,
            page_size=PAGE_SIZE,
            max_append=prefill_chunk,
            dtype=kv_dtype or dtype,
            device=owner,
        )
        yield ModelRunner(
            decoder, cache, max_context=max_context, dtype=dtype, prefill_chunk=prefill_chunk, longrope=longrope
        )


def prefill_logits(
    runner: ModelRunner, sequences: list[list[int]], chunk: int, *, planned: int | None = None
) -> list[Tensor]:
    """Teacher-forced logits of each sequence, float32 [num_tokens, vocab_size], in passes of ``chunk`` tokens."""
    runner.prefill_chunk = chunk
    ids = [runner.cache.add() for _ in sequences]
    lengths = [planned or len(tokens) for tokens in sequences]
    rows: list[list[Tensor]] = [[] for _ in sequences]
    for spans, hidden in runner.prefill(ids, sequences, lengths):
        logits = runner.decoder.logits(hidden).cpu()
        for span, part in zip(spans, logits.split([span.num_tokens for span in spans]), strict=True):
            rows[span.index].append(part)
    for sequence_id in ids:
        runner.cache.free(sequence_id)
    return [torch.cat(parts) for parts in rows]


class _ForcedSlots(DecodeSlots):
    """Decodes given tokens and keeps the logits of every step."""

    def force(self, continuations: list[list[int]]) -> list[Tensor]:
        """Feed ``continuations[i]`` to row i. A row whose continuation is over stops."""
        self.seen: list[Tensor] = []
        for step in range(max(len(tokens) for tokens in continuations)):
            for row, tokens in enumerate(continuations):
                self.token_ids[row] = tokens[step] if step < len(tokens) else 0
            self.run_step(len(continuations), Options())
        return [
            torch.stack([logits[row] for logits in self.seen[: len(tokens)]])
            for row, tokens in enumerate(continuations)
        ]

    def draw(self, logits, rows, options):
        self.seen.append(logits.cpu().clone())
        return self.token_ids, None


def decode_logits(runner: ModelRunner, sequences: list[list[int]], prompt_lengths: list[int]) -> list[Tensor]:
    """The logits after each sequence's prompt, of all sequences decoded together through the paged cache."""
    ids = [runner.cache.add() for _ in sequences]
    lengths = [len(tokens) for tokens in sequences]
    prompts = [tokens[:length] for tokens, length in zip(sequences, prompt_lengths, strict=True)]
    for _ in runner.prefill(ids, prompts, lengths):
        pass
    for sequence_id, length in zip(ids, lengths, strict=True):
        runner.cache.reserve(sequence_id, length)
    slots = _ForcedSlots(runner, len(ids), swaps={})
    for row, (cache_id, prompt, length) in enumerate(zip(ids, prompts, lengths, strict=True)):
        slots.place(row, cache_id, len(prompt), limit=length, planned=length)
    logits = slots.force([tokens[length:] for tokens, length in zip(sequences, prompt_lengths, strict=True)])
    for sequence_id in ids:
        runner.cache.free(sequence_id)
    return logits


def worst_row_error(actual: Tensor, expected: Tensor) -> float:
    """The largest of the rows' relative errors |actual - expected| / |expected|, Euclidean."""
    assert actual.shape == expected.shape, f"shape {list(actual.shape)}, expected {list(expected.shape)}"
    difference = (actual.double() - expected.double()).norm(dim=-1) / expected.double().norm(dim=-1)
    return float(difference.nan_to_num(nan=float("inf")).max())


def assert_parity(actual: Tensor, expected: Tensor, what: str, tolerance: float = 2e-5) -> None:
    error = worst_row_error(actual, expected)
    assert error <= tolerance, f"{what}: relative error {error:.2e} of the worst token, allowed {tolerance:.0e}"
