"""Rows of an embedding table of 128,256 rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import cases
from cases import BF16, Case, random_weight
from model_calls import INT32, Call, Model, empty, weight, weight_types
from rooflama import kernels
from rooflama.kernels import LAYOUTS


def measured() -> Iterator[Case]:
    for ggml_type in ("Q4_K", "Q6_K", "Q8_0"):
        table = random_weight(ggml_type, 128256, 4096)
        for tokens in (1, 4096):
            row_bytes = table.nbytes // 128256 + 2 * 4096
            ids = [torch.randint(128256, (tokens,), device=cases.CUDA) for _ in range(cases.copies(tokens * row_bytes))]
            yield Case(
                f"{ggml_type} tokens={tokens}", tokens * row_bytes, 0,
                {"rooflama": [lambda i=i, t=table: kernels.embedding(i, t, BF16) for i in ids]},
            )  # fmt: skip


def calls(model: Model, everything: bool) -> Iterator[Call]:
    types = LAYOUTS if everything else weight_types(model)[-1:]
    for ggml_type in types:
        table = weight(ggml_type, model.vocab_size, model.hidden_size)
        yield Call(kernels.embedding, ggml_type, (empty(8, dtype=INT32), table, BF16))
