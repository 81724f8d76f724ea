"""Keys and values of a prompt in a file, so that minutes of prefill need not be computed again.

The file is in the safetensors format. ``k.0`` is [num_tokens, num_kv_heads, head_dim] of layer 0, as the pages hold it,
and so on for ``v``, and for the scales of quantised pages. Its metadata say what the keys and values depend on.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rooflama.kernels import RooflamaError
from rooflama.models import ModelRunner, Request, SamplingParams, Sequence, TokenEngine
from rooflama.models.kv_cache import Beginning

FORMAT = "rooflama state 1"
PROBE_TOKENS = 16  # computed anew when a state is loaded: their keys and values depend on every weight
PROBE_ERROR = 0.02  # relative; other weights give about 1, and other kernels or devices rounding


class StateError(RooflamaError, ValueError):
    """A file holds no state, or one that does not fit the loaded model."""


def save(engine: TokenEngine, prompt: list[int], max_new_tokens: int | None, path: str | os.PathLike[str]) -> None:
    """Compute a prompt, as far as it is not known, and write its keys and values. The arguments are ``Model``'s."""
    tensors: dict[str, Tensor] = {}

    def copy_out(token: int) -> bool:
        """At the first token drawn, when the whole prompt is in the sequence's pages."""
        for name, pool, pages, count in _places(engine.runner, sequence):
            tensors[name] = pool[pages].flatten(0, 1)[:count].cpu()
        return True

    sequence = Sequence(Request(prompt, max_new_tokens, SamplingParams()), copy_out, swaps={})
    engine.add(sequence)
    engine.advance(sequence, until=lambda: False)
    about = _about(engine.runner, sequence)
    tensors |= _probe(engine, sequence)
    metadata = {"format": FORMAT, "prompt": prompt, "max_new_tokens": max_new_tokens, **about}
    save_file(tensors, path, {name: json.dumps(value) for name, value in metadata.items()})


def load(engine: TokenEngine, path: str | os.PathLike[str]) -> list[int]:
    """Make the keys and values of a file known to the prefix cache. Returns the prompt.

    Raises:
        StateError: the file does not fit. Nothing was changed.
        OutOfPages: the pool has too few pages.
    """
    if engine.scheduler.prefixes is None:
        raise StateError(
            f"{Path(path).name} for a model without a prefix cache",
            rule="a loaded state is a beginning that later prompts share",
            remedy="Load the model with prefix_cache=True",
        )
    with _opened(path) as file, engine.turns.turn():
        said = {name: json.loads(value) for name, value in file.metadata().items()}
        sequence = Sequence(Request(said["prompt"], said["max_new_tokens"], SamplingParams()), swaps={})
        engine.runner.check(sequence.request)
        _compare(Path(path).name, said, _about(engine.runner, sequence))
        _compare_probe(engine, sequence, file, path)
        cache, size = engine.runner.cache, engine.runner.cache.page_size
        count = len(said["prompt"])
        first = 0 if cache.window is None else max(0, count - cache.window + 1) // size
        engine.scheduler.make_room(cache.pages_for(count))
        sequence.cache_id = cache.begin(Beginning(first, (), first * size), count)
        try:
            with cache.device.guard(f"loading {Path(path).name}"):
                for name, pool, pages, present in _places(engine.runner, sequence):
                    stored = file.get_tensor(name)[-present:].to(pool.device)
                    for page, part in zip(pages, stored.split(size), strict=True):
                        pool[page, : len(part)] = part
            sequence.num_cached = count
            engine.scheduler.prefixes.insert(sequence)
        finally:
            cache.free(sequence.cache_id)
    return said["prompt"]


def _places(runner: ModelRunner, sequence: Sequence) -> list[tuple[str, Tensor, list[int], int]]:
    """(name, pool, pages, tokens in them) of the keys, values and scales of a prompt in each layer."""
    cache = runner.cache
    assert sequence.cache_id is not None
    first, count = cache.released(sequence.cache_id), len(sequence.request.prompt)
    pages = list(cache.pages(sequence.cache_id))[: -(-count // cache.page_size) - first]
    pools: dict[str, list[Any]] = {
        "k": cache.k_pages,
        "v": cache.v_pages,
        "k_scale": cache.k_scale,
        "v_scale": cache.v_scale,
    }
    return [
        (f"{name}.{layer}", pool, pages, count - first * cache.page_size)
        for name, layers in pools.items()
        for layer, pool in enumerate(layers)
        if pool is not None
    ]


def _about(runner: ModelRunner, sequence: Sequence) -> dict[str, Any]:
    """What keys and values depend on besides tokens and weights."""
    planned = sequence.request.planned_tokens(runner.max_context)
    return {
        "model": repr(runner.decoder.config),
        "kv_dtype": str(runner.cache.k_pages[0].dtype),
        "rotation": runner.rotation.key(planned),
    }


def _probe(engine: TokenEngine, sequence: Sequence) -> dict[str, Tensor]:
    """Keys of the prompt's first tokens in the last layer, computed by a pass of their own: float32."""
    runner, tokens = engine.runner, sequence.request.prompt[:PROBE_TOKENS]
    found: list[Tensor] = []

    def observe(name: str, layer: int, tensor: Tensor) -> None:
        if name == "k" and layer == runner.decoder.config.num_layers - 1:
            found.append(tensor.float().cpu().clone())

    with engine.pages_for(len(tokens)) as cache_id, torch.inference_mode(False):
        planned = sequence.request.planned_tokens(runner.max_context)
        for _ in runner.prefill([cache_id], [tokens], [planned], observe):
            pass
    return {"probe": torch.cat(found)}


def _compare(name: str, said: dict[str, Any], found: dict[str, Any]) -> None:
    for what, value in found.items():
        if said.get(what) != value:
            raise StateError(
                f"the state in {name} is of another {what.replace('_', ' ')}: "
                f"{_short(said.get(what))}, not {_short(value)}",
                rule="keys and values serve the model, the rotation and the dtype that they were computed with",
                remedy="Load the model as it was when the state was saved, or compute the prompt again",
            )


def _compare_probe(engine: TokenEngine, sequence: Sequence, file: Any, path: str | os.PathLike[str]) -> None:
    stored, found = file.get_tensor("probe"), _probe(engine, sequence)["probe"]
    error = float((stored - found).norm() / found.norm())
    if not error <= PROBE_ERROR:
        raise StateError(
            f"the state in {Path(path).name} has keys that differ from this model's by {error:.2g} of their size",
            rule=f"with equal weights they differ by at most {PROBE_ERROR}",
            remedy="Load the checkpoint that the state was saved with, or compute the prompt again",
        )


def _opened(path: str | os.PathLike[str]) -> Any:
    """The open file. Raises StateError if it is no state."""
    remedy = "Name a file that save_state has written"
    try:
        file = safe_open(path, framework="pt")
        metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise StateError(f"{path}: {error}", rule="a state is a safetensors file", remedy=remedy) from error
    if metadata.get("format") != json.dumps(FORMAT):
        raise StateError(f"{path} without the format {FORMAT!r}", rule="its metadata name the format", remedy=remedy)
    return file


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
