"""Norms, at one token and at 4,096."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import cases
from cases import BF16, Case
from model_calls import F32, Call, Model, empty
from rooflama import kernels


def measured() -> Iterator[Case]:
    for tokens in (1, 4096):
        for hidden in (576, 4096):
            sets = cases.copies(4 * tokens * hidden)
            weight = torch.ones(hidden, device=cases.CUDA)
            xs, residuals = (
                [torch.randn(tokens, hidden, device=cases.CUDA, dtype=BF16) for _ in range(sets)] for _ in range(2)
            )
            yield Case(
                f"rms_norm [{tokens}, {hidden}]", 4 * tokens * hidden, 0,
                {
                    "rooflama": [lambda x=x, w=weight: kernels.rms_norm(x, w, 1e-5) for x in xs],
                    "torch": [lambda x=x, w=weight.to(BF16): F.rms_norm(x, w.shape, w, 1e-5) for x in xs],
                },
                {"hidden": hidden},
            )  # fmt: skip
            yield Case(
                f"add_rms_norm [{tokens}, {hidden}]", 8 * tokens * hidden, 0,
                {
                    "rooflama": [
                        lambda x=x, r=r, w=weight: kernels.add_rms_norm(x, r, w, 1e-5)
                        for x, r in zip(xs, residuals, strict=True)
                    ]
                },
            )  # fmt: skip


def calls(model: Model, everything: bool) -> Iterator[Call]:
    gamma, x = empty(model.hidden_size, dtype=F32), empty(8, model.hidden_size)
    yield Call(kernels.rms_norm, "", (x, gamma, 1e-5))
    yield Call(kernels.add_rms_norm, "", (x, x, gamma, 1e-5))
