"""Sampling parameters of all decode slots, on the device: one row per slot, so that a captured step reads them.

The order is vLLM's: log probabilities of the unchanged logits, logit biases, penalties, then temperature and filters.
A sequence's draw depends on its seed and on how many tokens it has drawn, and not on its slot. Drawn tokens go to the
host (``Readbacks``), which reads them while the device computes the next step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable
from collections.abc import Sequence as Items
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rooflama.kernels import penalise, sample

from .sampling import SamplingParams
from .sequence import Sequence

Rows = slice | Tensor  # the first rows, or int64 indices


class Options(NamedTuple):
    """Which options a draw computes. One that no sequence uses costs nothing; it makes another captured step."""

    filters: tuple[str, ...] = ()  # without any, sampling is greedy
    penalised: bool = False
    biases: int = 0  # places for biases per sequence
    logprobs: int | None = None  # likeliest tokens reported

    @classmethod
    def of(cls, params: Iterable[SamplingParams]) -> Options:
        """Those that any of these sequences uses, the counts rounded up to powers of two."""
        params = list(params)
        filters: list[str] = []
        if any(p.temperature > 0 for p in params):
            filters = ["temperature", "seeds"]
            filters += [name for name, off in FILTERS.items() if any(getattr(p, name) != off for p in params)]
        biases = max((len(p.logit_bias) for p in params), default=0)
        asked = [p.logprobs for p in params if p.logprobs is not None]
        return cls(
            tuple(filters),
            any(p.penalises for p in params),
            _power_of_two(biases),
            _power_of_two(max(asked)) if asked else None,
        )


FILTERS = {"top_k": 0, "top_p": 1, "min_p": 0}
"""Filter of ``SamplingParams`` -> the value that turns it off."""

PENALTIES = ("repetition_penalty", "frequency_penalty", "presence_penalty")  # in the order of ``penalise``


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length() if count else 0


class Sampler:
    """Draws one token per row. Memory for penalties, biases and log probabilities is taken when first used.

    Penalties take 4 bytes per slot and token id.

    Args:
        num_slots: rows.
        num_rows: width of the logits.
        num_tokens: ids from here on are padding and never drawn; None if there is no padding.
        device: where the logits are.
    """

    def __init__(self, num_slots: int, *, num_rows: int, num_tokens: int | None, device: torch.device):
        self._num_slots, self._num_rows, self._num_tokens, self._device = num_slots, num_rows, num_tokens, device
        self._steps = self._zeros(torch.int64)  # tokens drawn, but for greedy draws
        self._filters = {
            "temperature": self._zeros(torch.float32),
            "seeds": self._zeros(torch.int64),
            "top_k": self._zeros(torch.int32),
            "top_p": self._zeros(torch.float32) + 1,
            "min_p": self._zeros(torch.float32),
        }
        self._penalties = [self._zeros(torch.float32) + (name == "repetition_penalty") for name in PENALTIES]
        self._seen: Tensor | None = None  # as ``penalise`` takes it
        self._biases: dict[int, tuple[Tensor, Tensor]] = {}  # places per sequence -> token ids and biases
        self._logprobs: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def _zeros(self, dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.zeros(self._num_slots, *shape, dtype=dtype, device=self._device)

    def prepare(self, options: Options) -> None:
        """Take the memory that ``options`` need. What exists stays where captured steps read it."""
        if options.penalised and self._seen is None:
            self._seen = self._zeros(torch.int32, self._num_rows)
        if (places := options.biases) and places not in self._biases:
            made = (self._zeros(torch.int64, places), self._zeros(torch.float32, places))
            if self._biases:
                widest = self._biases[max(self._biases)]  # which holds the biases of all rows
                for tensor, known in zip(made, widest, strict=True):
                    tensor[:, : known.shape[1]] = known[:, :places]
            self._biases[places] = made
        if (count := options.logprobs) is not None and count not in self._logprobs:
            count_shown = self._reported(count)
            self._logprobs[count] = (
                self._zeros(torch.float32),
                self._zeros(torch.int64, count_shown),
                self._zeros(torch.float32, count_shown),
            )

    def _reported(self, count: int) -> int:
        return min(count, self._num_rows if self._num_tokens is None else self._num_tokens)

    def set(self, row: int, params: SamplingParams, prompt: Items[int], drawn: Items[int]) -> None:
        """Give a row a sequence's parameters, its prompt, and the tokens drawn so far."""
        self._steps[row].fill_(len(drawn))
        self._filters["temperature"][row].fill_(params.temperature)
        self._filters["seeds"][row].fill_(params.seed)
        for name in FILTERS:
            self._filters[name][row].fill_(min(getattr(params, name), self._num_rows))
        for column, name in zip(self._penalties, PENALTIES, strict=True):
            column[row].fill_(getattr(params, name))
        if params.penalises and self._seen is not None:
            self._seen[row] = torch.from_numpy(_seen(prompt, drawn, self._num_rows)).to(self._device)
        for places, (ids, biases) in self._biases.items():
            ids[row].zero_()
            biases[row].zero_()
            if (count := len(params.logit_bias)) and count <= places:
                ids[row, :count] = torch.tensor([*params.logit_bias], device=self._device)
                biases[row, :count] = torch.tensor([*params.logit_bias.values()], device=self._device)

    def move(self, source: int, target: int) -> None:
        """Copy a row to another."""
        tensors = [self._steps, *self._filters.values(), *self._penalties]
        tensors += [tensor for pair in self._biases.values() for tensor in pair]
        for tensor in (*tensors, *([] if self._seen is None else [self._seen])):
            tensor[target] = tensor[source]

    def draw(self, logits: Tensor, rows: Rows, options: Options) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor] | None]:
        """One token per row of float32 logits [n, num_rows].

        Returns:
            int32 [n], -1 for a row with a NaN; and the log probabilities, None if ``options`` has none: of the token
            drawn [n], and the ids [n, k] and log probabilities [n, k] of the likeliest tokens.
        """
        adjusted = logits
        if options.logprobs is not None and (options.biases or options.penalised):
            adjusted = logits.clone()
        if options.biases:
            ids, biases = (tensor[rows] for tensor in self._biases[options.biases])
            adjusted.scatter_add_(1, ids, biases)
        if options.penalised:
            seen = self._seen_rows(rows)
            penalise(adjusted, seen, *(column[rows] for column in self._penalties))
        filters = {name: self._filters[name][rows] for name in options.filters}
        steps = self._steps[rows] if options.filters else None  # only a random draw depends on how many came before
        tokens = sample(adjusted, steps=steps, vocab_size=self._num_tokens, **filters)
        if steps is not None:
            self._steps[rows] += 1
        report = self.report(options, len(tokens))
        if report is None and not options.penalised:
            return tokens, None
        places = tokens.clamp(min=0).long().unsqueeze(1)
        if options.penalised:
            seen.scatter_(1, places, seen.gather(1, places) + 2)
            if not isinstance(rows, slice):
                self._seen_rows(slice(None))[rows] = seen
        if report is not None:
            _report(logits[:, : self._num_tokens], places, *report)
        return tokens, report

    def report(self, options: Options, count: int) -> tuple[Tensor, Tensor, Tensor] | None:
        """Where ``draw`` writes the log probabilities of ``count`` rows; None if ``options`` has none."""
        if options.logprobs is None:
            return None
        drawn, top_ids, top = self._logprobs[options.logprobs]
        return drawn[:count], top_ids[:count], top[:count]

    def _seen_rows(self, rows: Rows) -> Tensor:
        assert self._seen is not None
        return self._seen[rows]


def _report(logits: Tensor, places: Tensor, drawn: Tensor, top_ids: Tensor, top: Tensor) -> None:
    """Write the log probabilities of the tokens drawn, ``places`` [n, 1], and of the likeliest tokens."""
    total = _log_sum_exp(logits)
    values, ids = logits.topk(top.shape[1])
    drawn.copy_((logits.gather(1, places) - total).squeeze(1))
    top_ids.copy_(ids)
    top.copy_(values - total)


def _log_sum_exp(logits: Tensor) -> Tensor:
    """log(sum(exp)) of each row, [n, 1]. Adds halves of a row: the order of torch's own sums depends on n."""
    largest = logits.amax(-1, keepdim=True)
    weights = (logits - largest).exp_()
    while (width := weights.shape[1]) > 1:
        half = width // 2
        weights[:, :half] += weights[:, width - half :]
        weights = weights[:, : width - half]
    return largest + weights.log()


def _seen(prompt: Items[int], drawn: Items[int], num_rows: int) -> np.ndarray:
    """int32 [num_rows]: 1 for a token of the prompt, plus 2 for each time that the token was drawn."""
    in_prompt = np.zeros(num_rows, np.int32)
    in_prompt[np.asarray(prompt, np.int64)] = 1
    return in_prompt + 2 * np.bincount(np.asarray(drawn, np.int64), minlength=num_rows).astype(np.int32)


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
