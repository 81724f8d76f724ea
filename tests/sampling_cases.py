"""What the tests of sampling draw: mixtures of parameters. And transformers' filters, to compare with."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
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


def column(values, dtype):
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def randomness(rng, num_seqs):
    return {
        "seeds": torch.from_numpy(rng.integers(-(2**63), 2**63 - 1, num_seqs)).to(DEVICE),
        "steps": torch.from_numpy(rng.integers(0, 2**40, num_seqs)).to(DEVICE),
    }


def random_parameters(rng, num_seqs, vocab):
    """A mixture of greedy and drawing rows, each filter on for about half of them."""

    def mixed(values, off):
        return np.where(rng.random(num_seqs) < 0.5, values, off)

    return {
        "temperature": column(
            mixed(rng.uniform(0.3, 2.0, num_seqs), 0.8) * (rng.random(num_seqs) < 0.8), torch.float32
        ),
        "top_k": column(mixed(rng.integers(1, vocab + 3, num_seqs), 0), torch.int32),
        "top_p": column(mixed(rng.uniform(0.05, 1.0, num_seqs), 1.0), torch.float32),
        "min_p": column(mixed(rng.uniform(0.0, 0.5, num_seqs), 0.0), torch.float32),
        **randomness(rng, num_seqs),
    }


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
