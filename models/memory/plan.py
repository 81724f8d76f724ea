"""The memory plan that callers get: a budget that shows itself, raises if it does not fit, and says what would."""

from __future__ import annotations

from math import ceil, floor
from typing import Any

from rooflama.loaders.device import Device, DeviceOutOfMemory

from . import display, remedies, terms
from .amounts import count, size
from .budget import Budget


class MemoryPlan(Budget):
    """What a model takes, term by term. Shows itself in a terminal and in Jupyter. Its attributes are ``Budget``'s."""

    def remedies(self) -> list[str]:
        """Changes of which each alone makes the plan fit, the mildest first."""
        return remedies.remedies(self)

    def require(self, device: Device | None = None) -> None:
        """Raise DeviceOutOfMemory if the plan does not fit, with the numbers, and the changes that would help."""
        if self.fits:
            return
        room = [f"{size(self.limit, floor)} is the limit"] if self.limit is not None else []
        room += [f"{size(self.free_bytes, floor)} free"] if self.free_bytes is not None else []
        name = self.config.name + (f", one of {self.ranks} ranks," if self.ranks > 1 else "")
        many = f"{self.sequences} sequences of " if self.sequences > 1 else ""
        weights, kv = self.bytes_of("weights"), self.bytes_of("keys and values")
        beside = self.total_bytes - weights - kv
        error = DeviceOutOfMemory(
            f"{name} with {many}{count(self.context, 'token')} takes {size(self.total_bytes, ceil)} "
            f"({size(weights)} weights, {size(kv)} keys and values, {size(beside)} beside them); {', '.join(room)}",
            rule="a model is loaded only if all of it fits",
            remedy="; ".join(self.remedies()),
        )
        error.asked, error.free, error.limit = self.total_bytes, self.free_bytes, self.limit
        if device is not None:
            error.total, error.held = device.total_bytes, device.held_bytes
        raise error

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values, for JSON."""
        most = self.most_sequences() if self.headroom_bytes is not None else None
        return {
            "model": self.config.name,
            "architecture": self.config.architecture,
            "context_tokens": self.context,
            "sequences": self.sequences,
            "page_size_tokens": self.page_size,
            "num_pages": self.num_pages,
            "prefill_chunk_tokens": self.prefill_chunk,
            "dtype": str(self.dtype).removeprefix("torch."),
            "kv_dtype": str(self.kv_dtype).removeprefix("torch."),
            "device": self.target.kind,
            "ranks": self.ranks,
            "backend": self.target.backend,
            "batch_invariant": self.batch_invariant,
            "weights_stored_bytes": self.weights.stored,
            "weights_resident_bytes": self.weights.resident,
            "kv_bytes_per_token": terms.kv_token_bytes(self.config, self.kv_dtype),
            "lines": [
                {"group": line.group, "name": line.name, "bytes": line.nbytes, "formula": line.formula}
                for line in self.lines
            ],
            "allocated_bytes": self.allocated_bytes,
            "total_bytes": self.total_bytes,
            "limit_bytes": self.limit,
            "free_bytes": self.free_bytes,
            "headroom_bytes": self.headroom_bytes,
            "fits": self.fits,
            "largest_context_tokens": self.largest_context(),
            "most_sequences": most,
            "more_sequences_may_fit": most == self.MOST_SEQUENCES,
            "remedies": self.remedies(),
        }

    def __repr__(self) -> str:
        return f"MemoryPlan({display.title(self)}: {size(self.total_bytes, ceil)})"

    def __rich_console__(self, console: Any, options: Any) -> Any:
        return display.rich_lines(self)

    def _repr_html_(self) -> str:
        return display.html(self)
