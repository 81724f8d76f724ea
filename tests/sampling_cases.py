"""How often the tests of sampling draw, and transformers' filters to compare with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from rooflama.kernels import sample, sampling
from rooflama.testing.strategies import DEVICE

# A search takes about twenty launches per chunk, at milliseconds each under the interpreter.
few_if_interpreted = settings(max_examples=3) if DEVICE.type == "cpu" else lambda test: test


def chunks_of(tokens: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Body of a fixture: programs own so many tokens. On a GPU, no launch bound with another number is replayed."""
    monkeypatch.setattr(sampling, "CHUNK", tokens)
    sample.forget()
    yield
    sample.forget()


def warped_by_transformers(logits, temperature, top_k, top_p, min_p, penalty=1.0, seen=()):
    """Which tokens transformers keeps, in the order in which its generate applies its processors."""
    from transformers.generation import logits_process as processors

    scores = torch.from_numpy(logits)[None]
    if len(seen):
        scores = processors.RepetitionPenaltyLogitsProcessor(penalty)(torch.from_numpy(seen)[None], scores)
    scores = processors.TemperatureLogitsWarper(temperature)(None, scores)
    if top_k:
        scores = processors.TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = processors.TopPLogitsWarper(top_p)(None, scores)
    if min_p:
        scores = processors.MinPLogitsWarper(min_p)(None, scores)
    return scores[0].numpy()
