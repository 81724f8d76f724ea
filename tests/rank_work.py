"""What the tests have each rank of a world do (``worlds.py``). Functions are picklable by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from rooflama.kernels import use_backend
from rooflama.loaders.gguf import read_gguf
from rooflama.models.parallel import Ranks
from running_models import decode_logits, prefill_logits, running

PROMPT = 20  # tokens; the rest of a text is decoded


def logits_alone(path: Path, tokens: list[int], ranks: Ranks | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    """Logits of a prefilled text, and of its decoded part, by the definitions."""
    with use_backend("numpy"), read_gguf(path) as checkpoint, running(checkpoint, ranks=ranks, **options) as runner:
        (prefilled,) = prefill_logits(runner, [tokens], 7)
        (decoded,) = decode_logits(runner, [tokens], [PROMPT])
    return prefilled, decoded


def logits(path: Path, tokens: list[int], options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """``logits_alone`` by all ranks together."""
    return logits_alone(path, tokens, Ranks(dist.group.WORLD), **options)
