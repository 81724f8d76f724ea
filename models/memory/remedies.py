"""The changes that make a memory plan fit, in words."""

from __future__ import annotations

from math import ceil

import torch

from .amounts import count, size
from .budget import Budget


def remedies(plan: Budget) -> list[str]:
    """Changes of which each alone makes the plan fit, the mildest first; none if it fits."""
    if plan.fits:
        return []
    found, most = [], plan.most_sequences()
    for sequences in dict.fromkeys((plan.sequences, most if 0 < most < plan.sequences else 1)):
        longest = 0
        for kv_dtype in dict.fromkeys((plan.kv_dtype, torch.int8)):
            other = plan.but(sequences=sequences, kv_dtype=kv_dtype)
            context = other.context if other.fits else other.largest_context()
            if context > longest:
                longest = context
                found.append(f"{_difference(plan, other.but(context=context))} would fit")
    if not found:
        least = _room(plan.but(context=1, sequences=1))
        found = [f"no context fits: {least} would hold 1 token, and a checkpoint of fewer bits per weight takes less"]
    return [*found, f"{_room(plan)} would hold all of it"]


def _difference(plan: Budget, other: Budget) -> str:
    """The settings of ``other`` that differ from ``plan``'s."""
    parts = []
    if other.sequences != plan.sequences:
        parts.append(count(other.sequences, "sequence", "d"))
    if other.context != plan.context:
        parts.append(f"a context of {count(other.context, 'token', 'd')}")
    if other.kv_dtype != plan.kv_dtype:
        parts.append("keys and values in int8")
    return " with ".join(parts)


def _room(plan: Budget) -> str:
    """The limit and the free memory that the plan needs, as far as they do not suffice."""
    total, on_device = plan.total_bytes, plan.total_bytes - plan.target.context_bytes
    room = []
    if plan.limit is not None and plan.limit < total:
        room.append(f"a limit of {size(total, ceil)}")
    if plan.free_bytes is not None and plan.free_bytes < on_device:
        room.append(f"a device with {size(on_device, ceil)} free")
    return " on ".join(room)
