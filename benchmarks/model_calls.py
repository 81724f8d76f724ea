"""The shapes of real models, and the arguments that calls into rooflama.kernels share at those shapes.

The numbers are those of the models' published configurations. The calls are in ``registry``, one file per kernel. They
choose no tiles: the launchers do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
    """The numbers of a model that its kernels see."""

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
    def qk_and_v_rows(self) -> tuple[int, int]:
        return (self.num_heads + self.num_kv_heads) * self.head_dim, self.num_kv_heads * self.head_dim

    @property
    def qkv_rows(self) -> int:
        return sum(self.qk_and_v_rows)


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
    """``function(*args, **kwargs)``; ``note`` distinguishes it from the function's other calls."""

    function: Callable[..., Any]
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
    return Weight.make(ggml_type, planes, (rows, columns))


def pages(
    model: Model, dtype: torch.dtype, page_size: int = PAGE_SIZE
) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor]]:
    """((k_pages, v_pages), their scales if ``dtype`` is one of codes)."""
    shape = (CONTEXT // page_size, page_size, model.num_kv_heads, model.head_dim)
    scales = {}
    if dtype in (F8, INT8):
        scales = {"k_scale": empty(*shape[:3], dtype=F32), "v_scale": empty(*shape[:3], dtype=F32)}
    return (empty(*shape, dtype=dtype), empty(*shape, dtype=dtype)), scales


def page_dtypes(everything: bool) -> tuple[torch.dtype, ...]:
    return (BF16, F8, INT8) if everything else (BF16,)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def weight_types(model: Model) -> tuple[str, str]:
    """The two types of most tensors in a Q4_K_M file. Rows that are not whole blocks of 256 get other types."""
    return ("Q5_0", "Q8_0") if model.hidden_size % 256 else ("Q4_K", "Q6_K")


# (note, q of whole prompts, (k_pages, v_pages), block_table, seq_lens, query_start_loc, options)
Attention = tuple[str, Tensor, tuple[Tensor, Tensor], Tensor, Tensor, Tensor, dict[str, Any]]


def attentions(model: Model, everything: bool) -> Iterator[Attention]:
    """The arguments of every attention call of ``model``."""
    for dtype in page_dtypes(everything):
        for window in sorted({0, model.sliding_window}):
            for num_seqs in BATCHES:
                note = f"{num_seqs} sequences {short(dtype)} pages" + (f" window {window}" if window else "")
                yield attention(model, note, num_seqs, page_dtype=dtype, sliding_window=window)
    if everything:
        yield attention(model, "1 sequence softcap", 1, softcap=50.0)
        yield attention(model, "1 sequence float16", 1, dtype=F16, page_dtype=F16)
        yield attention(model, "1 sequence pages of 16", 1, page_size=16)


def attention(
    model: Model,
    note: str,
    num_seqs: int,
    *,
    dtype: torch.dtype = BF16,
    page_dtype: torch.dtype = BF16,
    page_size: int = PAGE_SIZE,
    **options: float,
) -> Attention:
    kv, scales = pages(model, page_dtype, page_size)
    table, lens = empty(num_seqs, CONTEXT // page_size, dtype=INT32), empty(num_seqs, dtype=INT32)
    starts = empty(num_seqs + 1, dtype=INT32)
    q = empty(num_seqs * CHUNK, model.num_heads, model.head_dim, dtype=dtype)
    return note, q, kv, table, lens, starts, {"softmax_scale": model.head_dim**-0.5, **options, **scales}
