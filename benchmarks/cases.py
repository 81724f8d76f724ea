"""What is measured: one registry of kernels, shapes, the bytes and operations each case needs, and its peers.

A case builds enough sets of buffers that a replay does not find what it reads in the L2 cache. Where a set is smaller
than ``CACHE_BYTES / MOST_SETS``, 49 KB, it may: one token of a norm, of RoPE, of an embedding or of a page write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from rooflama import kernels
from rooflama.kernels import LAYOUTS, Weight
from rooflama.kernels.quantized_matmul import REGIMES

CUDA = "cuda"
BF16 = torch.bfloat16
CACHE_BYTES = 200_000_000  # four times the L2 of an H100
MOST_SETS = 4096  # each is a launch or more in one graph

Calls = list[Callable[[], object]]


@dataclass(frozen=True)
class Case:
    """One shape of one kernel.

    Attributes:
        kernel, label: what and at which shape.
        num_bytes: device memory that must move, each input read once, each output written once.
        num_flops: operations that must be done on tensor cores.
        implementations: name -> calls on different buffers; ``rooflama`` and its peers.
        facts: what kernels/launch.py may ask about the case.
    """

    kernel: str
    label: str
    num_bytes: int
    num_flops: int
    implementations: dict[str, Calls] = field(repr=False)
    facts: dict[str, int] = field(default_factory=dict)


def random_weight(ggml_type: str, rows: int, columns: int) -> Weight:
    """Random codes with small scales; any bits are a valid weight."""
    planes = []
    for plane in LAYOUTS[ggml_type].planes:
        shape, dtype = (rows, columns // plane.elements), getattr(torch, plane.dtype)
        if dtype.is_floating_point:
            planes.append((torch.randn(shape, device=CUDA) * 0.01).to(dtype))
        else:
            limits = torch.iinfo(dtype)
            planes.append(torch.randint(limits.min, limits.max + 1, shape, device=CUDA, dtype=torch.int64).to(dtype))
    return Weight(ggml_type, tuple(planes), (rows, columns))


def _copies(num_bytes: int) -> int:
    return max(2, min(MOST_SETS, -(-CACHE_BYTES // num_bytes)))


def quantized_matmul_cases() -> Iterator[Case]:
    """Decode (1 token) over every type, then 2 to 4096 tokens over Q4_K; the peer is cuBLAS on bf16 weights."""
    shapes = [(4096, 4096), (28672, 4096), (4096, 14336)]
    plan = [(t, n, k, 1) for n, k in shapes for t in LAYOUTS if t != "F32"]
    plan += [(t, 28672, 4096, m) for t in ("Q4_K", "Q8_0") for m in (2, 4, 8, 16, 32, 64, 128, 512, 4096)]
    for ggml_type, rows, columns, tokens in plan:
        weight_bytes = random_weight(ggml_type, rows, columns).nbytes
        weights = [random_weight(ggml_type, rows, columns) for _ in range(_copies(weight_bytes))]
        dense = [random_weight("BF16", rows, columns) for _ in range(_copies(2 * rows * columns))]
        x = torch.randn(tokens, columns, device=CUDA, dtype=BF16)
        yield Case(
            "quantized_matmul",
            f"{ggml_type} [{rows}, {columns}] tokens={tokens}",
            weight_bytes + 2 * tokens * (rows + columns),
            2 * tokens * rows * columns,
            {
                "rooflama": [lambda w=w, x=x: kernels.quantized_matmul(x, w) for w in weights],
                "torch bf16": [lambda w=w, x=x: F.linear(x, w.planes[0]) for w in dense],
            },
        )


def regime_cases() -> Iterator[Case]:
    """Each regime of the quantised product wherever it can run: what ``REGIMES`` should say."""
    unbounded = 1 << 30
    limits = {
        "fixed_point": (8, unbounded, unbounded, unbounded),
        "gemv": (16, 0, unbounded, unbounded),
        "dot": (256, 0, 0, unbounded),
        "matmul": (unbounded, 0, 0, 0),
    }
    rows, columns = 28672, 4096
    for ggml_type in ("Q4_K", "Q8_0", "BF16"):
        weight_bytes = random_weight(ggml_type, rows, columns).nbytes
        weights = [random_weight(ggml_type, rows, columns) for _ in range(_copies(weight_bytes))]
        for tokens in (1, 2, 4, 8, 16, 32, 64, 128, 256):
            x = torch.randn(tokens, columns, device=CUDA, dtype=BF16)

            def forced(weight, fixed_point, gemv, dot, x=x):
                own = {"fixed_point": fixed_point, "gemv": gemv, "dot": dot}
                with mock.patch.dict(REGIMES, {"quantised": own, "float": own}):
                    return kernels.quantized_matmul(x, weight)

            yield Case(
                "quantized_matmul",
                f"{ggml_type} [{rows}, {columns}] tokens={tokens}, regimes",
                weight_bytes + 2 * tokens * (rows + columns),
                2 * tokens * rows * columns,
                {
                    name: [lambda w=w, own=own, f=forced: f(w, *own) for w in weights]
                    for name, (most, *own) in limits.items()
                    if tokens <= most and not (name == "fixed_point" and ggml_type == "BF16")
                },
            )


def _paged(num_seqs: int, context: int, kv_heads: int, head_dim: int, page_size: int) -> tuple[list, Tensor, Tensor]:
    num_pages = num_seqs * context // page_size
    shape = (num_pages, page_size, kv_heads, head_dim)
    copies = _copies(4 * num_seqs * context * kv_heads * head_dim)
    pools = [tuple(torch.randn(shape, device=CUDA, dtype=BF16) for _ in range(2)) for _ in range(copies)]
    block_table = torch.randperm(num_pages, device=CUDA).to(torch.int32).view(num_seqs, -1)
    return pools, block_table, torch.full((num_seqs,), context, device=CUDA, dtype=torch.int32)


def attention_decode_cases() -> Iterator[Case]:
    """One token over pages of 16; the peer is torch SDPA over contiguous keys and values."""
    batches = [(1, 4096), (1, 32768), (1, 131072), (8, 4096), (8, 32768), (32, 4096), (64, 8192)]
    for heads, kv_heads, head_dim in ((32, 8, 128), (28, 4, 128), (32, 32, 96)):
        for num_seqs, context in batches:
            if num_seqs * context * kv_heads * head_dim * 4 > 20e9:
                continue
            pools, block_table, seq_lens = _paged(num_seqs, context, kv_heads, head_dim, 16)
            q = torch.randn(num_seqs, heads, head_dim, device=CUDA, dtype=BF16)
            scale = head_dim**-0.5
            dense = [
                tuple(p.view(num_seqs, context, kv_heads, head_dim).transpose(1, 2) for p in pool) for pool in pools
            ]

            def ours(pool, q=q, table=block_table, lens=seq_lens, scale=scale):
                return kernels.attention_decode(q, *pool, table, lens, softmax_scale=scale)

            def sdpa(pool, q=q.unsqueeze(2)):
                return F.scaled_dot_product_attention(q, *pool, enable_gqa=True)

            yield Case(
                "attention_decode",
                f"{heads}/{kv_heads} d{head_dim} {num_seqs}x{context}",
                4 * num_seqs * context * kv_heads * head_dim,
                4 * num_seqs * context * heads * head_dim,
                {
                    "rooflama": [lambda p=p, f=ours: f(p) for p in pools],
                    "torch SDPA": [lambda p=p, f=sdpa: f(p) for p in dense],
                },
                {"itemsize": 2, "head_dim": head_dim},
            )


def attention_prefill_cases() -> Iterator[Case]:
    """A whole prompt over pages of 64; the peer is torch SDPA, by whichever of its kernels torch picks."""
    for heads, kv_heads, head_dim in ((32, 8, 128), (32, 8, 64), (32, 32, 96)):
        for tokens in (1024, 4096, 16384):
            pools, block_table, seq_lens = _paged(1, tokens, kv_heads, head_dim, 64)
            starts = torch.tensor([0, tokens], device=CUDA, dtype=torch.int32)
            q = torch.randn(tokens, heads, head_dim, device=CUDA, dtype=BF16)
            dense = [
                tuple(
                    p[block_table[0].long()].view(1, tokens, kv_heads, head_dim).transpose(1, 2).contiguous()
                    for p in pool
                )
                for pool in pools
            ]

            def ours(pool, q=q, table=block_table, lens=seq_lens, starts=starts, scale=head_dim**-0.5):
                return kernels.attention_prefill(q, *pool, table, lens, starts, softmax_scale=scale)

            def sdpa(pool, q=q.transpose(0, 1).unsqueeze(0).contiguous()):
                return F.scaled_dot_product_attention(q, *pool, is_causal=True, enable_gqa=True)

            yield Case(
                "attention_prefill",
                f"{heads}/{kv_heads} d{head_dim} n={tokens}",
                4 * tokens * (heads + kv_heads) * head_dim,
                2 * tokens * tokens * heads * head_dim,
                {
                    "rooflama": [lambda p=p, f=ours: f(p) for p in pools],
                    "torch SDPA": [lambda p=p, f=sdpa: f(p) for p in dense],
                },
                {"itemsize": 2, "head_dim": head_dim},
            )


def elementwise_cases() -> Iterator[Case]:
    """Norms and SwiGLU, at one token and at 4096."""
    for tokens in (1, 4096):
        for hidden in (576, 4096):
            sets = _copies(4 * tokens * hidden)
            weight = torch.ones(hidden, device=CUDA)
            xs, residuals = (
                [torch.randn(tokens, hidden, device=CUDA, dtype=BF16) for _ in range(sets)] for _ in range(2)
            )
            yield Case(
                "norm", f"rms_norm [{tokens}, {hidden}]", 4 * tokens * hidden, 0,
                {
                    "rooflama": [lambda x=x, w=weight: kernels.rms_norm(x, w, 1e-5) for x in xs],
                    "torch": [lambda x=x, w=weight.to(BF16): F.rms_norm(x, w.shape, w, 1e-5) for x in xs],
                },
                {"hidden": hidden},
            )  # fmt: skip
            yield Case(
                "norm", f"add_rms_norm [{tokens}, {hidden}]", 8 * tokens * hidden, 0,
                {
                    "rooflama": [
                        lambda x=x, r=r, w=weight: kernels.add_rms_norm(x, r, w, 1e-5)
                        for x, r in zip(xs, residuals, strict=True)
                    ]
                },
            )  # fmt: skip
        gates = [torch.randn(tokens, 2 * 14336, device=CUDA, dtype=BF16) for _ in range(_copies(6 * tokens * 14336))]
        yield Case(
            "mlp", f"swiglu [{tokens}, 14336]", 6 * tokens * 14336, 0,
            {
                "rooflama": [lambda g=g: kernels.swiglu(*g.chunk(2, -1)) for g in gates],
                "torch": [lambda g=g: F.silu(g[:, :14336]) * g[:, 14336:] for g in gates],
            },
        )  # fmt: skip


def rotary_and_page_cases() -> Iterator[Case]:
    """Rotation, the fused rotation and cache write, page writes and gathers, of 32 query and 8 kv heads of 128."""
    heads, kv_heads, head_dim, page_size, num_pages = 32, 8, 128, 16, 4096
    cos, sin = (torch.randn(num_pages * page_size, head_dim // 2, device=CUDA) for _ in range(2))
    pages = [torch.randn(num_pages, page_size, kv_heads, head_dim, device=CUDA, dtype=BF16) for _ in range(2)]
    for tokens in (1, 4096):
        qkv_bytes = 2 * tokens * (heads + 2 * kv_heads) * head_dim
        sets = [
            torch.randn(tokens, heads + 2 * kv_heads, head_dim, device=CUDA, dtype=BF16).split(
                [heads, kv_heads, kv_heads], dim=1
            )
            for _ in range(_copies(qkv_bytes))
        ]
        slots = [torch.randperm(num_pages * page_size, device=CUDA)[:tokens].clone() for _ in sets]
        positions = torch.arange(tokens, device=CUDA, dtype=torch.int32)

        def rope(q, positions=positions):
            return kernels.rope(q, cos, sin, positions)

        def fused(q, k, v, slot, positions=positions):
            return kernels.rope_and_cache_write(q, k, v, cos, sin, positions, slot, *pages)

        yield Case(
            "rope", f"rope tokens={tokens}", 4 * tokens * heads * head_dim, 0,
            {"rooflama": [lambda q=q, f=rope: f(q) for q, _, _ in sets]},
        )  # fmt: skip
        yield Case(
            "rope", f"rope_and_cache_write tokens={tokens}", 2 * qkv_bytes, 0,
            {"rooflama": [lambda s=s, slot=slot, f=fused: f(*s, slot) for s, slot in zip(sets, slots, strict=True)]},
        )  # fmt: skip
        yield Case(
            "paged_cache", f"write_kv tokens={tokens}", 8 * tokens * kv_heads * head_dim, 0,
            {
                "rooflama": [
                    lambda s=s, slot=slot: kernels.write_kv(*s[1:], *pages, slot)
                    for s, slot in zip(sets, slots, strict=True)
                ]
            },
        )  # fmt: skip
    pools, block_table, seq_lens = _paged(8, 4096, kv_heads, head_dim, page_size)
    yield Case(
        "paged_cache", "gather_kv 8x4096", 4 * 8 * 4096 * kv_heads * head_dim, 0,
        {
            "rooflama": [
                lambda p=pool[0]: kernels.gather_kv(p, block_table, seq_lens, num_keys=8 * 4096) for pool in pools
            ]
        },
    )  # fmt: skip


def table_cases() -> Iterator[Case]:
    """Rows of an embedding table, dequantised weights, and sampling from a vocabulary of 128,256."""
    for ggml_type in ("Q4_K", "Q6_K", "Q8_0"):
        table = random_weight(ggml_type, 128256, 4096)
        for tokens in (1, 4096):
            row_bytes = table.nbytes // 128256 + 2 * 4096
            ids = [torch.randint(128256, (tokens,), device=CUDA) for _ in range(_copies(tokens * row_bytes))]
            yield Case(
                "embedding", f"{ggml_type} tokens={tokens}", tokens * row_bytes, 0,
                {"rooflama": [lambda i=i, t=table: kernels.embedding(i, t, BF16) for i in ids]},
            )  # fmt: skip
        weights = [random_weight(ggml_type, 14336, 4096) for _ in range(2)]
        yield Case(
            "dequantize", f"{ggml_type} [14336, 4096]", weights[0].nbytes + 2 * 14336 * 4096, 0,
            {"rooflama": [lambda w=w: kernels.dequantize(w, BF16) for w in weights]},
        )  # fmt: skip
    for num_seqs in (1, 64):
        sets = [torch.randn(num_seqs, 128256, device=CUDA) for _ in range(_copies(4 * num_seqs * 128256))]
        integers = {name: torch.zeros(num_seqs, dtype=torch.int64, device=CUDA) for name in ("seeds", "steps")}
        floats = {
            name: torch.full((num_seqs,), value, device=CUDA)
            for name, value in (("temperature", 0.8), ("top_p", 0.95), ("min_p", 0.05))
        }
        filters = {**integers, **floats, "top_k": torch.full((num_seqs,), 40, dtype=torch.int32, device=CUDA)}
        yield Case(
            "sampling", f"greedy [{num_seqs}, 128256]", 4 * num_seqs * 128256, 0,
            {
                "rooflama": [lambda x=x: kernels.sample(x) for x in sets],
                "torch": [lambda x=x: x.argmax(-1) for x in sets],
            },
        )  # fmt: skip
        yield Case(
            "sampling", f"temperature, top-k, top-p, min-p [{num_seqs}, 128256]", 4 * num_seqs * 128256, 0,
            {"rooflama": [lambda x=x, f=filters: kernels.sample(x, **f) for x in sets]},
        )  # fmt: skip


def penalty_cases() -> Iterator[Case]:
    """Penalties on the logits of a vocabulary of 128,256."""
    for num_seqs in (1, 64):
        num_bytes = 12 * num_seqs * 128256
        logits = [torch.randn(num_seqs, 128256, device=CUDA) for _ in range(_copies(num_bytes))]
        seen = torch.zeros(num_seqs, 128256, dtype=torch.int32, device=CUDA)
        seen[:, :1000] = 3
        rest = (seen, *(torch.full((num_seqs,), value, device=CUDA) for value in (1.1, 0.1, 0.1)))
        yield Case(
            "penalties", f"penalise [{num_seqs}, 128256]", num_bytes, 0,
            {"rooflama": [lambda x=x, rest=rest: kernels.penalise(x, *rest) for x in logits]},
        )  # fmt: skip


CASES: dict[str, Callable[[], Iterator[Case]]] = {
    "quantized_matmul": quantized_matmul_cases,
    "regimes": regime_cases,
    "attention_decode": attention_decode_cases,
    "attention_prefill": attention_prefill_cases,
    "elementwise": elementwise_cases,
    "rotary_and_pages": rotary_and_page_cases,
    "tables": table_cases,
    "penalties": penalty_cases,
}
