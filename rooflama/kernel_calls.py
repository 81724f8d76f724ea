"""Every call of one kernel that a model makes while it runs a prompt, one after the other, with real arguments.

The prompt's last token is run as a step of decoding, the tokens before it as a prompt. Three ways are tried in turn:

    as loaded       the model's own passes
    unfused         the same weights with ``fused=False``, where rms_norm, rope, write_kv and swiglu run on their own
    own tensors     calls that no pass makes (sample, penalise, copy_pages, gather_kv, dequantize, ...), on the model's
                    tensors: logits, pages, weights, residual stream
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rooflama.kernels import (
    Weight,
    add_rms_norm,
    copy_pages,
    dequantize,
    gather_kv,
    geglu,
    next_slots,
    penalise,
    quantized_matmul_pair,
    sample,
    sum_parts,
    swap,
    swiglu,
)
from rooflama.kernels.kernel import KERNELS
from rooflama.kernels.paged_common import as_codes
from rooflama.models import ArgumentError, ModelRunner
from rooflama.models.weights import Projection

from .model import Model

PROMPT, DECODING, TENSORS = "prompt", "decoding", "own tensors"
POISON = {torch.int8: -128, torch.float8_e4m3fn: 0x7F}  # of slots that nothing was written to; NaN elsewhere


@dataclass
class Place:
    """Where in a model a call happens. ``layer`` is None outside of the layers: embedding, logits, sampling."""

    phase: str
    layer: int | None = None


@dataclass
class Pass:
    """What one run of a prompt computed: the residual stream after each (phase, layer), and logits [1, vocab]."""

    hidden: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    logits: Tensor = field(default_factory=lambda: torch.empty(0))


@contextmanager
def sequence_of(model: Model, num_tokens: int) -> Iterator[int]:
    """A new sequence with pages for so many tokens, full of POISON, while other requests wait."""
    cache = model.runner.cache
    with model.prefill([0] * num_tokens, None):  # its own passes do not run
        sequence_id = cache.add()
        try:
            cache.reserve(sequence_id, num_tokens)
            pages = torch.tensor(cache.pages(sequence_id), device=model.runner.device)
            for pool in (*cache.k_pages, *cache.v_pages, *cache.k_scale, *cache.v_scale):
                if pool is not None:
                    as_codes(pool)[pages] = POISON.get(pool.dtype, float("nan"))
            yield sequence_id
        finally:
            cache.free(sequence_id)


def unfused(runner: ModelRunner) -> ModelRunner:
    """The same weights and pages, run as after ``load(fused=False)``."""
    other = copy.copy(runner)
    other.decoder = runner.decoder.unfused()
    return other


def run(runner: ModelRunner, sequence_id: int, token_ids: list[int], place: Place | None = None) -> Pass:
    """Run the tokens but the last as a prompt, and the last as a step of decoding. ``place`` follows."""
    place, done = place or Place(PROMPT), Pass()
    last_layer = runner.decoder.config.num_layers - 1

    def observe(name: str, layer: int, tensor: Tensor) -> None:
        if name == "hidden":
            key = place.phase, layer
            part = tensor.detach().clone()
            done.hidden[key] = torch.cat([done.hidden[key], part]) if key in done.hidden else part
            place.layer = 0 if layer == last_layer else layer + 1

    place.phase, place.layer = PROMPT, 0
    if prompt := token_ids[:-1]:
        for _ in runner.prefill([sequence_id], [prompt], [len(token_ids)], observe):
            pass
    place.phase, place.layer = DECODING, 0
    hidden = runner.hidden_states(observe=observe, **_decode_step(runner, sequence_id, token_ids))
    place.layer = None
    done.logits = runner.decoder.logits(hidden)
    return done


def _decode_step(runner: ModelRunner, sequence_id: int, token_ids: list[int]) -> dict[str, Any]:
    device, position = runner.device, len(token_ids) - 1

    def int32(value: int) -> Tensor:
        return torch.tensor([value], dtype=torch.int32, device=device)

    return {
        "token_ids": int32(token_ids[-1]),
        **runner.rotation.rows(runner.rotation.pin([len(token_ids)]).to(device), int32(position)),
        "slot_mapping": torch.from_numpy(runner.cache.append(sequence_id, 1)).to(device),
        "block_table": runner.block_table([sequence_id]).to(device),
        "seq_lens": int32(position + 1),
    }


@contextmanager
def visited_calls(
    model: Model, kernel_name: str, token_ids: list[int], visit: Callable[[Place, tuple, dict[str, Any]], Any]
) -> Iterator[tuple[str, ModelRunner, Pass]]:
    """Run the prompt with ``visit(place, args, kwargs)`` in place of each call of the kernel; its result is used.

    In the ``with`` block, the pages still hold the sequence. Yields ("as loaded", "unfused" or "own tensors"; the
    runner whose calls these were; its pass). Raises ArgumentError if there is no call.
    """
    kernel = KERNELS[kernel_name]
    count = 0

    def spy(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        at = Place(place.phase, None if kernel_name == "embedding" else place.layer)
        return visit(at, args, kwargs)

    for way, runner in (("as loaded", model.runner), ("unfused", unfused(model.runner))):
        with sequence_of(model, len(token_ids)) as sequence_id:
            place = Place(PROMPT)
            with swap(**{kernel_name: spy}):
                done = run(runner, sequence_id, token_ids, place)
            if not count and way == "unfused":
                way, place.phase = TENSORS, TENSORS
                for place.layer, arguments in _own_tensors(runner, sequence_id, token_ids, done, kernel):
                    spy(*arguments[0], **arguments[1])
            if count:
                yield way, runner, done
                return
    raise ArgumentError(
        f"{kernel_name} with {model.name}",
        rule="a comparison needs calls, and no pass of this model makes one",
        remedy="Compare a kernel that the model calls",
    )


def _weights(runner: ModelRunner, layer: int) -> Iterator[Weight]:
    """The matrices of a layer's projections."""
    for projection in vars(runner.decoder.layers[layer]).values():
        if isinstance(projection, Projection):
            yield from projection.parts


def _own_tensors(
    runner: ModelRunner, sequence_id: int, token_ids: list[int], done: Pass, kernel: Any
) -> Iterator[tuple[int | None, tuple[tuple, dict[str, Any]]]]:
    """(layer, (args, kwargs)) of calls that no pass of this model makes."""
    config, cache, device = runner.decoder.config, runner.cache, runner.device
    vocab, pages = config.vocab_size, torch.tensor(cache.pages(sequence_id), device=device)
    ones = torch.ones(1, device=device)
    if kernel is sample:
        random = [torch.tensor([value], device=device) for value in (1, 0)]
        yield None, ((done.logits, 0.8 * ones), {"seeds": random[0], "steps": random[1]})
    if kernel is penalise:
        seen = torch.bincount(torch.tensor(token_ids), minlength=vocab).clamp(max=1).int()[None].to(device)
        yield None, ((done.logits.clone(), seen, 1.2 * ones, 0.1 * ones, 0.1 * ones), {})
    if kernel is next_slots:
        length = torch.tensor([len(token_ids)], dtype=torch.int32, device=device)
        table = runner.block_table([sequence_id])
        yield None, ((length - 1, length, table, cache.page_size, runner.max_context), {})
    for layer in range(config.num_layers):
        hidden = done.hidden[DECODING, layer]
        if kernel is dequantize:
            for part in _weights(runner, layer):
                yield layer, ((part, runner.dtype), {})
        if kernel is gather_kv:
            lens = torch.tensor([len(token_ids)], dtype=torch.int32, device=device)
            table = runner.block_table([sequence_id]).to(device)
            for pool, scale in ((cache.k_pages, cache.k_scale), (cache.v_pages, cache.v_scale)):
                yield layer, ((pool[layer], table, lens, scale[layer]), {"num_keys": len(token_ids)})
        if kernel is copy_pages:
            source = torch.arange(len(pages), device=device)
            for kept in (cache.k_pages[layer], cache.v_pages[layer]):
                bits = as_codes(kept)[pages]
                twice = torch.cat([bits, torch.zeros_like(bits)]).view(kept.dtype)
                yield layer, ((twice, source, source + len(pages)), {})
        if kernel is add_rms_norm:
            before = done.hidden[DECODING, max(layer - 1, 0)]
            yield layer, ((hidden, before, runner.decoder.output_norm, config.rms_norm_eps), {})
        if kernel is sum_parts:
            yield layer, ((torch.stack([hidden, done.hidden[DECODING, max(layer - 1, 0)]]),), {})
        if kernel is quantized_matmul_pair:
            fitting = [part for part in _weights(runner, layer) if part.shape[1] == config.hidden_size]
            yield layer, ((hidden, *fitting[:2]), {"resident": True})
        if kernel in (swiglu, geglu):
            yield layer, ((hidden, hidden), {})
