"""Each quantised type through a whole model, against transformers on the same weights as gguf dequantises them."""

from functools import cache

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, Phi3Config, PreTrainedConfig, PreTrainedModel

from rooflama.kernels import LAYOUTS, rope_and_cache_write, swap, use_backend
from rooflama.loaders.gguf import read_gguf
from rooflama.loaders.gguf.types import TYPE_SIZES
from rooflama.testing.weights import HALVES, TYPES, gguf_dequantize, random_blocks
from running_models import assert_parity, decode_logits, prefill_logits, running
from tiny_checkpoints import (
    SIZES,
    Blocks,
    gguf_metadata,
    gguf_name,
    make_module,
    random_tokens,
    reference_logits,
    split_rows,
    write_gguf,
)

WIDE = SIZES | {  # whole blocks of 256 in every row
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
# What llama-quantize writes under one name: types differ within one stacked projection.
MIXED = ("Q4_K", "Q4_K", "Q6_K", "Q5_0", "Q8_0", "Q3_K", "IQ4_XS", "F16")


def quantised(config: PreTrainedConfig, kinds: tuple[str, ...]) -> tuple[PreTrainedModel, dict]:
    """A module, and the GGUF tensors that hold exactly its weights, matrices in the given types in turn."""
    made = make_module(config)
    rng = np.random.default_rng(len(kinds[0]))
    tensors: dict[str, np.ndarray | Blocks] = {}
    matrices = 0
    for stored, parameter in made.named_parameters():
        if parameter.ndim == 1:
            tensors[gguf_name(stored)] = parameter.detach().numpy().copy()
            continue
        kind = kinds[matrices % len(kinds)]
        matrices += 1
        raw = random_blocks(rng, kind, *parameter.shape)
        # Random blocks with minima have a common mean, which would make attention ill conditioned: keep scores small.
        gain = 0.5 if any(part in stored for part in ("q_proj", "k_proj", "qkv_proj")) else 1.0
        size = float(np.sqrt(np.square(gguf_dequantize(raw, kind).astype(np.float64)).mean()))
        raw = scaled(raw, kind, (1.0 if "embed_tokens" in stored else gain * parameter.shape[1] ** -0.5) / size)
        weights = gguf_dequantize(raw, kind).reshape(parameter.shape)
        if config.model_type == "llama" and (".q_proj." in stored or ".k_proj." in stored):
            heads = config.num_attention_heads if ".q_proj." in stored else config.num_key_value_heads
            weights = split_rows(weights, heads)
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(np.ascontiguousarray(weights)))
        tensors[gguf_name(stored)] = Blocks(raw, kind)
    return made, tensors


def scaled(raw: np.ndarray, kind: str, factor: float) -> np.ndarray:
    """Blocks whose float16 scales (or whose numbers, in float types) are multiplied by ``factor``."""
    if kind == "BF16":
        wide = (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32) * np.float32(
            2.0 ** round(np.log2(factor))
        )
        return (wide.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    if LAYOUTS[kind].is_float:
        floats = raw.view(np.float32 if kind == "F32" else np.float16)
        return (floats * floats.dtype.type(factor)).view(np.uint8)
    blocks = raw.reshape(-1, TYPE_SIZES[kind][1]).copy()
    for offset in HALVES[kind]:
        halves = np.ascontiguousarray(blocks[:, offset : offset + 2]).view(np.float16) * np.float16(factor)
        blocks[:, offset : offset + 2] = halves.view(np.uint8)
    return blocks.reshape(raw.shape)


@cache
def config(family: str) -> PreTrainedConfig:
    return Phi3Config(**WIDE | {"num_key_value_heads": 8}) if family == "phi3" else LlamaConfig(**WIDE)


@pytest.mark.parametrize(
    ("family", "kinds"),
    [*(("llama", (kind,)) for kind in TYPES), ("llama", MIXED), ("phi3", ("Q5_K",)), ("phi3", MIXED)],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
@pytest.mark.usefixtures("numpy_backend")
def test_whole_model_equals_the_dequantised_one(family, kinds, tmp_path):
    made, tensors = quantised(config(family), kinds)
    tokens = random_tokens(24)
    expected = reference_logits(made, tokens)
    assert 0.1 < float(expected.std()) < 100
    path = write_gguf(tmp_path / "model.gguf", gguf_metadata(made.config), tensors)
    with read_gguf(path) as checkpoint, running(checkpoint) as runner:
        (prefilled,) = prefill_logits(runner, [tokens], 7)
        (decoded,) = decode_logits(runner, [tokens], [12])
    assert_parity(prefilled, expected, f"{family} in {kinds}")
    assert_parity(decoded, expected[12:], f"{family} in {kinds}, decoded")


@pytest.mark.usefixtures("numpy_backend")
def test_parts_of_unlike_types_are_not_joined(tmp_path):
    """q, k and v reach the rotation where their products wrote them, whatever their types and their number."""
    _, tensors = quantised(config("llama"), MIXED)
    path = write_gguf(tmp_path / "model.gguf", gguf_metadata(config("llama")), tensors)
    seen = set()

    def count_parts(q, k, v, *args, **kwargs):
        seen.add(len({tensor.untyped_storage().data_ptr() for tensor in (q, k, v)}))
        return rope_and_cache_write(q, k, v, *args, **kwargs)

    with read_gguf(path) as checkpoint, running(checkpoint) as runner, swap(rope_and_cache_write=count_parts):
        expected = {len(layer.qkv.parts) for layer in runner.decoder.layers}
        prefill_logits(runner, [random_tokens(5)], 7)
    assert seen == expected
    assert max(expected) > 1


def test_the_kernels_themselves_run_a_quantised_model(tmp_path):
    """Every Triton kernel of a forward pass, composed: interpreted on the CPU, compiled on a GPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    made, tensors = quantised(LlamaConfig(**SIZES | small | heads), ("Q4_1", "Q8_0", "Q5_0"))
    tokens = random_tokens(4, 32)
    path = write_gguf(tmp_path / "model.gguf", gguf_metadata(made.config), tensors)
    with use_backend("triton"), read_gguf(path) as checkpoint, running(checkpoint, device=device) as runner:
        (prefilled,) = prefill_logits(runner, [tokens[:3]], 1024)
        (decoded,) = decode_logits(runner, [tokens], [3])
    expected = reference_logits(made, tokens)
    assert_parity(prefilled, expected[:3], "prefill")
    assert_parity(decoded, expected[3:], "decode")
