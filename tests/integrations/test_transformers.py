"""attn_implementation="rooflama" against "sdpa": the same logits and greedy tokens, and refusals of everything else."""

import copy
from collections import Counter
from functools import cache

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig, StaticCache
from transformers.masking_utils import create_causal_mask, create_chunked_causal_mask

from rooflama.integrations.transformers import make_mask, register, register_flash
from rooflama.kernels import KernelInputError, swap
from rooflama.kernels.kernel import KERNELS
from rooflama.models import ArgumentError
from rooflama.testing.strategies import DEVICE
from running_models import assert_parity
from tiny_checkpoints import WINDOW, cases, make_module, random_tokens

FAMILIES = ["llama3", "llama-group7", "qwen2", "qwen2-window", "qwen3", "phi3-4k", "phi3-128k", "mistral-window"]
LENGTH = 2 * WINDOW + 2
PADS = {  # tokens of padding before and after each sequence
    "none": [(0, 0), (0, 0), (0, 0)],
    "left": [(0, 0), (5, 0), (13, 0)],
    "right": [(0, 0), (0, 5), (0, 13)],
    "both": [(0, 0), (2, 3), (6, 7)],
}
CACHES = {
    "dynamic": lambda config: DynamicCache(config=config),
    "unbounded": lambda config: DynamicCache(),  # keeps keys that have left the window
    "static": lambda config: StaticCache(config=config, max_cache_len=40),
}

register()
pytestmark = [] if DEVICE.type == "cuda" else pytest.mark.usefixtures("numpy_backend")  # test_dense runs the kernels


@cache
def model(name, dtype=torch.float32):
    return make_module(copy.deepcopy(cases()[name].config)).to(device=DEVICE, dtype=dtype)


def both(name, run, dtype=torch.float32):
    """(with sdpa, with rooflama): what ``run(model)`` returns."""
    results = []
    for implementation in ("sdpa", "rooflama"):
        model(name, dtype).set_attn_implementation(implementation)
        with torch.no_grad():
            results.append(run(model(name, dtype)))
    return results


def batch(pads):
    """(token ids, attention mask), [batch, LENGTH]."""
    ids = torch.tensor([random_tokens(LENGTH, seed=seed) for seed in range(len(PADS[pads]))], device=DEVICE)
    mask = torch.ones_like(ids)
    for row, (left, right) in enumerate(PADS[pads]):
        mask[row, :left] = 0
        mask[row, LENGTH - right :] = 0
    return ids, mask


def positions(mask):
    return (mask.cumsum(1) - 1).clamp(min=0)


@pytest.mark.parametrize("pads", PADS)
@pytest.mark.parametrize("name", FAMILIES)
def test_logits(name, pads):
    ids, mask = batch(pads)
    sdpa, ours = both(name, lambda m: m(ids, attention_mask=mask).logits[mask.bool()])
    assert_parity(ours, sdpa, f"{name}, padding {pads}")


@pytest.mark.parametrize("name", ["llama3", "phi3-4k"])
def test_logits_without_a_cache(name):
    """K and V are parts of projections; Phi-3's lie differently."""
    ids, mask = batch("left")
    sdpa, ours = both(name, lambda m: m(ids, attention_mask=mask, use_cache=False).logits[mask.bool()])
    assert_parity(ours, sdpa, name)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("pads", ["none", "left"])
@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_tokens(name, pads, kind):
    ids, mask = batch(pads)
    options = {"max_new_tokens": 2 * WINDOW, "do_sample": False, "pad_token_id": 0, "disable_compile": True}
    sdpa, ours = both(name, lambda m: m.generate(ids, attention_mask=mask, cache_implementation=kind, **options))
    assert torch.equal(sdpa, ours)


@pytest.mark.parametrize("name", ["llama3", "qwen2-window", "mistral-window"])
def test_beams(name):
    """Rows of the cache change places."""
    ids, mask = batch("left")
    options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    sdpa, ours = both(name, lambda m: m.generate(ids, attention_mask=mask, **options))
    assert torch.equal(sdpa, ours)


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("pads", ["right", "both"])
@pytest.mark.parametrize("name", ["llama3", "qwen2-window", "phi3-4k"])
def test_tokens_after_padding_on_the_right(name, pads, kind):
    """One query per sequence, whose keys have a hole."""
    ids, mask = batch(pads)
    steps = torch.tensor([random_tokens(4, seed=row) for row in range(len(ids))], device=DEVICE)

    def run(m):
        kept = CACHES[kind](m.config)
        m(ids, attention_mask=mask, position_ids=positions(mask), past_key_values=kept)
        seen, logits = mask, []
        for step in range(4):
            seen = torch.cat([seen, torch.ones_like(seen[:, :1])], dim=1)
            places = positions(seen)[:, -1:]
            out = m(steps[:, step : step + 1], attention_mask=seen, position_ids=places, past_key_values=kept)
            logits.append(out.logits)
        return torch.cat(logits, dim=1)

    sdpa, ours = both(name, run)
    assert_parity(ours, sdpa, f"{name}, padding {pads}")


@pytest.mark.parametrize("name", ["llama3", "mistral-window"])
def test_a_prompt_in_chunks(name):
    ids, mask = batch("left")

    def run(m):
        kept, logits = CACHES["static"](m.config), []
        for start in range(0, LENGTH, 7):
            chunk = slice(start, start + 7)
            out = m(ids[:, chunk], attention_mask=mask[:, : start + 7], past_key_values=kept)
            logits.append(out.logits)
        return torch.cat(logits, dim=1)[mask.bool()]

    sdpa, ours = both(name, run)
    assert_parity(ours, sdpa, name)


@pytest.mark.parametrize("name", ["llama3", "qwen3", "phi3-4k"])
def test_editing_the_future_changes_nothing(name):
    ids, _ = batch("none")
    edited = ids.clone()
    edited[:, 11:] = (edited[:, 11:] + 1) % 96
    _, (before, after) = both(name, lambda m: [m(tokens).logits for tokens in (ids, edited)])
    assert torch.equal(before[:, :11], after[:, :11])
    assert not torch.equal(before[:, 11:], after[:, 11:])


def test_our_kernels_do_it():
    calls = Counter()

    def counted(name):
        def call(*args, **kwargs):
            calls[name] += 1
            return KERNELS[name](*args, **kwargs)

        return call

    ids, mask = batch("left")
    model("llama3").set_attn_implementation("rooflama")
    with swap(**{name: counted(name) for name in KERNELS}), torch.no_grad():
        model("llama3").generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert calls == {"attention_prefill": 2, "attention_decode": 3 * 2}


def test_a_step_compiles_into_one_graph():
    """As transformers compiles decoding with a static cache: the mask is made outside."""
    ids, mask = batch("left")
    longer = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    m = model("llama3")
    m.set_attn_implementation("rooflama")
    steps = []
    for forward in (m.forward, torch.compile(m.forward, backend="eager", fullgraph=True)):
        kept = CACHES["static"](m.config)
        with torch.no_grad():
            m(ids, attention_mask=mask, position_ids=positions(mask), past_key_values=kept)
            token, place = ids[:, :1], positions(longer)[:, -1:]
            made = create_causal_mask(
                config=m.config,
                inputs_embeds=m.get_input_embeddings()(token),
                attention_mask=longer,
                past_key_values=kept,
                position_ids=place,
            )
            steps.append(forward(token, attention_mask=made, position_ids=place, past_key_values=kept).logits)
    assert_parity(steps[1], steps[0], "compiled")


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.20"), reason="flash from the hub alone")
@pytest.mark.parametrize("name", ["llama3", "qwen2-window"])
def test_continuous_batching(name):
    """On a GPU, llama3 decodes through flash_attn_with_kvcache, whose pages continuous batching makes."""
    register_flash()
    prompts = [random_tokens(length) for length in (3, 20)]
    config = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1)
    m = model(name)
    with torch.no_grad():
        m.set_attn_implementation("sdpa")
        alone = [
            m.generate(torch.tensor([prompt], device=DEVICE), generation_config=config, attention_mask=None)
            for prompt in prompts
        ]
        m.set_attn_implementation("rooflama/flash-attn2")
        batching = ContinuousBatchingConfig(num_blocks=8)
        found = m.generate_batch(inputs=prompts, generation_config=config, continuous_batching_config=batching)
    expected = [tokens[0, len(prompt) :].tolist() for prompt, tokens in zip(prompts, alone, strict=True)]
    assert [output.generated_tokens for output in found.values()] == expected


@pytest.mark.parametrize("pads", ["none", "left"])
def test_flash_attention_of_transformers(pads):
    ids, mask = batch(pads)
    register_flash()
    logits = {}
    for implementation in ("sdpa", "rooflama/flash-attn2"):
        model("llama3").set_attn_implementation(implementation)
        with torch.no_grad():
            logits[implementation] = model("llama3")(ids, attention_mask=mask).logits[mask.bool()]
    assert_parity(logits["rooflama/flash-attn2"], logits["sdpa"], pads)


def test_transformers_4_asks_for_the_same_masks():
    """It passes the positions of the queries, where transformers 5 passes their number and the first."""
    from transformers.masking_utils import causal_mask_function

    _, mask = batch("left")
    known = {"batch_size": 3, "kv_length": 40, "mask_function": causal_mask_function, "attention_mask": mask.bool()}
    place = torch.arange(LENGTH - 4, LENGTH, device=DEVICE)
    old = make_mask(**known, cache_position=place, dtype=torch.float32, config=None)
    new = make_mask(**known, q_length=4, q_offset=LENGTH - 4, device=DEVICE, dtype=torch.float32, config=None)
    assert old.tolist() == new.tolist() == [[[[left, LENGTH - left]]] for left, _ in PADS["left"]]


def test_a_mask_may_reach_beyond_what_is_written():
    from transformers.masking_utils import causal_mask_function

    whole = torch.ones(2, 40, dtype=torch.bool, device=DEVICE)
    known = {"batch_size": 2, "kv_length": 40, "mask_function": causal_mask_function, "device": DEVICE}
    for queries in (1, 4):
        made = make_mask(**known, q_length=queries, q_offset=20 - queries, attention_mask=whole)
        assert made.tolist() == [[[[0, 20]]]] * 2


def refusals():
    ids, mask = batch("right")
    hole = mask.clone()
    hole[:, 3] = 0
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool, device=DEVICE).tril().expand(3, 1, -1, -1)
    packed = torch.arange(LENGTH, device=DEVICE).expand(3, -1) % 7
    return {
        "attention mask torch.bool": lambda m: m(ids, attention_mask=causal),
        "padding between the keys": lambda m: m(ids, attention_mask=hole),
        "packed sequences": lambda m: m(ids, position_ids=packed, use_cache=False),
        "cu_seq_lens_q": lambda m: m(ids, cu_seq_lens_q=torch.tensor([0, 20])),
        "not causal": lambda m: m(ids, is_causal=False),
        "output_attentions=True": lambda m: m(ids, output_attentions=True),
        "chunks": lambda m: create_chunked_causal_mask(
            config=chunked(m.config),
            inputs_embeds=torch.zeros(3, LENGTH, 48, device=DEVICE),
            attention_mask=None,
            past_key_values=None,
        ),
        "mask function of your own": lambda m: create_causal_mask(
            config=m.config,
            inputs_embeds=torch.zeros(3, LENGTH, 48, device=DEVICE),
            attention_mask=None,
            past_key_values=None,
            or_mask_function=lambda b, h, q, k: k >= 0,
        ),
    }


def chunked(config):
    config = copy.deepcopy(config)
    config.attention_chunk_size = 7
    return config


@pytest.mark.parametrize("what", refusals())
def test_what_is_not_served_is_refused(what):
    model("llama3").set_attn_implementation("rooflama")
    with torch.no_grad(), pytest.raises(ArgumentError, match=what):
        refusals()[what](model("llama3"))


def test_training_is_refused():
    ids, _ = batch("none")
    trained = copy.deepcopy(model("llama3"))
    trained.set_attn_implementation("rooflama")
    with pytest.raises(KernelInputError, match=r"requires grad.*torch\.no_grad"):
        trained(ids)
    trained.config.attention_dropout = 0.1
    for layer in trained.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with torch.no_grad(), pytest.raises(ArgumentError, match=r"dropout=0\.1.*model\.eval"):
        trained.train()(ids)


@pytest.mark.gpu
@pytest.mark.parametrize("pads", ["none", "left"])
@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_is_no_further_off_than_sdpa(name, pads):
    ids, mask = batch(pads)
    exact, _ = both(name, lambda m: m(ids, attention_mask=mask).logits[mask.bool()])
    sdpa, ours = both(name, lambda m: m(ids, attention_mask=mask).logits[mask.bool()].float(), torch.bfloat16)
    allowed = 2 * float((sdpa - exact).norm())
    assert float((ours - exact).norm()) <= allowed


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama3", "qwen2-window", "phi3-4k"])
def test_a_compiled_static_cache(name):
    """transformers compiles the steps of a static cache on a GPU, with CUDA graphs."""
    ids, mask = batch("left")
    options = {"max_new_tokens": 2 * WINDOW, "do_sample": False, "pad_token_id": 0, "cache_implementation": "static"}
    sdpa, ours = both(name, lambda m: m.generate(ids, attention_mask=mask, **options))
    assert torch.equal(sdpa, ours)
