"""Needles in texts of 32,768 and 131,072 tokens: the last tokens see them as transformers' modules in float64 do.

The text repeats one token whose keys are zero, except for a few needles and for the last tokens, the queries. Only the
queries attend, on both sides; the others only write keys and values. This is enough in a model of one layer, where keys
and values do not depend on attention. Queries are so large that a head often sees a single needle among 131,072 keys.
"""

import numpy as np
import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, MistralConfig, Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from rooflama import swap
from rooflama.kernels import attention_prefill
from rooflama.models.rope.spec import attention_factor, inverse_frequencies
from running_models import PAGE_SIZE, assert_parity, decode_logits, prefill_logits, running
from tiny_checkpoints import SIZES, MemoryCheckpoint, gguf_metadata, gguf_tensors, make_module, random_tokens

pytestmark = pytest.mark.usefixtures("numpy_backend")

QUERIES, WINDOW, CHUNK, FILLER, HEAD_DIM = 24, 4096, 8192, 0, 8
LARGER = 6  # queries than other tests have; errors of scores, and so of weights, grow with them
LONG = {
    **SIZES,
    "num_hidden_layers": 1,
    "intermediate_size": 16,
    "max_position_embeddings": 131_072,
}
ORIGINAL = {"original_max_position_embeddings": 4096}
PAIRS = range(HEAD_DIM // 2)
FACTORS = {"short_factor": [1.0 + 0.05 * j for j in PAIRS], "long_factor": [1.0 + 4.0 * j for j in PAIRS]}
LLAMA3 = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def rope(kind, **parameters):
    return {"rope_type": kind, "rope_theta": 5e5, **ORIGINAL, **parameters}


CONFIGS = {
    "llama3": lambda: LlamaConfig(**LONG, rope_parameters=rope("llama3", **LLAMA3)),
    "yarn": lambda: LlamaConfig(**LONG, rope_parameters=rope("yarn", factor=32.0)),
    "longrope": lambda: Phi3Config(
        **LONG, **ORIGINAL, rope_parameters=rope("longrope", **FACTORS), sliding_window=None
    ),
    "window": lambda: MistralConfig(**LONG, sliding_window=WINDOW),
}


def needles(length):
    """Places at the ends of pages and of the two halves; the last that no window shows, and the first that all show."""
    first = length - QUERIES
    page, middle = first // PAGE_SIZE * PAGE_SIZE, length // 2
    return [0, PAGE_SIZE - 1, PAGE_SIZE, middle - 1, middle, first - WINDOW, length - WINDOW, page - 1, page]


def text(length):
    tokens = np.full(length, FILLER)
    tokens[needles(length)] = random_tokens(len(needles(length)))
    tokens[-QUERIES:] = random_tokens(QUERIES)
    return tokens.tolist()


def make_needle_module(name):
    """A module with large queries, and without keys for the filler."""
    made = make_module(CONFIGS[name]())
    layer, config = made.model.layers[0], made.config
    if name == "longrope":
        rows = [heads * HEAD_DIM for heads in (config.num_attention_heads, *[config.num_key_value_heads] * 2)]
        queries, keys, _ = layer.self_attn.qkv_proj.weight.data.split(rows)
    else:
        queries, keys = layer.self_attn.q_proj.weight.data, layer.self_attn.k_proj.weight.data
    queries *= LARGER
    without_key = torch.linalg.svd((keys * layer.input_layernorm.weight.data).double()).Vh[-1]
    made.model.embed_tokens.weight.data[FILLER] = without_key * config.hidden_size**0.5
    return made


def sampled_prefill(length):
    """attention_prefill for the last QUERIES rows of a text of ``length`` tokens; zeros for all others."""
    starts = torch.tensor([0, QUERIES], dtype=torch.int32)

    def replacement(q, k_pages, v_pages, block_table, seq_lens, query_start_loc, **options):
        out, lse = torch.zeros_like(q), torch.zeros(q.shape[:2])
        if int(seq_lens) == length:
            rows = slice(-QUERIES, None)
            results = attention_prefill(q[rows], k_pages, v_pages, block_table, seq_lens, starts, **options)
            out[rows], lse[rows] = results
        return out, lse

    return replacement


class SampledAttention:
    """transformers' attention for the last QUERIES rows; ``weights`` [num_heads, QUERIES, num_keys] are kept."""

    def __call__(self, module, q, k, v, mask, scaling, **options):
        k, v = (x.repeat_interleave(module.num_key_value_groups, 1) for x in (k, v))
        keys = torch.arange(k.shape[2])
        positions = keys[-QUERIES:, None]
        window = getattr(module.config, "sliding_window", None) or len(keys)
        visible = (keys <= positions) & (keys > positions - window)
        scores = q[:, :, -QUERIES:] @ k.mT * scaling
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        self.weights = weights[0]
        out = torch.zeros_like(q)
        out[:, :, -QUERIES:] = weights @ v
        return out.transpose(1, 2), None


def reference(made, spec, tokens):
    """Logits float64 [QUERIES, vocab_size] of the last tokens, and their attention weights."""
    factor_set = "long" if spec.kind == "longrope" else None
    frequencies = torch.from_numpy(inverse_frequencies(spec, factor_set=factor_set))
    if spec.kind != "default":
        theirs, _ = ROPE_INIT_FUNCTIONS[spec.kind](made.config, "cpu", seq_len=len(tokens))
        torch.testing.assert_close(theirs.double(), frequencies, rtol=1e-6, atol=0)

    def rotary(x, position_ids):  # transformers' own has float32 angles: off by 0.01 here
        angles = position_ids[..., None].double() * torch.cat([frequencies, frequencies])
        return angles.cos() * attention_factor(spec), angles.sin() * attention_factor(spec)

    attention = SampledAttention()
    AttentionInterface.register("sampled", attention)
    AttentionMaskInterface.register("sampled", lambda *args, **options: None)
    made.double().config._attn_implementation = "sampled"
    made.model.rotary_emb.forward = rotary
    with torch.no_grad():
        hidden = made.model(torch.tensor([tokens])).last_hidden_state[0, -QUERIES:]
        return made.lm_head(hidden), attention.weights


@pytest.mark.parametrize("length", [32_768, 131_072])
@pytest.mark.parametrize("name", CONFIGS)
def test_needles_are_seen(name, length):
    tokens, made = text(length), make_needle_module(name)
    checkpoint = MemoryCheckpoint(gguf_metadata(made.config), gguf_tensors(made))
    if name == "window":
        checkpoint.metadata["llama.attention.sliding_window"] = WINDOW
    with running(checkpoint, max_context=length, prefill_chunk=CHUNK) as runner:
        spec = runner.decoder.config.rope
        with swap(attention_prefill=sampled_prefill(length)):
            (prefilled,) = prefill_logits(runner, [tokens], CHUNK)
            (decoded,) = decode_logits(runner, [tokens], [length - QUERIES])
    expected, weights = reference(made, spec, tokens)

    seen = dict(zip(needles(length), weights.amax((0, 1))[needles(length)].tolist(), strict=True))
    hidden = {place for place in seen if name == "window" and place <= length - QUERIES - WINDOW}
    assert all((weight == 0) if place in hidden else (weight > 0.5) for place, weight in seen.items()), seen
    for way, logits in (("prefilled", prefilled[-QUERIES:]), ("decoded", decoded)):
        assert_parity(logits, expected, f"{name}, {way}", tolerance=LARGER * 2e-5)
