"""Checks that run the checkpoint: memory, every layer against float64, decode against prefill."""

from __future__ import annotations

import math
import time
from typing import cast

import numpy as np
import torch

from rooflama.kernels import backend_for
from rooflama.models import MemoryPlan
from rooflama.models.memory.amounts import size

from ..model import Model
from ..planning import plan_memory
from ..results import Generation
from ..tracing import trace
from .definition import Definition
from .file_checks import CONTEXT, Finding, Status, Subject

TEXT = "The quick brown fox jumps over the lazy dog. The capital of France is Paris, and the sky is blue because"
TOKENS = 12  # of TEXT, run through every layer
NEW_TOKENS = 16


def memory(subject: Subject) -> Finding:
    """The plan for the model's own context stays within the limit and the device's free memory."""
    plan = plan_memory(
        subject.location.path, device=subject.device, limit=subject.limit, tensor_parallel=subject.share.size
    )
    details = {"plan": plan.to_dict()}
    if plan.fits:
        return Finding("PASS", f"{size(plan.total_bytes)} at {plan.context:,} tokens, {_bound(plan)}", details)
    longest = plan.largest_context()
    status: Status = "WARN" if longest >= min(CONTEXT, plan.config.context_length) else "FAIL"
    return Finding(
        status,
        f"{size(plan.total_bytes)} at {plan.context:,} tokens, {_bound(plan)}; {'; '.join(plan.remedies())}",
        details,
    )


def _bound(plan: MemoryPlan) -> str:
    bounds = [f"limit {size(plan.limit)}"] if plan.limit is not None else []
    bounds += [f"{size(plan.free_bytes)} free"] if plan.free_bytes is not None else []
    return ", ".join(bounds) or "with no device here to compare with"


def tolerance(dtype: torch.dtype, widest: int) -> float:
    """The relative error allowed per layer: 4 roundings of its results, and float32 sums of ``widest`` products."""
    return 4 * torch.finfo(dtype).eps + 4 * torch.finfo(torch.float32).eps * math.sqrt(widest)


def forward(subject: Subject) -> Finding:
    """Each layer equals its float64 definition, which is computed from the file's bytes.

    The definition's input is the model's own output of the layer before, so that the first wrong layer is named. The
    error is relative to a token's norm, for the worst token.
    """
    model, config = subject.model, subject.config
    ids = model.tokenizer.encode(TEXT)[: min(TOKENS, model.max_context)]
    traced = trace(model, ids, ["hidden", "logits"])
    states = traced["hidden"].double().numpy()
    definition = Definition(subject.file, config, len(ids))
    allowed = tolerance(model.runner.dtype, max(config.hidden_size, config.intermediate_size))
    errors = []
    before = definition.embed(ids)
    for index, state in enumerate(states):
        expected = definition.layer(index, before)
        errors.append(_relative_error(state, expected))
        if not errors[-1] <= allowed:  # NaN too
            break
        before = state
    details = {"tokens": ids, "allowed": allowed, "layer errors": errors, "device": model.device.name}
    if not errors[-1] <= allowed:
        finite = "not finite" if not np.isfinite(states[len(errors) - 1]).all() else f"off by {errors[-1]:.2e}"
        return Finding("FAIL", f"layer {len(errors) - 1} is {finite}, relative; allowed {allowed:.1e}", details)
    error = _relative_error(traced["logits"].double().numpy(), definition.logits(states[-1]))
    details["logits error"] = error
    if not error <= allowed:
        return Finding("FAIL", f"the layers agree, the logits are off by {error:.2e}; allowed {allowed:.1e}", details)
    kind = "Triton kernels" if backend_for(model.runner.device) == "triton" else "NumPy definitions"
    name = str(model.runner.dtype).removeprefix("torch.")
    said = (
        f"{len(states)} layers and the logits of {kind} in {name} within {max(*errors, error):.1e} of float64 from the "
        f"file's bytes (allowed {allowed:.1e})"
    )
    surprise = _surprise(model)
    if surprise is None:
        return Finding("PASS", f"{said}; a context of {model.max_context} tokens is too short to read English", details)
    details["nats per token on plain English"] = surprise
    said += f"; {surprise:.2f} nats per token on plain English"
    if not math.isfinite(surprise):
        return Finding("FAIL", f"{said}: logits further on in the text are not finite", details)
    if surprise > 0.75 * math.log(config.vocab_size):
        return Finding(
            "WARN", f"{said}, which is near chance: rows, RoPE or weights are probably not what they say", details
        )
    return Finding("PASS", said, details)


def _relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """The worst token's norm of the difference over its norm."""
    norms = np.linalg.norm(expected, axis=-1)
    return float(np.max(np.linalg.norm(actual - expected, axis=-1) / np.maximum(norms, np.finfo(np.float64).tiny)))


def _surprise(model: Model) -> float | None:
    """Mean negative log-likelihood of ``TEXT`` in nats per token, without its first eight tokens, or the first half of
    fewer than sixteen. None for fewer than three tokens."""
    ids = model.tokenizer.encode(TEXT)[: model.max_context]
    if len(ids) < 3:
        return None
    scores = torch.log_softmax(model.logits(ids)[:-1].double(), -1)
    picked = scores[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
    return float(-picked[min(8, len(ids) // 2) :].mean())


def _greedy(model: Model, prompt: list[int], max_new_tokens: int) -> Generation:
    return cast(Generation, model.generate(prompt, max_new_tokens=max_new_tokens))


def generation(subject: Subject) -> Finding:
    """Greedy decoding is the same twice, and agrees with the logits of one pass over the same text."""
    model = subject.model
    if model.max_context < 2:
        return Finding("WARN", "a context of 1 token is too short for a prompt and an answer")
    prompt = model.tokenizer.encode(TEXT)[: model.max_context // 2]
    started = time.perf_counter()
    first = _greedy(model, prompt, min(NEW_TOKENS, model.max_context - len(prompt)))
    seconds = time.perf_counter() - started
    again = _greedy(model, prompt, len(first.token_ids))
    details = {"prompt": prompt, "token_ids": first.token_ids, "text": first.text, "seconds": seconds}
    if again.token_ids != first.token_ids:
        return Finding("FAIL", f"two greedy runs differ: {first.token_ids} and {again.token_ids}", details)
    logits = model.logits([*prompt, *first.token_ids[:-1]])[len(prompt) - 1 :].double()
    best = logits.topk(2, dim=-1)
    margin = (best.values[:, 0] - best.values[:, 1]).numpy()
    spread = tolerance(model.runner.dtype, model.config.intermediate_size) * model.config.num_layers
    certain = margin > spread * logits.abs().amax(-1).numpy()
    differs = certain & (best.indices[:, 0].numpy() != np.array(first.token_ids))
    if differs.any():
        at = int(np.argmax(differs))
        return Finding(
            "FAIL",
            f"new token {at}: decoding drew {first.token_ids[at]}, one pass over the same text prefers "
            f"{int(best.indices[at, 0])} by {margin[at]:.3g}",
            details,
        )
    speed = first.timings.decode_tokens_per_s
    said = f"{len(first.token_ids)} tokens, the same twice and in one pass, {speed:.1f} tokens/s: {first.text!r}"
    if len(first.token_ids) > 4 and len(set(first.token_ids)) == 1:
        return Finding("WARN", f"one token repeats: {said}", details)
    return Finding("PASS", said, details)
