"""Quantised products: over all types at one token, over up to 4,096 tokens, and by each regime."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import torch
import torch.nn.functional as F

import cases
from cases import BF16, Case, random_weight
from model_calls import BATCHES, CHUNK, F32, Call, Model, empty, weight, weight_types
from rooflama import kernels
from rooflama.kernels import LAYOUTS, Weight
from rooflama.kernels.launch import override


def measured() -> Iterator[Case]:
    return chain(products(), pairs(), regimes())


SHAPES = [(28672, 4096), (4096, 14336), (6144, 4096), (4096, 4096), (128256, 4096)]  # Llama-3-8B's
MORE_TOKENS = (2, 4, 8, 16, 32, 64, 128, 512, 4096)


def products() -> Iterator[Case]:
    """Decode (1 token) over every type, then 2 to 4096 tokens over two of them; the peer is cuBLAS on bf16 weights."""
    for rows, columns in SHAPES:
        dense = [random_weight("BF16", rows, columns) for _ in range(cases.copies(2 * rows * columns))]
        plan = [(ggml_type, 1) for ggml_type in LAYOUTS if ggml_type != "F32"]
        if (rows, columns) == SHAPES[0]:
            plan += [(ggml_type, tokens) for ggml_type in ("Q4_K", "Q8_0") for tokens in MORE_TOKENS]
        for ggml_type, tokens in plan:
            weights = [random_weight(ggml_type, rows, columns)]
            weight_bytes = weights[0].nbytes
            weights += [random_weight(ggml_type, rows, columns) for _ in range(cases.copies(weight_bytes) - 1)]
            x = torch.randn(tokens, columns, device=cases.CUDA, dtype=BF16)
            yield Case(
                f"{ggml_type} [{rows}, {columns}] tokens={tokens}",
                weight_bytes + 2 * tokens * (rows + columns),
                2 * tokens * rows * columns,
                {
                    "rooflama": [lambda w=w, x=x: kernels.quantized_matmul(x, w) for w in weights],
                    "torch bf16": [lambda w=w, x=x: F.linear(x, w.planes[0]) for w in dense],
                },
            )


def pairs() -> Iterator[Case]:
    """q and k with v, in the types of a Q4_K_M file; the peer is a product of each."""
    types, columns, rows = ("Q4_K", "Q6_K"), 4096, (5120, 1024)

    def random_pair() -> list[Weight]:
        return [random_weight(ggml_type, count, columns) for ggml_type, count in zip(types, rows, strict=True)]

    weight_bytes = sum(weight.nbytes for weight in random_pair())
    weights = [random_pair() for _ in range(cases.copies(weight_bytes))]
    norm = {"norm_weight": torch.ones(columns, device=cases.CUDA), "eps": 1e-5, "resident": True}
    for tokens in (1, 2):
        x = torch.randn(tokens, columns, device=cases.CUDA, dtype=BF16)
        yield Case(
            f"pair Q4_K [{rows[0]}, {columns}], Q6_K [{rows[1]}, {columns}] tokens={tokens}",
            weight_bytes + 2 * tokens * (sum(rows) + columns),
            2 * tokens * sum(rows) * columns,
            {
                "rooflama": [lambda w=w, x=x: kernels.quantized_matmul_pair(x, *w, **norm) for w in weights],
                "apart": [lambda w=w, x=x: [kernels.quantized_matmul(x, one, **norm) for one in w] for w in weights],
            },
        )


def regimes() -> Iterator[Case]:
    """Each regime of the quantised product wherever it can run: what the launch table should say."""
    unbounded = 1 << 30
    limits = {
        "fixed_point": (8, unbounded, unbounded, unbounded, unbounded),
        "wgmma": (64, 0, unbounded, unbounded, unbounded),
        "gemv": (16, 0, 0, unbounded, unbounded),
        "dot": (256, 0, 0, 0, unbounded),
        "matmul": (unbounded, 0, 0, 0, 0),
    }
    rows, columns = 28672, 4096
    for ggml_type in ("Q4_K", "Q8_0", "BF16"):
        weight_bytes = random_weight(ggml_type, rows, columns).nbytes
        weights = [random_weight(ggml_type, rows, columns) for _ in range(cases.copies(weight_bytes))]
        for tokens in (1, 2, 4, 8, 16, 32, 64, 128, 256):
            x = torch.randn(tokens, columns, device=cases.CUDA, dtype=BF16)

            def forced(weight, fixed_point, wgmma, gemv, dot, x=x):
                with override("quantized_matmul", fixed_point=fixed_point, wgmma=wgmma, gemv=gemv, dot=dot):
                    return kernels.quantized_matmul(x, weight)

            yield Case(
                f"{ggml_type} [{rows}, {columns}] tokens={tokens}, regimes",
                weight_bytes + 2 * tokens * (rows + columns),
                2 * tokens * rows * columns,
                {
                    name: [lambda w=w, own=own, f=forced: f(w, *own) for w in weights]
                    for name, (most, *own) in limits.items()
                    if tokens <= most and not (name in ("fixed_point", "wgmma") and ggml_type == "BF16")
                },
            )


def calls(model: Model, everything: bool) -> Iterator[Call]:
    hidden, attended = model.hidden_size, model.num_heads * model.head_dim
    matrices = {  # rows, columns, what joins
        "qkv": (model.qkv_rows, hidden, "norm"),
        "attn_output": (hidden, attended, "residual"),
        "gate_up": (2 * model.intermediate_size, hidden, "norm and swiglu"),
        "ffn_down": (hidden, model.intermediate_size, "residual"),
    }
    invariant = []  # last, so that their launches are known by the calls of others that have the same
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
                yield Call(kernels.quantized_matmul, note, (empty(tokens, columns), made), options)
                if everything and tokens in (1, CHUNK):
                    own = (empty(tokens, columns), made), {**options, "batch_invariant": True}
                    invariant.append(Call(kernels.quantized_matmul, f"{note} invariant", *own))
    yield from invariant
    for tokens in (1, 2):
        parts = [weight(t, rows, hidden) for t, rows in zip(weight_types(model), model.qk_and_v_rows, strict=True)]
        normed = {"norm_weight": empty(hidden, dtype=F32), "eps": 1e-5, "resident": True}
        yield Call(kernels.quantized_matmul_pair, f"qkv {tokens} tokens", (empty(tokens, hidden), *parts), normed)
    for tokens in BATCHES:
        made = weight(weight_types(model)[-1], model.vocab_size, hidden)
        normed = {"norm_weight": empty(hidden, dtype=F32), "eps": 1e-5}
        normed |= {"resident": True, "out_dtype": F32}
        yield Call(kernels.quantized_matmul, f"output {tokens} tokens", (empty(tokens, hidden), made), normed)
