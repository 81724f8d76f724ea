"""What an adapter may declare, hook by hook: right against transformers with it, and wrong without it."""

import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GlmConfig,
    GraniteConfig,
    LlamaConfig,
    Qwen3Config,
    SmolLM3Config,
)

from rooflama import inspect, plan_memory
from rooflama.checks.definition import Definition
from rooflama.kernels import use_backend
from rooflama.loaders.huggingface import config as hf_config
from rooflama.loaders.huggingface.config import QKV_BIAS, RESULT_KEYS, TENSOR_NAMES, HFFamily
from rooflama.loaders.huggingface.folder import read_safetensors
from rooflama.models import ADAPTERS, ConfigError, Request, SamplingParams, Sequence, TokenEngine, pre_norm
from rooflama.models.config_reader import read_decoder_config
from rooflama.models.hyperparameters import Hyperparameters
from rooflama.models.rope.spec import Dynamic, RopeSpec
from rooflama.testing.strategies import DEVICE
from running_models import assert_parity, decode_logits, prefill_logits, running, worst_row_error
from tiny_checkpoints import SIZES, WINDOW, make_module, random_tokens, reference_logits

TOKENS = random_tokens(30)
GEMMA_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
READ = tuple(RESULT_KEYS)  # every key that changes a result, so that none is refused before its hook is tried


def granite(**changes):
    plain = {"attention_multiplier": 8**-0.5}
    return GraniteConfig(**SIZES, **plain | changes)


def gemma2(**changes):
    plain = {"attn_logit_softcapping": None, "final_logit_softcapping": None, "query_pre_attn_scalar": 16}
    return Gemma2Config(**SIZES | {"num_hidden_layers": 3}, head_dim=16, sliding_window=WINDOW, **plain | changes)


def gemma3(**changes):
    ropes = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    }
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    plain = {"rope_parameters": ropes, "layer_types": kinds, "query_pre_attn_scalar": 16, "sliding_window": WINDOW}
    return Gemma3TextConfig(**SIZES | {"num_hidden_layers": 3}, head_dim=16, **plain | changes)


GRANITE = HFFamily("granite", result_keys=READ)
GEMMA = HFFamily(
    "gemma",
    biases=QKV_BIAS,
    window_keys=("sliding_window", "layer_types"),
    result_keys=READ,
    tensor_names=TENSOR_NAMES | GEMMA_NORMS,
    norm_offset=1.0,
)
GEMMA_SAYS = {"post_norms": True, "activation": "gelu_tanh", "embedding_scale": 48**0.5}
GLM = HFFamily("glm", biases=QKV_BIAS, partial_rotary=True)
SMOLLM3 = HFFamily(
    "smollm3", result_keys=("no_rope_layers",), unused_keys=("no_rope_layer_interval", "use_sliding_window")
)

# hook: (transformers' config, entry for folders, what the page declares, what is left of the config without the hook)
HOOKS = {
    "embedding_scale": (granite(embedding_multiplier=3.0), GRANITE, {"embedding_scale": 3.0}, {"embedding_scale": 1.0}),
    "residual_scale": (granite(residual_multiplier=0.3), GRANITE, {"residual_scale": 0.3}, {"residual_scale": 1.0}),
    "logit_scale": (granite(logits_scaling=5.0), GRANITE, {"logit_scale": 0.2}, {"logit_scale": 1.0}),
    "softmax_scale": (granite(attention_multiplier=0.1), GRANITE, {"softmax_scale": 0.1}, {"softmax_scale": 8**-0.5}),
    "attention_softcap": (
        gemma2(attn_logit_softcapping=2.0), GEMMA, GEMMA_SAYS | {"attention_softcap": 2.0}, {"attention_softcap": 0.0},
    ),
    "logit_softcap": (
        gemma2(final_logit_softcapping=2.0), GEMMA, GEMMA_SAYS | {"logit_softcap": 2.0}, {"logit_softcap": 0.0},
    ),
    "slides": (
        gemma2(layer_types=["sliding_attention", "full_attention", "sliding_attention"]), GEMMA, GEMMA_SAYS,
        {"sliding_windows": (WINDOW,) * 3},
    ),
    "activation": (
        LlamaConfig(**SIZES, hidden_act="gelu_pytorch_tanh"), HFFamily("llama2", result_keys=("hidden_act",)), {},
        {"activation": "silu"},
    ),
    "rope_interleaved": (
        GlmConfig(**SIZES, head_dim=16, attention_bias=False,
                  rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        GLM, {"rope_interleaved": True}, {"rope_interleaved": False},
    ),
    "rotates": (
        SmolLM3Config(**SIZES, no_rope_layers=[1, 0]), SMOLLM3, {},
        {"unrotated_layers": frozenset()},
    ),
    "local_rope": (gemma3(), GEMMA, GEMMA_SAYS | {"qk_norm": True}, {"local_rope": None}),
}  # fmt: skip


@pytest.fixture(scope="module", params=HOOKS)
def case(request, tmp_path_factory):
    """(hook, module, its folder)."""
    made = make_module(HOOKS[request.param][0])
    folder = tmp_path_factory.mktemp(request.param)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.save_pretrained(folder)
    return request.param, made, folder


@pytest.fixture
def register(monkeypatch):
    def register(hook, **changes):
        """Make the hook's family known, with ``changes`` to the config that its page reads."""
        hf, family, declared, _ = HOOKS[hook]

        def read_config(reader):
            keys = Hyperparameters(reader.checkpoint.metadata, family.architecture)
            for key in {*RESULT_KEYS.values()} - {"feed_forward.activation", "rope.layers", "rope.freq_base_swa"}:
                keys.real(key, None)
            return replace(read_decoder_config(reader, keys, **declared), **changes)

        page = SimpleNamespace(read_config=read_config, load_layer=pre_norm.load_layer, block=pre_norm.block)
        monkeypatch.setitem(ADAPTERS, family.architecture, page)
        monkeypatch.setitem(hf_config.FAMILIES, hf.model_type, family)

    return register


def logits_of(folder):
    """Prefilled in passes of 7, and the last half decoded."""
    with read_safetensors(folder) as checkpoint, running(checkpoint) as runner:
        (prefilled,) = prefill_logits(runner, [TOKENS], 7)
        (decoded,) = decode_logits(runner, [TOKENS], [len(TOKENS) // 2])
    return prefilled, decoded


def definition_logits(folder):
    with read_safetensors(folder) as checkpoint, running(checkpoint) as runner:
        definition = Definition(checkpoint, runner.decoder.config, len(TOKENS))
        hidden = definition.embed(TOKENS)
        for index in range(runner.decoder.config.num_layers):
            hidden = definition.layer(index, hidden)
        return torch.from_numpy(definition.logits(hidden))


@pytest.mark.usefixtures("numpy_backend")
def test_a_hook_alone_equals_transformers(case, register):
    hook, made, folder = case
    register(hook)
    expected = reference_logits(made, TOKENS)
    prefilled, decoded = logits_of(folder)
    assert_parity(prefilled, expected, f"{hook}, prefilled")
    assert_parity(decoded, expected[len(TOKENS) // 2 :], f"{hook}, decoded")
    assert_parity(definition_logits(folder), expected, f"{hook}, by the definition of rooflama check")


@pytest.mark.usefixtures("numpy_backend")
def test_without_the_hook_the_logits_are_others(case, register):
    """So that the test above can fail."""
    hook, made, folder = case
    register(hook, **HOOKS[hook][3])
    prefilled, _ = logits_of(folder)
    assert worst_row_error(prefilled, reference_logits(made, TOKENS)) > 1e-2


@pytest.mark.parametrize("case", ["local_rope", "rotates"], indirect=True)
def test_on_triton_kernels_with_batch_invariant_bits(case, register):
    hook, made, folder = case
    register(hook)
    expected = reference_logits(made, TOKENS[:8])
    with (
        use_backend("triton"),
        read_safetensors(folder) as checkpoint,
        running(checkpoint, num_seqs=2, device=DEVICE.type, batch_invariant=True) as runner,
    ):
        (whole,) = prefill_logits(runner, [TOKENS[:8]], 64)
        assert_parity(whole, expected, hook)
        _, again = prefill_logits(runner, [TOKENS[12:15], TOKENS[:8]], 5)
        assert torch.equal(again, whole)


@pytest.mark.usefixtures("numpy_backend")
def test_heads_are_normed_where_they_are_not_rotated(tmp_path, register, monkeypatch):
    """The oracle is Qwen 3 whose rotation is by the angle 0."""
    monkeypatch.setitem(HOOKS, "unrotated", (Qwen3Config(**SIZES, head_dim=16), hf_config.FAMILIES["qwen3"], {}, {}))
    register("unrotated", qk_norm=True, unrotated_layers=frozenset({0, 1}))
    made = make_module(HOOKS["unrotated"][0])
    made.save_pretrained(tmp_path)
    turn = made.model.rotary_emb.forward

    def still(x, position_ids):
        cos, sin = turn(x, position_ids)
        return torch.ones_like(cos), torch.zeros_like(sin)

    made.model.rotary_emb.forward = still
    prefilled, decoded = logits_of(tmp_path)
    expected = reference_logits(made, TOKENS)
    assert_parity(prefilled, expected, "prefilled")
    assert_parity(decoded, expected[len(TOKENS) // 2 :], "decoded")


# What no model can be


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "relu"}, "activation 'relu': the feed-forward's gate is one of silu, gelu_tanh"),
        ({"embedding_scale": float("nan")}, "embedding_scale nan: a scale is finite and not 0"),
        ({"logit_scale": 0.0}, "logit_scale 0.0: a scale is finite and not 0"),
        ({"attention_softcap": -1.0}, "attention_softcap -1.0: a cap is finite and above 0, or 0 for none"),
        ({"logit_softcap": float("inf")}, "logit_softcap inf: a cap is finite"),
        ({"unrotated_layers": frozenset({1, 7})}, r"unrotated_layers \[7\]: layers are numbered 0 to 1"),
        (
            {"local_rope": RopeSpec(head_dim=8, rotary_dim=8, scaling=Dynamic(factor=2.0, original_context=64))},
            "local_rope of kind 'dynamic': the rotation of layers with a sliding window must not",
        ),
    ],
)
@pytest.mark.parametrize("case", ["logit_scale"], indirect=True)
@pytest.mark.usefixtures("numpy_backend")
def test_what_cannot_be_computed_is_refused(case, changes, message, register):
    hook, _, folder = case
    register(hook, **changes)
    with pytest.raises(ConfigError, match=message), read_safetensors(folder) as checkpoint, running(checkpoint):
        pass


@pytest.mark.parametrize("case", ["local_rope"], indirect=True)
def test_the_plan_counts_the_second_table(case, register):
    hook, _, folder = case
    register(hook)
    two = plan_memory(folder, device="cpu")
    register(hook, local_rope=None)
    one = plan_memory(folder, device="cpu")
    table = 2 * 4 * 256 * 16 // 2
    assert {line.name: line.nbytes for line in two.lines}["rotary tables"] == 2 * table
    assert {line.name: line.nbytes for line in one.lines}["rotary tables"] == table


def test_inspect_shows_what_is_more_than_llama(tmp_path, register, monkeypatch):
    config = gemma3(attn_logit_softcapping=None, final_logit_softcapping=None)
    says = GEMMA_SAYS | {"qk_norm": True, "attention_softcap": 50.0, "logit_scale": 0.125, "softmax_scale": 0.1}
    monkeypatch.setitem(HOOKS, "many", (config, GEMMA, says, {}))
    register("many", unrotated_layers=frozenset({1}))
    make_module(config).save_pretrained(tmp_path)
    facts = dict(inspect(tmp_path).rows())
    assert facts["factors"] == "embedding 6.928, logits 0.125, q·k 0.1"
    assert (facts["soft caps"], facts["activation"], facts["post norms"]) == ("attention 50", "gelu_tanh", "yes")
    assert facts["RoPE"] == (
        "linear (factor 4), base 10000; with a sliding window default, base 50; none on 1 of 3 layers"
    )


def test_greedy_tokens_are_those_of_transformers(case, register):
    """On a GPU they come from the CUDA graph that replays the second step and those after it."""
    hook, made, folder = case
    register(hook)
    prompt, new = TOKENS[:20], 5
    tokens = list(prompt)
    for _ in range(new):
        tokens.append(int(reference_logits(made, tokens)[-1].argmax()))
    with (
        use_backend("numpy" if DEVICE.type == "cpu" else "triton"),
        read_safetensors(folder) as checkpoint,
        running(checkpoint, device=DEVICE.type) as runner,
    ):
        engine, sequence = TokenEngine(runner), Sequence(Request(prompt, new, SamplingParams()))
        engine.add(sequence)
        engine.advance(sequence, until=lambda: False)
    assert sequence.token_ids == tokens[len(prompt) :]
