"""The rotation of each sequence in a running model: the rows of cos and sin that its tokens read.

Keys are cached already rotated, so a sequence must keep its rotation. It is chosen when the sequence starts, from its
planned length: the prompt and the most tokens that may be generated. So a sequence that may fill the context rotates
like a long one from its first token on.

    LongRoPE  one of two lists of divisors, short or long, each with a table
    dynamic   a base for each planned length above the original context; no table: each pass computes cos and sin of
              its tokens from the sequences' frequencies
    others    one table for all sequences

transformers decides at each step from the current length. The two agree if the current length is the planned one. A
sequence's rotation does not depend on other sequences.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from rooflama.loaders.device import Device

from .spec import (
    Dynamic,
    FactorSet,
    FactorSetPolicy,
    RopeSpec,
    attention_factor,
    choose_factor_set,
    inverse_frequencies,
    rope_tables,
)


class Rotation(Protocol):
    """A model's rotary embedding, as a runner uses it."""

    def pin(self, planned: list[int]) -> Tensor:
        """The choice for each sequence, from its planned length in tokens: a tensor [num_seqs, ...] on the host."""

    def key(self, planned: int) -> str:
        """Names the rotation of a sequence: equal for planned lengths that rotate alike."""

    def rows(self, pins: Tensor, positions: Tensor) -> dict[str, Any]:
        """``Step``'s cos, sin and rope_rows for tokens at ``positions``, int32 [num_tokens], with one pin per token."""


def make_rotation(
    spec: RopeSpec,
    *,
    local: RopeSpec | None = None,
    max_context: int,
    longrope: FactorSetPolicy,
    device: Device,
) -> Rotation:
    """The rotation of a model whose sequences reach at most ``max_context`` tokens.

    ``local`` is the rotation of layers with a sliding window, None if it is ``spec``. It has one table for all
    sequences. Raises RopeError if ``longrope`` is no policy.
    """
    choose_factor_set(spec, 0, longrope)  # refuses an unknown policy
    if local is not None:
        rotation = make_rotation(spec, max_context=max_context, longrope=longrope, device=device)
        return _WithLocal(rotation, *_upload([rope_tables(local, max_context)], device, "local rotary"))
    if isinstance(spec.scaling, Dynamic):
        return _Computed(spec)
    return _Tables(spec, max_context, longrope, device)


def _upload(tables: list[tuple[np.ndarray, np.ndarray]], device: Device, label: str) -> tuple[Tensor, Tensor]:
    """The (cos, sin) pairs stacked, on the device."""
    cos, sin = (np.concatenate(table) for table in zip(*tables, strict=True))
    return device.upload(cos, label=f"{label} cosines").tensor, device.upload(sin, label=f"{label} sines").tensor


class _Tables:
    """One table, or two of which the second follows the first. A pin is a sequence's first row, int32."""

    def __init__(self, spec: RopeSpec, max_context: int, longrope: FactorSetPolicy, device: Device):
        self._spec, self._max_context, self._longrope = spec, max_context, longrope
        sets: tuple[FactorSet | None, ...] = ("short", "long") if spec.kind == "longrope" else (None,)
        self._has_choice = len(sets) > 1
        tables = [rope_tables(spec, max_context, factor_set=factor_set) for factor_set in sets]
        self._cos, self._sin = _upload(tables, device, "rotary")

    def key(self, planned: int) -> str:
        return choose_factor_set(self._spec, planned, self._longrope) or ""

    def pin(self, planned: list[int]) -> Tensor:
        if not self._has_choice:
            return torch.zeros(len(planned), dtype=torch.int32)
        long = [choose_factor_set(self._spec, length, self._longrope) == "long" for length in planned]
        return torch.tensor(long).int() * self._max_context

    def rows(self, pins: Tensor, positions: Tensor) -> dict[str, Any]:
        rows = pins + positions if self._has_choice else positions
        return {"cos": self._cos, "sin": self._sin, "rope_rows": rows}


class _Computed:
    """cos and sin, computed per pass in float64, rounded once. A pin is a sequence's w, float64 [rotary_dim / 2]."""

    def __init__(self, spec: RopeSpec):
        self._spec = spec

    def key(self, planned: int) -> str:
        return inverse_frequencies(self._spec, seq_len=planned).tobytes().hex()

    def pin(self, planned: list[int]) -> Tensor:
        return torch.from_numpy(np.stack([inverse_frequencies(self._spec, seq_len=length) for length in planned]))

    def rows(self, pins: Tensor, positions: Tensor) -> dict[str, Any]:
        angles = pins * positions.unsqueeze(1)
        scale = attention_factor(self._spec)
        cos, sin = ((table(angles) * scale).float() for table in (torch.cos, torch.sin))
        return {
            "cos": cos,
            "sin": sin,
            "rope_rows": torch.arange(len(positions), dtype=torch.int32, device=pins.device),
        }


class _WithLocal:
    """Adds the table of layers with a sliding window to a rotation."""

    def __init__(self, rotation: Rotation, cos: Tensor, sin: Tensor):
        self._rotation, self._cos, self._sin = rotation, cos, sin

    def key(self, planned: int) -> str:
        return self._rotation.key(planned)

    def pin(self, planned: list[int]) -> Tensor:
        return self._rotation.pin(planned)

    def rows(self, pins: Tensor, positions: Tensor) -> dict[str, Any]:
        return self._rotation.rows(pins, positions) | {"local_rotation": (self._cos, self._sin, positions)}
