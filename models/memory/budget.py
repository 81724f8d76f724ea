"""The bytes that a model takes, computed before anything is allocated, and the largest model size that fits.

Each term of ``terms`` becomes a line. On a GPU the lines sum to the process's memory as the driver reports it, up to
the error of the estimate for the device context:

    total = weights + K/V pages + tables + workspace + CUDA graph + allocator rounding + device context

Workspace terms are those of the widest moment of a prefill pass. CUDA graphs have memory of their own, so the terms of
a decode step and of the largest captured pass are added to them. On a CPU the total is the model's part alone, without
Python and torch.

All lines but the rounding grow with context and sequences. The rounding shrinks by up to some tens of MiB when a
request fits into the rest of a segment, so that a larger context may take less than a smaller one.
"""

from __future__ import annotations

import sys
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, Self

import torch

from rooflama.kernels import checks
from rooflama.kernels.all_reduce import peers_bytes, slot_elements

from ..config import ModelConfig
from ..errors import ArgumentError
from ..kv_cache import is_scaled
from ..serving.passes import captured_sizes, padded
from . import terms
from .allocator import Segments
from .terms import FORMULAS, Moment, pages_per_sequence
from .weights import Backend, WeightBytes, form_on_device

MIB = 2**20

Group = Literal["weights", "keys and values", "tables", "workspace", "CUDA graph", "device"]


@dataclass(frozen=True)
class Target:
    """The device that a plan is for.

    Attributes:
        kind: ``cpu``, ``cuda`` or ``hip``.
        backend: decides the resident form of the weights.
        context_bytes: memory of the driver's context and of the kernels' code; 0 on a CPU.
        matmul_library_bytes: workspace that the vendor's matmul library allocates through torch.
    """

    kind: str
    backend: Backend
    context_bytes: int = 0
    matmul_library_bytes: int = 0

    @classmethod
    def gpu(cls, kind: str, *, hopper: bool = True) -> Target:
        """A GPU. torch gives cuBLAS 32 MiB on Hopper and later, and 8.125 MiB before."""
        library = 32 * MIB if hopper else 2 * 4 * MIB + 128 * 1024
        return cls(kind, "triton", CONTEXT_BYTES[kind], library)


# What NCCL allocates for two ranks of one host, outside torch, on the devices of the table below (on H200s).
COLLECTIVES_BYTES = 770 * MIB

# What the driver counts besides torch's memory: context, torch's and cuBLAS's modules, kernels. Measured on an H100
# with torch 2.11 and CUDA 13 (benchmarks/results/memory_plan.csv); other GPUs and versions differ by some tens of MiB.
CONTEXT_BYTES = {"cuda": 757 * MIB, "hip": 757 * MIB}


@dataclass(frozen=True)
class Line:
    """One term: its group, its name, its bytes and its formula."""

    group: Group
    name: str
    nbytes: int
    formula: str


@dataclass(frozen=True)
class Budget:
    """The bytes that a model takes, and whether they fit.

    Attributes:
        config, weights: the model, or the share of one rank.
        context: the most tokens of each sequence.
        sequences: how many sequences hold pages at once.
        page_size, prefill_chunk: tokens of a page, and the most tokens of a prefill pass.
        dtype, kv_dtype: of activations, and of stored keys and values.
        target: the device.
        batch_invariant: whether products are batch-invariant; such products need no dequantised rows in memory.
        limit: the most bytes that ``total_bytes`` may be; None for no limit.
        free_bytes: free memory of the device, whose context exists already; None if the device is not here.
        ranks: how many ranks share the model. The plan is that of one; no other rank takes more.
    """

    config: ModelConfig
    weights: WeightBytes
    context: int
    sequences: int
    page_size: int
    prefill_chunk: int
    dtype: torch.dtype
    kv_dtype: torch.dtype
    target: Target
    batch_invariant: bool = False
    limit: int | None = None
    free_bytes: int | None = None
    ranks: int = 1

    MOST_SEQUENCES: ClassVar[int] = checks.MOST_SEQUENCES  # of a plan
    LONGEST_CONTEXT: ClassVar[int] = 2**24  # tokens, for models that were trained for less

    def __post_init__(self) -> None:
        longest = max(self.config.context_length, self.LONGEST_CONTEXT)
        for name, value, most, rule in (
            ("context", self.context, longest, f"contexts are of 1 to {longest} tokens"),
            ("sequences", self.sequences, self.MOST_SEQUENCES, f"plans are for 1 to {self.MOST_SEQUENCES} sequences"),
            ("limit", self.limit, sys.maxsize, f"a limit is a whole number of bytes from 1 to {sys.maxsize}"),
        ):
            if value is not None and (type(value) is not int or not 1 <= value <= most):
                raise ArgumentError(f"{name} {value!r}", rule=rule, remedy="Ask for a whole number in that range")

    @property
    def num_pages(self) -> int:
        """Pages in each layer's pool: every sequence at its full context."""
        return self.sequences * pages_per_sequence(self.config, self.context, self.page_size, self.prefill_chunk)

    @cached_property
    def lines(self) -> tuple[Line, ...]:
        config, on_gpu = self.config, self.target.kind != "cpu"
        token = terms.kv_token_bytes(config, self.kv_dtype)
        slots = self.num_pages * self.page_size
        tokens = min(slots, self.sequences * self.context)
        scales = " + 4" if is_scaled(self.kv_dtype) else ""
        heads = (
            f"2 x {config.num_layers} x {config.num_kv_heads} x ({config.head_dim} x {self.kv_dtype.itemsize}{scales})"
        )
        tables, blocks = self._table_bytes()
        stored, backend = self.weights.stored, self.target.backend
        lines = [
            *(
                Line(
                    "weights",
                    kind,
                    nbytes,
                    f"{stored.get(kind, 0):,} bytes in the file, {form_on_device(kind, backend)}",
                )
                for kind, nbytes in sorted(self.weights.resident.items(), key=lambda item: -item[1])
            ),
            Line("keys and values", "tokens", tokens * token, f"{tokens:,} tokens x {token:,} bytes = {heads}"),
            Line("keys and values", "rest of last pages", (slots - tokens) * token, f"{slots - tokens:,} tokens"),
            Line("tables", "rotary tables", tables, terms.rotary_formula(config)),
            Line("tables", "block tables", blocks, "4 x (2 x sequences + 32) x pages of a context"),
            *(Line("workspace", name, nbytes, FORMULAS[name]) for name, nbytes in self._prefill.items()),
        ]
        if on_gpu:
            graphs = (*self._graph.items(), *self._captured.items(), ("captured results", self._captured_result))
            lines += [Line("CUDA graph", name, nbytes, FORMULAS[name]) for name, nbytes in graphs]
            lines += [
                Line("device", "allocator rounding", self._rounding, "torch's segments of 2 and 20 MiB, see allocator"),
                Line("device", "context and kernels", self.target.context_bytes, "an estimate for the kind of device"),
            ]
        if on_gpu and self.ranks > 1:
            slot = slot_elements(self.addend_elements, self.dtype.itemsize, self.ranks, terms.ANY_GPU)
            mapped = peers_bytes(slot, self.dtype.itemsize, self.ranks)
            lines += [
                Line("device", "addends of ranks", mapped, "2 b n E, and their flags, in memory that the ranks map"),
                Line("device", "collectives library", COLLECTIVES_BYTES, "an estimate for NCCL's buffers"),
            ]
        return tuple(line for line in lines if line.nbytes)

    @property
    def pass_tokens(self) -> int:
        """Tokens of the largest prefill pass."""
        return min(self.prefill_chunk, self.sequences * self.context)

    @property
    def addend_elements(self) -> int:
        """Elements of the largest sum over ranks."""
        return max(self._padded_pass, self.sequences) * self.config.hidden_size

    @property
    def _padded_pass(self) -> int:
        """Tokens of the largest prefill pass as it runs: a GPU's are padded to the size of a captured one."""
        if self.target.kind == "cpu":
            return self.pass_tokens
        return padded(self.pass_tokens, captured_sizes(self.config))

    @property
    def _uses_library(self) -> bool:
        """Whether the vendor's matmul library multiplies anything."""
        return bool(self.weights.matrices) and not self.batch_invariant

    def _widest(self, tokens: int) -> dict[str, int]:
        """The widest moment of a prefill pass of so many tokens."""
        if self.target.backend == "numpy":
            moments = terms.definition_moments(
                self.config, tokens, self.context, self.sequences, self.dtype.itemsize, self.ranks
            )
        else:
            moments = terms.prefill_moments(
                self.config,
                self.weights.matrices,
                tokens,
                self.sequences,
                self.dtype,
                self.ranks,
                self.batch_invariant,
            )
        sums = [sum(moment.values()) for moment in moments]
        return dict(moments[sums.index(max(sums))])

    @cached_property
    def _prefill(self) -> Moment:
        """The widest moment of a prefill pass."""
        widest = self._widest(self._padded_pass)
        if self.target.kind != "cpu" and self._uses_library:
            widest["matmul library"] = self.target.matmul_library_bytes
        return widest

    @cached_property
    def _graph(self) -> Moment:
        """The memory of the captured decode step."""
        step: dict[str, int] = {
            **terms.decode_moment(self.config, self.context, self.sequences, self.dtype, self.ranks)
        }
        matrices, invariant = self.weights.matrices, self.batch_invariant
        step["products in parts"] = terms.product_scratch_bytes(matrices, self.sequences, invariant)
        rows = terms.dequantised_bytes(matrices, self.sequences, self.dtype, invariant)
        if rows:
            step["dequantised rows"] = rows
        return step

    @cached_property
    def _captured(self) -> Moment:
        """What the graphs of prompt passes hold: the largest one's terms, which the others share, and the library's."""
        sizes = captured_sizes(self.config)
        tokens = padded(min(self.pass_tokens, sizes[-1]), sizes)
        captured = {"captured prompt passes": sum(self._widest(tokens).values())}
        if self._uses_library:
            captured["matmul library"] = self.target.matmul_library_bytes
        return captured

    @property
    def _captured_result(self) -> int:
        """The residual stream after the largest captured pass, which lies in the general pool."""
        if self.target.kind == "cpu":
            return 0
        return captured_sizes(self.config)[-1] * self.config.hidden_size * self.dtype.itemsize

    def _table_bytes(self) -> tuple[int, int]:
        """(rotary tables, block tables)."""
        blocks = terms.block_table_bytes(self.context, self.sequences, self.page_size)
        rotary = terms.rope_table_bytes(self.config, self.context, self.pass_tokens, self.sequences)
        return rotary, blocks

    @cached_property
    def _lasting_segments(self) -> Segments:
        """torch's general pool after loading: weights, pages and tables."""
        lasting = self.weights.segments.copy()
        tables, blocks = self._table_bytes()
        pools = terms.kv_allocations(self.config, self.kv_dtype, self.num_pages, self.page_size)
        lasting.take_all([*pools, tables // 2, tables // 2, blocks // 2, blocks // 2, self._captured_result])
        return lasting

    def _segments(self) -> tuple[Segments, Segments, Segments]:
        """torch's general pool and those of a decode step and of captured passes, after all of them have run."""
        general = self._lasting_segments.copy()
        general.take_all(self._prefill.values())
        return general, Segments(self._graph.values()), Segments(self._captured.values())

    @cached_property
    def _rounding(self) -> int:
        """The bytes of torch's segments beyond the requests; 0 on a CPU."""
        if self.target.kind == "cpu":
            return 0
        return sum(segments.reserved - segments.asked for segments in self._segments())

    def bytes_of(self, *groups: Group) -> int:
        return sum(line.nbytes for line in self.lines if line.group in groups)

    @property
    def total_bytes(self) -> int:
        return sum(line.nbytes for line in self.lines)

    @property
    def allocated_bytes(self) -> int:
        """The peak of torch's allocated bytes. A prefill pass and a decode step do not run at the same time."""
        prefilling, graph, _ = self._segments()
        if self.target.kind == "cpu":
            return prefilling.taken
        library = self._captured.get("matmul library", 0)  # of the stream that captures
        decoding = self._lasting_segments.taken + self._prefill.get("matmul library", 0) + graph.taken
        return library + max(prefilling.taken, decoding)

    @property
    def headroom_bytes(self) -> int | None:
        """Bytes left under the limit and in free memory, negative if the plan does not fit; None without a bound."""
        return self._headroom(self.total_bytes)

    def _headroom(self, total: int) -> int | None:
        room = []
        if self.limit is not None:
            room.append(self.limit - total)
        if self.free_bytes is not None:
            room.append(self.free_bytes - (total - self.target.context_bytes))
        return min(room, default=None)

    @property
    def fits(self) -> bool:
        """Whether the headroom is not negative; True without a bound."""
        headroom = self.headroom_bytes
        return headroom is None or headroom >= 0

    @property
    def _fits_unrounded(self) -> bool:
        """Whether the plan fits without the allocator's rounding. If so, every smaller plan does too."""
        headroom = self._headroom(self.total_bytes - self._rounding)
        return headroom is None or headroom >= 0

    def but(self, **changes: Any) -> Self:
        """The same plan with other ``context``, ``sequences``, ``kv_dtype`` and so on."""
        return replace(self, **changes)

    def largest_context(self, sequences: int | None = None) -> int:
        """The longest context of ``sequences`` sequences (default: the plan's) that fits; 0 if not one token does.

        It is at most the context that the model was trained for. A shorter one may not fit, if the allocator's rounding
        is larger there.
        """
        longest, page = self.config.context_length, self.page_size
        plan = self.but(sequences=sequences or self.sequences)
        if plan.but(context=longest).fits:
            return longest
        pages = _largest(range(page, longest, page), lambda tokens: plan.but(context=tokens))
        return _largest(range(pages + 1, min(pages + page, longest)), lambda tokens: plan.but(context=tokens)) or pages

    def most_sequences(self, context: int | None = None) -> int:
        """The most sequences of ``context`` tokens each (default: the plan's) that fit at once.

        The result is at most ``MOST_SEQUENCES``, even if more would fit.
        """
        plan = self.but(context=context or self.context)
        return _largest(range(1, self.MOST_SEQUENCES + 1), lambda count: plan.but(sequences=count))


def _largest(numbers: range, plan_of: Callable[[int], Budget]) -> int:
    """The largest of ascending numbers whose plan fits, or 0. Searches down from the largest that fits unrounded."""
    end = bisect_left(numbers, True, key=lambda number: not plan_of(number)._fits_unrounded)
    return next((number for number in reversed(numbers[:end]) if plan_of(number).fits), 0)
