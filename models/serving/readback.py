"""Tokens on their way to the host, which reads them while the device computes the next step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable
from collections.abc import Sequence as Items

import torch
from torch import Tensor

from .sequence import Sequence


class Readbacks:
    """Starts copies of tokens to the host. On a GPU they land in page-locked memory that earlier ones have left."""

    def __init__(self) -> None:
        self._left: defaultdict[Hashable, list[_Landing]] = defaultdict(list)  # by the shapes that it holds

    def start(self, sequences: Items[Sequence], tokens: Tensor, logprobs: tuple[Tensor, ...] | None) -> Readback:
        """Copy the tokens of some sequences, and their log probabilities if there are any.

        Args:
            sequences: whose tokens they are, in the order of the rows; further rows belong to no sequence.
            tokens: int32 [rows].
            logprobs: as ``Sampler.draw`` returns them.
        """
        tensors = (tokens, *(logprobs or ()))
        if tokens.device.type == "cpu":
            return Readback(sequences, _Landing([tensor.clone() for tensor in tensors], None), [])
        left = self._left[tuple((tensor.shape, tensor.dtype) for tensor in tensors)]
        landing = left.pop() if left else _Landing.like(tensors)
        landing.take(tensors)
        return Readback(sequences, landing, left)


class Readback:
    """A copy that has been started.

    Attributes:
        sequences: whose tokens they are.
        lives: ``Sequence.life`` of each when the copy was started.
    """

    def __init__(self, sequences: Items[Sequence], landing: _Landing, left: list[_Landing]):
        self.sequences, self.lives = list(sequences), [sequence.life for sequence in sequences]
        self._landing, self._left = landing, left

    @property
    def present(self) -> list[Sequence]:
        """The sequences that have not given up their pages since."""
        return [sequence for sequence, life in zip(self.sequences, self.lives, strict=True) if sequence.life == life]

    def wait(self) -> tuple[list[int], list[list]]:
        """(token ids, columns of log probabilities), once the device has written them. Call it once."""
        tokens, *logprobs = self._landing.read()
        self._left.append(self._landing)
        return tokens, logprobs


class _Landing:
    """Memory on the host, and the event that says that the device has written it; None if the host did."""

    def __init__(self, tensors: list[Tensor], written: torch.cuda.Event | None):
        self._tensors, self._written = tensors, written

    @classmethod
    def like(cls, tensors: Items[Tensor]) -> _Landing:
        """Page-locked memory for copies of tensors on a GPU."""
        memory = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors]
        return cls(memory, torch.cuda.Event())

    def take(self, tensors: Items[Tensor]) -> None:
        """Start to copy, on the current stream."""
        for memory, tensor in zip(self._tensors, tensors, strict=True):
            memory.copy_(tensor, non_blocking=True)
        assert self._written is not None
        self._written.record(torch.cuda.current_stream(tensors[0].get_device()))

    def read(self) -> list[list]:
        if self._written is not None:
            self._written.synchronize()
        return [memory.tolist() for memory in self._tensors]
