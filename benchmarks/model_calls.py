"""The shapes of real models, and the calls into rooflama.kernels that running them makes.

Numbers from the models' published configurations. Nothing here chooses a tile: that is the launchers' own business.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rooflama.kernels import LAYOUTS, Weight
from rooflama.planning import PAGE_SIZE

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
F8, INT8 = torch.float8_e4m3fn, torch.int8
INT32, INT64 = torch.int32, torch.int64
CONTEXT = 8192  # tokens
BATCHES = (1, 8)  # sequences
CHUNK = 512  # prompt tokens of each sequence in a prefill


@dataclass(frozen=True)
class Model:
    """What of a model the kernels see."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rotary_dim: int = 0  # 0: all of head_dim
    sliding_window: int = 0
    qk_norm: bool = False

    @property
    def qkv_rows(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


MODELS = {
    "SmolLM2-135M": Model(576, 9, 3, 64, 1536, 49152),
    "SmolLM2-360M": Model(960, 15, 5, 64, 2560, 49152),
    "SmolLM2-1.7B": Model(2048, 32, 32, 64, 8192, 49152),
    "TinyLlama-1.1B": Model(2048, 32, 4, 64, 5632, 32000),
    "Llama-2-7B": Model(4096, 32, 32, 128, 11008, 32000),
    "Llama-2-13B": Model(5120, 40, 40, 128, 13824, 32000),
    "Llama-2-70B": Model(8192, 64, 8, 128, 28672, 32000),
    "Llama-3-8B": Model(4096, 32, 8, 128, 14336, 128256),
    "Llama-3-70B": Model(8192, 64, 8, 128, 28672, 128256),
    "Llama-3.2-1B": Model(2048, 32, 8, 64, 8192, 128256),
    "Llama-3.2-3B": Model(3072, 24, 8, 128, 8192, 128256),
    "Mistral-7B-v0.1": Model(4096, 32, 8, 128, 14336, 32000, sliding_window=4096),
    "Qwen2.5-0.5B": Model(896, 14, 2, 64, 4864, 151936),
    "Qwen2.5-1.5B": Model(1536, 12, 2, 128, 8960, 151936),
    "Qwen2.5-3B": Model(2048, 16, 2, 128, 11008, 151936),
    "Qwen2.5-7B": Model(3584, 28, 4, 128, 18944, 152064),
    "Qwen2.5-14B": Model(5120, 40, 8, 128, 13824, 152064),
    "Qwen2.5-32B": Model(5120, 40, 8, 128, 27648, 152064),
    "Qwen2.5-72B": Model(8192, 64, 8, 128, 29568, 152064),
    "Qwen3-0.6B": Model(1024, 16, 8, 128, 3072, 151936, qk_norm=True),
    "Qwen3-1.7B": Model(2048, 16, 8, 128, 6144, 151936, qk_norm=True),
    "Qwen3-4B": Model(2560, 32, 8, 128, 9728, 151936, qk_norm=True),
    "Qwen3-8B": Model(4096, 32, 8, 128, 12288, 151936, qk_norm=True),
    "Qwen3-14B": Model(5120, 40, 8, 128, 17408, 151936, qk_norm=True),
    "Qwen3-32B": Model(5120, 64, 8, 128, 25600, 151936, qk_norm=True),
    "Phi-3-mini-4k": Model(3072, 32, 32, 96, 8192, 32064, sliding_window=2047),
    "Phi-3-mini-128k": Model(3072, 32, 32, 96, 8192, 32064, sliding_window=262144),
    "Phi-3-medium-4k": Model(5120, 40, 10, 128, 17920, 32064, sliding_window=2047),
    "Phi-4-mini": Model(3072, 24, 8, 128, 8192, 200064, rotary_dim=96),
}
EVERYTHING = "Llama-3-8B"  # the model that also meets every weight type and every kind of page


class Call(NamedTuple):
    """``rooflama.kernels.<function>(*args, **kwargs)``; ``note`` tells it from the function's other calls."""

    function: str
    note: str
    args: tuple = ()
    kwargs: dict[str, Any] = {}  # noqa: RUF012


def empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def weight(ggml_type: str, rows: int, columns: int) -> Weight:
    planes = tuple(
        torch.empty((rows, columns // plane.elements), dtype=getattr(torch, plane.dtype))
        for plane in LAYOUTS[ggml_type].planes
    )
    return Weight(ggml_type, planes, (rows, columns))


def pages(
    model: Model, dtype: torch.dtype, page_size: int = PAGE_SIZE
) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor]]:
    """((k_pages, v_pages), the scales that a dtype of codes needs)."""
    shape = (CONTEXT // page_size, page_size, model.num_kv_heads, model.head_dim)
    scales = {}
    if dtype in (F8, INT8):
        scales = {"k_scale": empty(*shape[:3], dtype=F32), "v_scale": empty(*shape[:3], dtype=F32)}
    return (empty(*shape, dtype=dtype), empty(*shape, dtype=dtype)), scales


def page_dtypes(everything: bool) -> tuple[torch.dtype, ...]:
    return (BF16, F8, INT8) if everything else (BF16,)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def embedding_calls(model: Model, everything: bool) -> Iterator[Call]:
    types = LAYOUTS if everything else weight_types(model)[-1:]
    for ggml_type in types:
        table = weight(ggml_type, model.vocab_size, model.hidden_size)
        yield Call("embedding", ggml_type, (empty(8, dtype=INT32), table, BF16))


def norm_calls(model: Model, everything: bool) -> Iterator[Call]:
    gamma, x = empty(model.hidden_size, dtype=F32), empty(8, model.hidden_size)
    yield Call("rms_norm", "", (x, gamma, 1e-5))
    yield Call("add_rms_norm", "", (x, x, gamma, 1e-5))


def rope_calls(model: Model, everything: bool) -> Iterator[Call]:
    half = (model.rotary_dim or model.head_dim) // 2
    cos, sin = empty(CONTEXT, half, dtype=F32), empty(CONTEXT, half, dtype=F32)
    norms: dict[str, Any] = {}
    if model.qk_norm:
        norms = {"q_norm": empty(model.head_dim, dtype=F32), "k_norm": empty(model.head_dim, dtype=F32), "eps": 1e-6}
    for tokens in BATCHES:
        qkv = empty(tokens, model.num_heads + 2 * model.num_kv_heads, model.head_dim)
        q, k, v = qkv.split([model.num_heads, model.num_kv_heads, model.num_kv_heads], dim=1)
        positions, slots = empty(tokens, dtype=INT32), empty(tokens, dtype=INT64)
        yield Call("rope", f"{tokens} tokens", (q, cos, sin, positions))
        if everything:
            yield Call("rope", f"{tokens} tokens interleaved", (q, cos, sin, positions), {"interleaved": True})
        for dtype in page_dtypes(everything):
            kv, scales = pages(model, dtype)
            yield Call(
                "rope_and_cache_write",
                f"{tokens} tokens {short(dtype)} pages",
                (q, k, v, cos, sin, positions, slots, *kv),
                {**norms, **scales},
            )


def page_calls(model: Model, everything: bool) -> Iterator[Call]:
    k, v = (empty(8, model.num_kv_heads, model.head_dim) for _ in range(2))
    for dtype in page_dtypes(everything):
        (k_pages, v_pages), scales = pages(model, dtype)
        yield Call("write_kv", f"{short(dtype)} pages", (k, v, k_pages, v_pages, empty(8, dtype=INT64)), scales)
        yield Call("copy_pages", f"{short(dtype)} pages", (k_pages, empty(4, dtype=INT64), empty(4, dtype=INT64)))
        table, lens = empty(4, CONTEXT // PAGE_SIZE, dtype=INT32), empty(4, dtype=INT32)
        keys = (k_pages, table, lens, scales.get("k_scale"))
        yield Call("gather_kv", f"{short(dtype)} pages", keys, {"num_keys": 4 * CHUNK})


def attention_calls(model: Model, everything: bool) -> Iterator[Call]:
    for dtype in page_dtypes(everything):
        for window in sorted({0, model.sliding_window}):
            for num_seqs in BATCHES:
                note = f"{num_seqs} sequences {short(dtype)} pages" + (f" window {window}" if window else "")
                yield from both_attentions(model, note, num_seqs, page_dtype=dtype, sliding_window=window)
    if everything:
        yield from both_attentions(model, "1 sequence softcap", 1, softcap=50.0)
        yield from both_attentions(model, "1 sequence float16", 1, dtype=F16, page_dtype=F16)
        yield from both_attentions(model, "1 sequence pages of 16", 1, page_size=16)


def both_attentions(
    model: Model,
    note: str,
    num_seqs: int,
    *,
    dtype: torch.dtype = BF16,
    page_dtype: torch.dtype = BF16,
    page_size: int = PAGE_SIZE,
    **options: float,
) -> Iterator[Call]:
    kv, scales = pages(model, page_dtype, page_size)
    table, lens = empty(num_seqs, CONTEXT // page_size, dtype=INT32), empty(num_seqs, dtype=INT32)
    starts = empty(num_seqs + 1, dtype=INT32)
    q = empty(num_seqs * CHUNK, model.num_heads, model.head_dim, dtype=dtype)
    options = {"softmax_scale": model.head_dim**-0.5, **options, **scales}
    yield Call("attention_decode", note, (q.narrow(0, 0, num_seqs), *kv, table, lens), options)
    yield Call("attention_prefill", note, (q, *kv, table, lens, starts), options)


def mlp_calls(model: Model, everything: bool) -> Iterator[Call]:
    gate, up = empty(8, 2 * model.intermediate_size).chunk(2, dim=-1)
    yield Call("swiglu", "", (gate, up))
    yield Call("geglu", "", (gate, up))


def weight_types(model: Model) -> tuple[str, str]:
    """The two types that most of a Q4_K_M file holds: rows that are not whole blocks of 256 fall back."""
    return ("Q5_0", "Q8_0") if model.hidden_size % 256 else ("Q4_K", "Q6_K")


def matmul_calls(model: Model, everything: bool) -> Iterator[Call]:
    hidden, attended = model.hidden_size, model.num_heads * model.head_dim
    matrices = {  # rows, columns, what joins
        "qkv": (model.qkv_rows, hidden, "norm"),
        "attn_output": (hidden, attended, "residual"),
        "gate_up": (2 * model.intermediate_size, hidden, "norm and swiglu"),
        "ffn_down": (hidden, model.intermediate_size, "residual"),
    }
    for tokens in (1, 2, 8, 64, CHUNK):
        for name, (rows, columns, joined) in matrices.items():
            options = {"residual": empty(tokens, rows) if joined == "residual" else None, "resident": True}
            if joined != "residual":
                options |= {"norm_weight": empty(columns, dtype=F32), "eps": 1e-5, "swiglu": "swiglu" in joined}
            types = tuple(LAYOUTS) if everything and name == "attn_output" else weight_types(model)
            for ggml_type in types:
                if columns % LAYOUTS[ggml_type].quant_block:
                    continue
                made = weight(ggml_type, rows, columns)
                note = f"{name} {ggml_type} {tokens} tokens"
                yield Call("quantized_matmul", note, (empty(tokens, columns), made), options)
                if everything and tokens == 1:
                    invariant = {**options, "batch_invariant": True}
                    yield Call("quantized_matmul", f"{note} invariant", (empty(tokens, columns), made), invariant)
    for tokens in BATCHES:
        made = weight(weight_types(model)[-1], model.vocab_size, hidden)
        normed = {"norm_weight": empty(hidden, dtype=F32), "eps": 1e-5}
        normed |= {"resident": True, "out_dtype": F32}
        yield Call("quantized_matmul", f"output {tokens} tokens", (empty(tokens, hidden), made), normed)


def sampling_calls(model: Model, everything: bool) -> Iterator[Call]:
    for num_seqs in BATCHES:
        logits = empty(num_seqs, model.vocab_size, dtype=F32)
        drawn = {"temperature": empty(num_seqs, dtype=F32)}
        drawn |= {name: empty(num_seqs, dtype=INT64) for name in ("seeds", "steps")}
        narrowed = {name: empty(num_seqs, dtype=F32) for name in ("top_p", "min_p", "penalty")}
        narrowed |= {"top_k": empty(num_seqs, dtype=INT32)}
        narrowed |= {"seen": empty(num_seqs, model.vocab_size, dtype=torch.bool)}
        columns = [empty(num_seqs, dtype=F32) for _ in range(3)]
        counts = empty(num_seqs, model.vocab_size, dtype=INT32)
        yield Call("penalise", f"{num_seqs} sequences", (logits, counts, *columns))
        yield Call("sample", f"greedy {num_seqs} sequences", (logits,))
        yield Call("sample", f"drawn {num_seqs} sequences", (logits,), drawn)
        if everything:
            yield Call("sample", f"narrowed {num_seqs} sequences", (logits,), {**drawn, **narrowed})


FAMILIES = (
    embedding_calls,
    norm_calls,
    rope_calls,
    page_calls,
    attention_calls,
    mlp_calls,
    matmul_calls,
    sampling_calls,
)


def calls(names: list[str]) -> Iterator[tuple[str, Call]]:
    """(model, call) for each call that the named models, or all of them, make."""
    for name, model in MODELS.items():
        if not names or name in names:
            for family in FAMILIES:
                for call in family(model, name == EVERYTHING):
                    yield name, call
