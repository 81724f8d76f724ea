"""Ranks that run one model together, through torch.distributed: their sums, their logits, and their agreements.

Each rank runs the same program on its share of the weights (``share.py``). In a layer they meet twice: the products of
attention's output and of the feed-forward's output are sums over ranks. Once a step they meet for the embedding, whose
row one rank has, and once for the logits, of which each rank has some columns. Every rank then draws from the same
logits with the same seed, and so draws the same token.

Sums are taken in the order of the ranks, in float32, rounded once. Only large sums of more than two ranks are left to
the vendor's library, unless they must be batch-invariant.

Small facts (errors, contexts, seeds) are exchanged on the CPU, over gloo. A rank that ends closes its connections, so
the others learn of it at once.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _symmetric_memory

from rooflama.kernels import RooflamaError, one_shot_sum, sum_parts
from rooflama.kernels.all_reduce import BLOCK, Peers, most_bytes, peers_bytes, slot_elements

from .errors import ArgumentError
from .share import Share

if TYPE_CHECKING:
    from rooflama.loaders.device import Device

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name up to torch 2.12
WAIT_FOR_PEOPLE = timedelta(days=30)  # ranks may wait for a person to type; a rank that ended is noticed otherwise


class RankFailed(RooflamaError, RuntimeError):
    """Another rank failed, so that this one cannot go on."""


class Ranks:
    """The ranks of a process group, seen from one of them.

    Args:
        group: initialised by the caller; its timeout limits how long a rank waits for another one's tensors.
        batch_invariant: sum in the order of the ranks however many tokens there are.
    """

    def __init__(self, group: dist.ProcessGroup, *, batch_invariant: bool = False):
        self.group, self.batch_invariant = group, batch_invariant
        self.share = Share(group.rank(), group.size())
        self._peers: Peers | None = None
        self._mapping: Any = None  # torch's handle, without which the peers' memory is unmapped

    def connect(self, device: Device, dtype: torch.dtype, num_elements: int) -> None:
        """Let sums in ``dtype`` go through memory that all ranks map. Every rank must call it, with equal arguments.

        Args:
            num_elements: the most elements of an addend. The launch table says how large addends may be that go this
                way; memory is taken for no larger ones.

        Nothing changes unless all ranks are Nvidia GPUs of one host that can read each other's memory: sums then go
        through the group's backend. ``device`` owns the memory, and frees it when it is closed.

        Raises:
            RankFailed, DeviceOutOfMemory: on this rank or on another one.
        """
        on_gpu, index = device.kind == "cuda", device.torch_device.index
        places = self.exchange((platform.node(), index) if on_gpu else None)
        others = [place for rank, place in enumerate(places) if rank != self.share.rank]
        reaches = on_gpu and all(
            place is not None
            and place[0] == platform.node()
            and place[1] != index
            and torch.cuda.can_device_access_peer(index, place[1])
            for place in others
        )
        if not all(self.exchange(reaches)):
            return
        ranks = self.share.size
        capacity = slot_elements(num_elements, dtype.itemsize, ranks, device.torch_device)
        blocks, slot_bytes = capacity // BLOCK, 2 * capacity * dtype.itemsize
        with self.together():
            memory = device.allocate_shared(peers_bytes(capacity, dtype.itemsize, ranks), label="addends of ranks")
            launches = device.allocate((blocks,), torch.int32, label="launches of sums over ranks").tensor.zero_()
        with self._guard():
            self._mapping = _symmetric_memory.rendezvous(memory.tensor, self.group)
        allocation = self._mapping.get_buffer(self.share.rank, (1,), torch.uint8)
        offsets = self.exchange(memory.tensor.data_ptr() - allocation.data_ptr())  # torch may place it within a pool

        def of_each(shape: tuple[int, ...], dtype: torch.dtype, start: int) -> tuple[Tensor, ...]:
            """The memory of every rank from byte ``start`` on."""
            places = [(offset + start) // dtype.itemsize for offset in offsets]
            return tuple(self._mapping.get_buffer(rank, shape, dtype, place) for rank, place in enumerate(places))

        slots, flags = of_each((2, capacity), dtype, 0), of_each((2, blocks, ranks), torch.int32, slot_bytes)
        self._peers = Peers(slots, flags, launches, self.share.rank)
        self.exchange(None)  # no rank writes to another before that one's memory is zero and mapped

    def total(self, addend: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """The sum of the ranks' addends [num_tokens, columns] (+ bias) (+ residual), the same on every rank.

        Raises:
            RankFailed: another rank ended, or did not come within the group's timeout.
        """
        if self._peers is not None and addend.numel() <= self._peers.capacity:
            return one_shot_sum(addend, self._peers, bias, residual)
        if self.batch_invariant or addend.nbytes <= most_bytes(self.share.size, addend.device)["GATHER_BYTES"]:
            return sum_parts(self._gathered(addend), bias, residual)
        with self._guard():
            dist.all_reduce(addend, group=self.group)
        return sum_parts(addend.unsqueeze(0), bias, residual)

    def joined(self, part: Tensor, width: int) -> Tensor:
        """[num_tokens, width]: the columns of all ranks side by side, of which ``part`` [num_tokens, n] has this one's.

        Raises:
            RankFailed: as for ``total``.
        """
        size = self.share.size
        widths = [Share(rank, size).part(width) for rank in range(size)]
        counts = [columns.stop - columns.start for columns in widths]
        if part.shape[1] < max(counts):
            part = torch.nn.functional.pad(part, (0, max(counts) - part.shape[1]))
        parts = self._gathered(part)
        if min(counts) == max(counts):
            return parts.movedim(0, 1).reshape(len(part), width)
        return torch.cat([one[:, :count] for one, count in zip(parts, counts, strict=True)], dim=1)

    def _gathered(self, mine: Tensor) -> Tensor:
        """[ranks, *mine.shape]."""
        everyone = torch.empty((self.share.size, *mine.shape), dtype=mine.dtype, device=mine.device)
        with self._guard():
            _all_gather(everyone.flatten(0, 1), mine.contiguous(), group=self.group)
        return everyone

    def exchange(self, value: Any) -> list[Any]:
        """Each rank's value, in the order of the ranks; small and picklable."""
        values: list[Any] = [None] * self.share.size
        with self._guard():
            dist.all_gather_object(values, value, group=_control(self.group))
        return values

    @contextmanager
    def together(self) -> Iterator[None]:
        """Leave the block on every rank, or on none: if it raises on one, the others raise RankFailed at its end.

        The block itself must not wait for other ranks. An error that leaves it has ``known_to_all`` set.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        found = self.exchange(None if failure is None else _described(failure))
        failed = [rank for rank, said in enumerate(found) if said is not None]
        if failure is None and failed:
            said = found[failed[0]]
            failure = RankFailed(f"rank {failed[0]}: {said[0]}", rule=said[1], remedy=said[2])
        if failure is not None:
            failure.known_to_all = True  # type: ignore[attr-defined]  # on errors of any class
            raise failure

    @contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, RooflamaError):
                raise
            said = (str(error) or type(error).__name__).splitlines()[0]
            raise RankFailed(
                f"rank {self.share.rank} of {self.share.size} lost the others ({said})",
                rule="all ranks take every step together, within the process group's timeout",
                remedy="Look at what the rank that ended first says, and start all of them again",
            ) from error


def ranks_of(tensor_parallel: bool | dist.ProcessGroup, *, batch_invariant: bool = False) -> Ranks | None:
    """The ranks that ``rooflama.load`` was given: True for the default group. None for one rank alone.

    Raises:
        ArgumentError: it is no process group, there is none, or this process is not in it.
    """
    if tensor_parallel is False:
        return None
    if not dist.is_available() or not dist.is_initialized():
        raise ArgumentError(
            "tensor_parallel without a process group",
            rule="ranks meet in a group of torch.distributed",
            remedy="Start with torchrun, and call torch.distributed.init_process_group() before",
        )
    group = dist.group.WORLD if tensor_parallel is True else tensor_parallel
    if not isinstance(group, dist.ProcessGroup):
        raise ArgumentError(
            f"tensor_parallel {tensor_parallel!r}",
            rule="it is True, False or a process group that this process is in",
            remedy="Pass True for the default group",
        )
    return Ranks(group, batch_invariant=batch_invariant) if group.size() > 1 else None


_controls: WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = WeakKeyDictionary()


def _control(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A group of the same ranks on the CPU, which lasts as long as ``group``."""
    if group not in _controls:
        ranks = dist.get_process_group_ranks(group)
        _controls[group] = dist.new_group(ranks, WAIT_FOR_PEOPLE, backend="gloo", use_local_synchronization=True)
    return _controls[group]


def _described(error: Exception) -> tuple[str, str, str]:
    if isinstance(error, RooflamaError):
        return error.found, error.rule, error.remedy
    return f"{type(error).__name__}: {error}", "the ranks go on together", "Look at what that rank says"
