"""Named intermediates of one forward pass, and the attention scores and weights that follow from them.

A name is NAME, NAME.LAYER or NAME.LAYER.HEAD, where layers and heads count from 0:

    logits                       [num_tokens, vocab_size] in float32
    hidden                       [num_layers, num_tokens, hidden_size], the residual stream after each layer
    q                            [num_layers, num_tokens, num_heads, head_dim], after norm and rotation
    k, v                         [num_layers, num_tokens, num_kv_heads, head_dim], as the key/value pages hold them
    hidden.3, q.3, k.3, v.3      layer 3 alone, without the leading axis
    scores.3                     [num_heads, num_tokens, num_tokens] in float32: cap(softmax_scale * q.k), query by key;
                                 -inf where the query does not see the key
    attention.3                  the softmax of scores.3 over the keys
    scores.3.1, attention.3.1    head 1 alone, [num_tokens, num_tokens]

Scores and attention weights need a layer, since all layers together rarely fit into memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rooflama.kernels.facts import Facts
from rooflama.models import ArgumentError, ModelConfig
from rooflama.models.decoder import LOGITS_ROWS

from . import arguments
from .model import Model

OBSERVED = ("hidden", "q", "k", "v")
COMPUTED = ("scores", "attention")


class Trace(Facts, Mapping[str, Tensor]):
    """What ``trace`` was asked for, by name, as tensors on the CPU. ``token_ids`` are the prompt's."""

    def __init__(self, token_ids: list[int], tensors: dict[str, Tensor]):
        self.token_ids, self._tensors = token_ids, tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def rows(self) -> list[tuple[str, str]]:
        """The facts, as (label, value)."""
        return [("trace", f"{len(self.token_ids)} tokens"), *((name, _words(t)) for name, t in self.items())]

    def __repr__(self) -> str:
        tensors = (f"{name}: {list(tensor.shape)}" for name, tensor in self._tensors.items())
        return f"Trace({len(self.token_ids)} tokens, {', '.join(tensors)})"


def _words(tensor: Tensor) -> str:
    shape = f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
    finite = tensor[tensor.isfinite()].float()
    if not len(finite):
        return f"{shape}, nothing finite"
    return (
        f"{shape}, from {finite.min():.3g} to {finite.max():.3g}, root mean square {finite.square().mean().sqrt():.3g}"
    )


def trace(model: Model, prompt: arguments.Prompt, what: Iterable[str] = ("hidden", "logits")) -> Trace:
    """Run one forward pass over a prompt and return its intermediates.

    Args:
        model: from ``rooflama.load``.
        prompt: text or token ids, as for ``Model.generate``.
        what: names as in this module's docstring, for example ``["hidden", "attention.3.1", "logits"]``.

    Returns:
        A mapping from each name in ``what`` to a tensor. ``hidden`` and ``q`` have the dtype of the activations; ``k``
        and ``v`` that of the pages, or float32 where the pages are quantised. ``scores`` and ``attention`` are computed
        from ``q`` and ``k`` by their definition in float64, also where ``rooflama.swap`` replaces the attention kernel.

    Raises:
        ArgumentError: an unknown name, a layer or head that the model lacks, or a prompt that ``Model.logits`` refuses.
    """
    names = {name: _parse(name, model.config) for name in ([what] if isinstance(what, str) else what)}
    wanted = {(kind, layer) for name in names.values() for kind in name.observed for layer in name.layers}
    token_ids = (
        model.tokenizer.encode(prompt, parse_special=True) if isinstance(prompt, str) else arguments.token_ids(prompt)
    )
    parts: dict[tuple[str, int], list[Tensor]] = {key: [] for key in wanted}
    logits: list[Tensor] = []

    def observe(kind: str, layer: int, tensor: Tensor) -> None:
        if (kind, layer) in wanted:
            parts[kind, layer].append(tensor.detach().to("cpu", copy=True))

    with model.prefill(token_ids, observe) as passes:
        for hidden in passes:
            if "logits" in names:
                logits += [model.runner.decoder.logits(rows).cpu() for rows in hidden.split(LOGITS_ROWS)]
    seen = {key: torch.cat(tensors) for key, tensors in parts.items()}

    def tensor_of(name: _Name) -> Tensor:
        if name.kind == "logits":
            return torch.cat(logits)
        if name.kind in COMPUTED:
            q, k = (seen[kind, name.layers[0]] for kind in ("q", "k"))
            return _scores(q, k, name, model.config)
        tensors = [seen[name.kind, layer] for layer in name.layers]
        return tensors[0] if name.one_layer else torch.stack(tensors)

    return Trace(token_ids, {text: tensor_of(name) for text, name in names.items()})


@dataclass(frozen=True)
class _Name:
    """One entry of ``what``: which tensor, of which layers, and of which head (None for all)."""

    kind: str
    layers: Sequence[int]
    one_layer: bool
    head: int | None

    @property
    def observed(self) -> tuple[str, ...]:
        """What the model must hand over."""
        return {"logits": (), "scores": ("q", "k"), "attention": ("q", "k")}.get(self.kind, (self.kind,))


def _parse(text: str, config: ModelConfig) -> _Name:
    kind, *indices = text.split(".") if isinstance(text, str) else [repr(text)]
    deepest = {"logits": 0, "scores": 2, "attention": 2} | dict.fromkeys(OBSERVED, 1)
    shallowest = 1 if kind in COMPUTED else 0
    limits = (config.num_layers, config.num_heads)
    if (
        not shallowest <= len(indices) <= deepest.get(kind, -1)
        or not all(index.isdecimal() for index in indices)
        or not all(int(index) < limit for index, limit in zip(indices, limits, strict=False))
    ):
        raise ArgumentError(
            f"{text!r} in a trace of {config.name}",
            rule="names are logits; hidden, q, k and v, of all layers or of one (hidden.LAYER); scores and attention, "
            "of one layer (scores.LAYER) or one head (scores.LAYER.HEAD)",
            remedy=f"Ask for one of them, with layers 0 to {limits[0] - 1} and heads 0 to {limits[1] - 1}",
        )
    numbers = [int(index) for index in indices]
    return _Name(
        kind=kind,
        layers=numbers[:1] if numbers else range(config.num_layers),
        one_layer=bool(numbers),
        head=numbers[1] if len(numbers) == 2 else None,
    )


def _scores(q: Tensor, k: Tensor, name: _Name, config: ModelConfig) -> Tensor:
    """Scores or attention weights of one layer, [num_heads, num_tokens, num_tokens], or of one head."""
    heads = torch.arange(config.num_heads) if name.head is None else torch.tensor([name.head])
    queries, keys = q.double()[:, heads], k.double()[:, heads // config.group_size]
    scores = config.softmax_scale * torch.einsum("qhd,khd->hqk", queries, keys)
    if cap := config.attention_softcap:
        scores = cap * torch.tanh(scores / cap)
    position = torch.arange(len(q))
    distance = position[:, None] - position
    unseen = distance < 0
    if window := config.sliding_windows[name.layers[0]]:
        unseen |= distance >= window
    scores.masked_fill_(unseen, -torch.inf)
    values = (scores if name.kind == "scores" else scores.softmax(-1)).float()
    return values if name.head is None else values[0]
