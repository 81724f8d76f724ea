"""Calls of every kernel, drawn: arguments by name, between poison. Attention has problems of its own (attention.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from rooflama.kernels import reference

from .paged import LIMITS, poisoned_pages, ragged_table, random_slots
from .rope import Step, angle_tables, random_positions
from .sampling import random_parameters
from .strategies import DEVICE, dtypes, guarded, normal, seeds
from .weights import TYPES, random_weight, some_columns


@dataclass(frozen=True)
class Call:
    """The arguments of one call, the poisoned buffers around them, and the numbers they were made from.

    ``rows``: names of the arguments whose first dimension counts tokens or sequences that do not depend on each other.
    ``slack``: how far sums in float32 may be off, in addition to what the largest result allows.
    """

    arguments: dict[str, Any]
    buffers: dict[str, Tensor]
    numbers: dict[str, Any]
    rows: tuple[str, ...] = ()
    slack: float = 0.0


Maker = Callable[..., Call]
_sizes: dict[str, Any] = {"num_tokens": st.integers(1, 6), "dtype": dtypes, "seed": seeds}
_heads: dict[str, Any] = {"num_kv_heads": st.integers(1, 3), "head_dim": st.sampled_from([8, 10, 64, 80, 128])}
_page: dict[str, Any] = {"page_size": st.sampled_from([16, 64])}
_page_dtypes = {"page_dtype": st.sampled_from([None, torch.int8, torch.float8_e4m3fn])}


def _call(numbers: dict[str, Any], rows: tuple[str, ...] = (), **arguments: Any) -> Call:
    """With poison around each tensor that is not yet between some."""
    buffers = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.is_contiguous() and value.dtype != torch.float8_e4m3fn:
            arguments[name], buffers[name] = guarded(value)
    return Call(arguments, buffers, numbers, rows)


def _rms_norm(num_tokens: int, hidden: int, dtype: torch.dtype, seed: int) -> Call:
    rng = np.random.default_rng(seed)
    x = normal(rng, num_tokens, hidden, dtype=dtype, scale=10 ** rng.uniform(-3, 1))
    return _call(dict(hidden=hidden, seed=seed), ("x",), x=x, weight=normal(rng, hidden), eps=1e-5)


def _add_rms_norm(num_tokens: int, hidden: int, dtype: torch.dtype, seed: int) -> Call:
    rng = np.random.default_rng(seed)
    x, residual = (normal(rng, num_tokens, hidden, dtype=dtype) for _ in range(2))
    numbers = dict(hidden=hidden, seed=seed)
    return _call(numbers, ("x", "residual"), x=x, residual=residual, weight=normal(rng, hidden), eps=1e-5)


def _gated(num_tokens: int, intermediate: int, dtype: torch.dtype, seed: int) -> Call:
    rng = np.random.default_rng(seed)
    gate, up = (normal(rng, num_tokens, intermediate, dtype=dtype) for _ in range(2))
    return _call(dict(intermediate=intermediate, seed=seed), ("gate", "up"), gate=gate, up=up)


def _rope(num_tokens: int, num_kv_heads: int, head_dim: int, interleaved: bool, dtype: torch.dtype, seed: int) -> Call:
    rng = np.random.default_rng(seed)
    x = normal(rng, num_tokens, num_kv_heads, head_dim, dtype=dtype)
    cos, sin = angle_tables(500, head_dim)
    positions = random_positions(rng, num_tokens)
    numbers = dict(head_dim=head_dim, seed=seed)
    return _call(numbers, ("x", "positions"), x=x, cos=cos, sin=sin, positions=positions, interleaved=interleaved)


def _rope_and_cache_write(
    num_tokens: int, num_kv_heads: int, head_dim: int, page_size: int, page_dtype: Any, dtype: torch.dtype, seed: int
) -> Call:
    step = Step(seed, num_tokens, 2 * num_kv_heads, num_kv_heads, head_dim, head_dim, dtype, page_dtype, page_size)
    names = ("q", "k", "v", "cos", "sin", "positions", "slot_mapping")
    pools = ("k_pages", "v_pages", "k_scale", "v_scale")
    fields = dict(zip(names, step.inputs(), strict=True)) | dict(zip(pools, step.pages(), strict=True))
    return Call(fields, {}, dict(head_dim=head_dim, seed=seed))


def _write_kv(
    num_tokens: int, num_kv_heads: int, head_dim: int, page_size: int, page_dtype: Any, dtype: torch.dtype, seed: int
) -> Call:
    rng = np.random.default_rng(seed)
    k, v = (normal(rng, num_tokens, num_kv_heads, head_dim, dtype=dtype) for _ in range(2))
    shape = (3, page_size, num_kv_heads, head_dim)
    k_pages, v_pages, k_scale, v_scale = poisoned_pages(shape, page_dtype or dtype)
    slots = random_slots(rng, num_tokens, 3 * page_size)
    slots[rng.random(num_tokens) < 0.2] = -1
    pools = dict(k_pages=k_pages, v_pages=v_pages, slot_mapping=slots, k_scale=k_scale, v_scale=v_scale)
    return _call(dict(head_dim=head_dim, page_dtype=page_dtype, seed=seed), k=k, v=v, **pools)


def _gather_kv(
    num_tokens: int, num_kv_heads: int, head_dim: int, page_size: int, page_dtype: Any, dtype: torch.dtype, seed: int
) -> Call:
    rng = np.random.default_rng(seed)
    lens = rng.integers(0, 40, num_tokens).tolist()
    num_pages = sum(-(-n // page_size) for n in lens) + 2
    shape = (num_pages, page_size, num_kv_heads, head_dim)
    scale = None
    if page_dtype in LIMITS:
        pages = normal(rng, *shape, scale=40.0).clamp(-127, 127).to(page_dtype)
        scale = torch.from_numpy(rng.uniform(0.5, 2.0, shape[:3])).float().to(DEVICE)
    else:
        pages = normal(rng, *shape, dtype=dtype)
    table, seq_lens = ragged_table(rng, lens, page_size, num_pages)
    numbers = dict(page_dtype=page_dtype, seed=seed)
    return _call(numbers, pages=pages, block_table=table, seq_lens=seq_lens, scale=scale, num_keys=sum(lens))


def _copy_pages(num_tokens: int, dtype: torch.dtype, seed: int) -> Call:
    rng = np.random.default_rng(seed)
    order = torch.from_numpy(rng.permutation(2 * num_tokens)).to(DEVICE)
    pages = normal(rng, 2 * num_tokens, 16, 2, 10, dtype=dtype)
    return _call(dict(seed=seed), pages=pages, source=order[:num_tokens].clone(), target=order[num_tokens:].clone())


def _next_slots(num_tokens: int, page_size: int, seed: int) -> Call:
    rng = np.random.default_rng(seed)
    width = int(rng.integers(1, 5))
    most = width * page_size - int(rng.integers(0, page_size))
    lengths = rng.integers(0, most + 1, num_tokens)
    limits = np.where(rng.random(num_tokens) < 0.3, lengths, rng.integers(0, most + 1, num_tokens))
    table = rng.integers(0, 1000, (num_tokens, width))
    arrays = {"lengths": lengths, "limits": limits, "block_table": table}
    named: dict[str, Any] = {n: torch.from_numpy(x.astype(np.int32)).to(DEVICE) for n, x in arrays.items()}
    return _call(dict(page_size=page_size, seed=seed), **named, page_size=page_size, most_positions=most)


def _embedding(num_tokens: int, ggml_type: str, seed: int) -> Call:
    rng = np.random.default_rng(seed)
    table = random_weight(rng, ggml_type, 20, some_columns(ggml_type)[1])
    token_ids = torch.from_numpy(rng.integers(0, 20, num_tokens)).to(DEVICE)
    return _call(dict(ggml_type=ggml_type, seed=seed), ("token_ids",), token_ids=token_ids, table=table)


def _dequantize(ggml_type: str, rows: int, seed: int) -> Call:
    weight = random_weight(np.random.default_rng(seed), ggml_type, rows, some_columns(ggml_type)[1])
    return _call(dict(ggml_type=ggml_type, seed=seed), weight=weight)


def _quantized_matmul(num_tokens: int, ggml_type: str, rows: int, biased: bool, seed: int) -> Call:
    """In float32: for fewer bits, the kernel may round activations to 8 bits, which is another definition."""
    rng = np.random.default_rng(seed)
    weight = random_weight(rng, ggml_type, rows, some_columns(ggml_type)[1])
    x = normal(rng, num_tokens, weight.shape[1])
    bias = normal(rng, rows) if biased else None
    numbers = dict(ggml_type=ggml_type, rows=rows, seed=seed)
    call = _call(numbers, ("x",), x=x, weight=weight, bias=bias, batch_invariant=True)
    # A sum of K float32 products is off by about sqrt(K) half units in the last place of the sum of |x w|.
    terms = float(x.abs().sum(1).max()) * float(np.abs(reference.dequantize(weight.numpy())).max())
    return replace(call, slack=(4 + weight.shape[1] ** 0.5) * 2.0**-24 * terms)


def _quantized_matmul_pair(num_tokens: int, ggml_type: str, rows: int, biased: bool, seed: int) -> Call:
    """The second weight is float16."""
    call = _quantized_matmul(num_tokens, ggml_type, rows, biased, seed)
    x, first, bias = (call.arguments[name] for name in ("x", "weight", "bias"))
    rng = np.random.default_rng(seed)
    second = random_weight(rng, "F16", int(rng.integers(1, 40)), x.shape[1])
    numbers = dict(ggml_type=ggml_type, rows=rows, seed=seed)
    pair = _call(numbers, ("x",), x=x, first=first, second=second, first_bias=bias, batch_invariant=True)
    terms = float(x.abs().sum(1).max()) * float(np.abs(reference.dequantize(second.numpy())).max())
    return replace(pair, slack=call.slack + (4 + x.shape[1] ** 0.5) * 2.0**-24 * terms)


def _sample(num_tokens: int, vocab: int, seed: int) -> Call:
    rng = np.random.default_rng(seed)
    parameters = random_parameters(rng, num_tokens, vocab)
    logits = normal(rng, num_tokens, vocab, scale=3.0)
    return _call(dict(vocab=vocab, seed=seed), ("logits", *parameters), logits=logits, **parameters)


def _penalise(num_tokens: int, vocab: int, seed: int) -> Call:
    rng = np.random.default_rng(seed)

    def column(low: float, high: float) -> Tensor:
        return torch.from_numpy(rng.uniform(low, high, num_tokens)).float().to(DEVICE)

    seen = torch.from_numpy(rng.integers(0, 5, (num_tokens, vocab)).astype(np.int32)).to(DEVICE)
    penalties: dict[str, Any] = dict(repetition=column(0.5, 2.0), frequency=column(-1, 1), presence=column(-1, 1))
    return _call(dict(vocab=vocab, seed=seed), logits=normal(rng, num_tokens, vocab), seen=seen, **penalties)


def _sum_parts(num_tokens: int, ranks: int, columns: int, dtype: torch.dtype, seed: int) -> Call:
    rng = np.random.default_rng(seed)
    parts, residual = (
        normal(rng, ranks, num_tokens, columns, dtype=dtype),
        normal(rng, num_tokens, columns, dtype=dtype),
    )
    return _call(dict(ranks=ranks, seed=seed), parts=parts, bias=normal(rng, columns, dtype=dtype), residual=residual)


_weights = {"ggml_type": st.sampled_from(TYPES), "rows": st.integers(1, 40)}
_plain = {"num_tokens": _sizes["num_tokens"], "seed": seeds}
_vocab = {"vocab": st.integers(2, 300)}

MAKERS: dict[str, tuple[Maker, dict[str, Any]]] = {
    "add_rms_norm": (_add_rms_norm, _sizes | {"hidden": st.integers(1, 700)}),
    "copy_pages": (_copy_pages, _sizes),
    "dequantize": (_dequantize, {"seed": seeds} | _weights),
    "embedding": (_embedding, _plain | {"ggml_type": _weights["ggml_type"]}),
    "gather_kv": (_gather_kv, _sizes | _heads | _page | _page_dtypes),
    "geglu": (_gated, _sizes | {"intermediate": st.integers(1, 1500)}),
    "next_slots": (_next_slots, _plain | _page),
    "penalise": (_penalise, _plain | _vocab),
    "quantized_matmul": (_quantized_matmul, _plain | _weights | {"biased": st.booleans()}),
    "quantized_matmul_pair": (_quantized_matmul_pair, _plain | _weights | {"biased": st.booleans()}),
    "rms_norm": (_rms_norm, _sizes | {"hidden": st.integers(1, 700)}),
    "rope": (_rope, _sizes | _heads | {"interleaved": st.booleans()}),
    "rope_and_cache_write": (_rope_and_cache_write, _sizes | _heads | _page | _page_dtypes),
    "sample": (_sample, _plain | _vocab),
    "sum_parts": (_sum_parts, _sizes | {"ranks": st.sampled_from([2, 4, 8]), "columns": st.integers(1, 700)}),
    "swiglu": (_gated, _sizes | {"intermediate": st.integers(1, 1500)}),
    "write_kv": (_write_kv, _sizes | _heads | _page | _page_dtypes),
}


def calls(kernel_name: str, **fixed: Any) -> st.SearchStrategy[Call]:
    """Calls of a kernel. Numbers that are drawn can be fixed, to a value or to a strategy: ``hidden=576``.

    Raises:
        TypeError: a number that this kernel's calls do not have.
    """
    make, numbers = MAKERS[kernel_name]
    if unknown := sorted(set(fixed) - set(numbers)):
        raise TypeError(f"{unknown} of a call of {kernel_name}: what can be fixed is {', '.join(numbers)}")
    chosen = {name: value if isinstance(value, st.SearchStrategy) else st.just(value) for name, value in fixed.items()}
    return st.builds(make, **numbers | chosen)
