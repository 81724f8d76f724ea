"""Named intermediates of a forward pass: against the definition in float64, and against transformers."""

import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import rooflama
from rooflama import ArgumentError, trace
from rooflama.checks import definition
from rooflama.checks.definition import Definition
from rooflama.loaders.opening import open_checkpoint
from rooflama.models import ADAPTERS
from rooflama.models.weights import unpair_rows
from running_models import assert_parity
from small_checkpoint import write_small
from tiny_checkpoints import random_tokens
from whole_checkpoints import module, write_file

pytestmark = pytest.mark.usefixtures("numpy_backend")

NAMES = ["llama3.1", "llama-biases", "mistral-window", "qwen2-window", "qwen3", "phi3-4k", "phi4-mini"]
TOKENS = random_tokens(24)
WHAT = ["hidden", "q", "k", "v", "logits"]
SOFTCAP = 1.5
IDS = [5, 6, 7, 8, 9, 10, 11]


def loaded(path, **options):
    return rooflama.load(path, device="cpu", max_context=64, progress=False, **options)


@pytest.fixture
def small(tmp_path):
    with loaded(write_small(tmp_path / "small.gguf")) as model:
        yield model


def every_layer(model, kind):
    return [f"{kind}.{layer}" for layer in range(model.config.num_layers)]


@pytest.fixture
def softcapped(monkeypatch):
    """Architecture qwen3 with a cap on its scores, another scale, and a last layer without rotation."""
    adapter = ADAPTERS["qwen3"]

    def read_config(reader):
        config = adapter.read_config(reader)
        unrotated = frozenset({config.num_layers - 1})
        return replace(config, attention_softcap=SOFTCAP, softmax_scale=0.7, unrotated_layers=unrotated)

    functions = {name: getattr(adapter, name) for name in ("load_layer", "block")}
    monkeypatch.setitem(ADAPTERS, "qwen3", SimpleNamespace(read_config=read_config, **functions))


def defined(path, config, monkeypatch):
    """What the definition computes from the bytes of the file, under the names of a trace; "out" is attention's."""
    seen = {name: [] for name in ("q", "k", "v", "out", "hidden")}
    attention_prefill = definition.reference.attention_prefill

    def record(q, k_pages, v_pages, *arguments, **options):
        out, lse = attention_prefill(q, k_pages, v_pages, *arguments, **options)
        for name, array in {"q": q, "k": k_pages[0], "v": v_pages[0], "out": out}.items():
            seen[name].append(array)
        return out, lse

    with open_checkpoint(path) as checkpoint, monkeypatch.context() as patch:
        patch.setattr(definition.reference, "attention_prefill", record)
        defined = Definition(checkpoint, config, len(TOKENS))
        hidden = defined.embed(TOKENS)
        for layer in range(config.num_layers):
            seen["hidden"].append(hidden := defined.layer(layer, hidden))
        stacked = {name: torch.from_numpy(np.stack(arrays)) for name, arrays in seen.items()}
        if checkpoint.interleaved_rope_rows:
            order = unpair_rows(1, config.head_dim, config.head_dim)
            stacked |= {name: stacked[name][..., order] for name in ("q", "k")}
        return stacked | {"logits": torch.from_numpy(defined.logits(hidden))}


def check_against_the_definition(path, monkeypatch):
    with loaded(path) as model:
        config, traced = model.config, trace(model, TOKENS, [*WHAT, *every_layer(model, "attention")])
        want = defined(path, config, monkeypatch)
        for name in WHAT:
            assert_parity(traced[name], want[name], name)
        for layer in range(config.num_layers):
            values = want["v"][layer].repeat_interleave(config.group_size, dim=1)
            out = torch.einsum("hqk,khd->qhd", traced[f"attention.{layer}"].double(), values)
            assert_parity(out, want["out"][layer], f"attention.{layer} times the values")


@pytest.mark.parametrize("name", NAMES)
def test_a_trace_equals_the_definition(name, tmp_path, monkeypatch):
    check_against_the_definition(write_file(name, tmp_path / "m.gguf"), monkeypatch)


@pytest.mark.usefixtures("softcapped")
def test_capped_scores_and_layers_without_rotation_equal_the_definition(tmp_path, monkeypatch):
    check_against_the_definition(write_file("qwen3", tmp_path / "m.gguf"), monkeypatch)


@pytest.mark.parametrize("name", NAMES)
def test_a_trace_equals_transformers(name, tmp_path):
    made, streams = module(name), []
    hooks = [layer.register_forward_hook(lambda *call: streams.append(call[2])) for layer in made.model.layers]
    with torch.no_grad():
        expected = made(torch.tensor([TOKENS]), output_attentions=True, use_cache=True)
    for hook in hooks:
        hook.remove()
    with loaded(write_file(name, tmp_path / "m.gguf")) as model:
        traced = trace(model, TOKENS, [*WHAT, *every_layer(model, "attention")])
    assert_parity(traced["logits"], expected.logits[0], "logits")
    for layer, stream in enumerate(streams):
        assert_parity(traced["hidden"][layer], stream[0] if stream.ndim == 3 else stream, f"hidden.{layer}")
        assert_parity(traced[f"attention.{layer}"], expected.attentions[layer][0], f"attention.{layer}")
        stored = expected.past_key_values.layers[layer]  # with a window, the latest tokens alone
        for kind, heads in {"k": stored.keys, "v": stored.values}.items():
            latest = heads[0].transpose(0, 1)
            assert_parity(traced[kind][layer][-len(latest) :], latest, f"{kind}.{layer}")


def test_attention_is_the_softmax_of_scores_that_are_capped_where_they_are_seen(softcapped, tmp_path):
    with loaded(write_file("qwen3", tmp_path / "m.gguf")) as model:
        traced = trace(model, TOKENS, ["scores.0", "attention.0"])
    scores, future = traced["scores.0"], torch.ones(len(TOKENS), len(TOKENS), dtype=torch.bool).triu(1)
    assert bool((scores[:, future] == -torch.inf).all())
    assert 0.9 * SOFTCAP < scores[:, ~future].abs().max() <= SOFTCAP
    torch.testing.assert_close(scores.softmax(-1), traced["attention.0"])


def test_layers_and_heads_are_slices_of_the_whole(small):
    kinds = ("hidden", "q", "k", "v")
    traced = trace(small, IDS, [*kinds, *(f"{kind}.1" for kind in kinds), "scores.1", "scores.1.2", "attention.1.2"])
    for kind in kinds:
        assert torch.equal(traced[f"{kind}.1"], traced[kind][1])
    assert torch.equal(traced["scores.1.2"], traced["scores.1"][2])
    torch.testing.assert_close(traced["attention.1.2"], traced["scores.1.2"].softmax(-1))


def test_a_trace_is_a_mapping_of_what_was_asked(small):
    traced = trace(small, "ab c", ["logits", "hidden.0"])
    ids = small.tokenizer.encode("ab c", parse_special=True)
    assert traced.token_ids == ids
    assert list(traced) == ["logits", "hidden.0"]
    assert repr(traced) == f"Trace({len(ids)} tokens, logits: [{len(ids)}, 260], hidden.0: [{len(ids)}, 64])"
    assert torch.equal(traced["logits"], small.logits(ids))
    assert list(trace(small, np.array(ids), "q.1")) == ["q.1"]


def test_a_prompt_read_in_several_passes_gives_the_same_trace(small):
    what = [*WHAT, "attention.1"]
    whole = trace(small, IDS, what)
    small.runner.prefill_chunk = 3
    for name, tensor in trace(small, IDS, what).items():
        assert_parity(tensor.flatten(0, -2), whole[name].flatten(0, -2), name)


@pytest.mark.parametrize(("kv_dtype", "step"), [("int8", 1 / 127), ("fp8", 2**-3)])
def test_keys_and_values_are_what_attention_reads_from_quantised_pages(kv_dtype, step, small, tmp_path):
    exact = trace(small, IDS, ["k.0", "v.0"])
    with loaded(tmp_path / "small.gguf", kv_dtype=kv_dtype) as model:
        stored = trace(model, IDS, ["q.0", "k.0", "v.0", "attention.0"])
        for name in ("k.0", "v.0"):
            error = (stored[name] - exact[name]).abs() / exact[name].abs().amax(-1, keepdim=True)
            assert 0 < error.max() <= step / 2
        keys = stored["k.0"].repeat_interleave(model.config.group_size, dim=1)
    future = torch.ones(len(IDS), len(IDS), dtype=torch.bool).triu(1)
    scores = torch.einsum("qhd,khd->hqk", stored["q.0"], keys) * model.config.softmax_scale
    torch.testing.assert_close(scores.masked_fill(future, -torch.inf).softmax(-1), stored["attention.0"])


UNKNOWN = ["keys", "", "hidden.", "hidden.2", "hidden.-1", "hidden.0.0", "scores", "attention.0.4", "attention.2", 3]


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_name_is_refused_with_those_that_there_are(name, small):
    there_are = "names are logits; hidden, q, k and v.*layers 0 to 1 and heads 0 to 3"
    with pytest.raises(ArgumentError, match=re.escape(repr(name)) + f".*{there_are}"):
        trace(small, IDS, ["hidden", name])


def test_pages_are_free_afterwards_and_bad_prompts_are_refused(small):
    pool = small.runner.cache.pool
    trace(small, IDS, ["hidden.0"])
    with pytest.raises(ArgumentError, match="an empty prompt"):
        trace(small, [], ["hidden.0"])
    with pytest.raises(ArgumentError, match="a prompt is text, or a sequence of token ids"):
        trace(small, None, ["hidden.0"])
    assert pool.num_free == len(pool.references)
