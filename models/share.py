"""Which part of a model one of several ranks holds: whole heads, whole rows, and columns cut at quantisation blocks.

    q, k, v, gate, up         rows: those of the rank's heads, and of its part of the feed-forward's width
    attention's output, down  columns: those that the rank's heads and its part of the width feed. The product is one
                              addend of the sum over ranks.
    embedding, output         rows: the rank's part of the vocabulary
    norms, biases of sums     whole, on every rank

Key/value heads are split if there are as many as ranks or more. If there are fewer, each is held by several ranks,
whose query heads share it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np

from .config import ModelConfig
from .errors import ConfigError

Cut = tuple[int, int]  # columns of a matrix that is cut by columns, and those of one quantisation block


@dataclass(frozen=True)
class Share:
    """The part of rank ``rank`` of ``size``."""

    rank: int = 0
    size: int = 1

    def part(self, total: int) -> slice:
        """This rank's part of ``total`` rows. Parts differ by one row at most; the first ranks' are the larger ones."""
        start, stop = (-(-rank * total // self.size) for rank in (self.rank, self.rank + 1))
        return slice(start, stop)

    def of(self, config: ModelConfig) -> ModelConfig:
        """``config`` with this rank's heads and width. Vocabulary and hidden size stay whole."""
        return replace(
            config,
            num_heads=config.num_heads // self.size,
            num_kv_heads=max(1, config.num_kv_heads // self.size),
            intermediate_size=config.intermediate_size // self.size,
        )

    def qkv_rows(self, config: ModelConfig) -> np.ndarray:
        """The rows of this rank's heads in q, k and v stacked: int64 [(num_heads + 2 num_kv_heads) * head_dim]."""
        mine, head_dim = self.of(config), config.head_dim
        first_key = config.num_heads + self.rank * config.num_kv_heads // self.size
        heads = (
            (self.rank * mine.num_heads, mine.num_heads),
            (first_key, mine.num_kv_heads),
            (first_key + config.num_kv_heads, mine.num_kv_heads),
        )
        return _rows(*((first * head_dim, count * head_dim) for first, count in heads))

    def gate_up_rows(self, config: ModelConfig) -> np.ndarray:
        """The rows of this rank's part of the width in gate and up stacked: int64 [2 * intermediate_size]."""
        width = config.intermediate_size
        part = self.part(width)
        return _rows(*((first + part.start, part.stop - part.start) for first in (0, width)))

    def check(self, config: ModelConfig, cuts: Collection[Cut]) -> None:
        """Raise ConfigError, with the numbers of ranks that would work, unless ``size`` ranks can share the model."""
        reason = "" if self.size == 1 else _obstacle(config, self.size, cuts)
        if not reason:
            return
        fitting = [size for size in range(1, config.num_heads + 1) if not _obstacle(config, size, cuts)]
        numbers = " or ".join([", ".join(map(str, fitting[:-1]))] * (len(fitting) > 1) + [str(fitting[-1])])
        raise ConfigError(
            f"{config.name} on {self.size} ranks: {reason}",
            rule="heads, the feed-forward's width and the quantisation blocks of a row are shared out evenly",
            remedy=f"Use {numbers} rank{'s' * (fitting[-1] > 1)}",
        )


ALONE = Share()


def _rows(*runs: tuple[int, int]) -> np.ndarray:
    """(first, count) of each run -> the row numbers of all."""
    return np.concatenate([np.arange(first, first + count) for first, count in runs])


def _obstacle(config: ModelConfig, size: int, cuts: Collection[Cut]) -> str:
    """Why ``size`` ranks cannot share the model; empty if they can."""
    heads, kv_heads = config.num_heads, config.num_kv_heads
    if heads % size:
        return f"{heads} query heads"
    if kv_heads % size and size % kv_heads:
        return f"{kv_heads} key/value heads"
    if config.intermediate_size % size:
        return f"a feed-forward width of {config.intermediate_size}"
    for columns, block in sorted(cuts):
        if columns % (size * block):
            return f"rows of {columns // block} quantisation blocks of {block}"
    return "" if size <= config.vocab_size else f"{config.vocab_size} tokens"
