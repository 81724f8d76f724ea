"""The worked examples of docs/ADAPTER_PATTERN_GUIDE.md, run as they stand, against transformers."""

import importlib.util
import re
import sys
import warnings
from pathlib import Path

import pytest
from transformers import Gemma2Config, GraniteConfig, Olmo2Config

from rooflama.loaders.gguf import read_gguf
from rooflama.loaders.huggingface import config as hf_config
from rooflama.loaders.huggingface.folder import read_safetensors
from rooflama.models import ADAPTERS, CheckpointReader, ConfigError, adapter_for
from running_models import assert_parity, decode_logits, prefill_logits, running
from tiny_checkpoints import (
    SIZES,
    WINDOW,
    gguf_name,
    interleave_rows,
    make_module,
    random_tokens,
    reference_logits,
    write_gguf,
)

GUIDE = Path(__file__).parents[2] / "docs/ADAPTER_PATTERN_GUIDE.md"
FAMILIES = ("granite", "gemma2", "olmo2")
CONFIGS = {
    "granite": GraniteConfig(
        **SIZES,
        attention_multiplier=0.2,
        embedding_multiplier=3.0,
        residual_multiplier=0.4,
        logits_scaling=8.0,
    ),
    "gemma2": Gemma2Config(
        **SIZES | {"tie_word_embeddings": True, "num_hidden_layers": 3},
        head_dim=16,
        query_pre_attn_scalar=24,
        sliding_window=WINDOW,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
    "olmo2": Olmo2Config(**SIZES),
}
OUTPUT_NORMS = {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm"}
LAYER_NAMES = {
    "granite": {},
    "gemma2": OUTPUT_NORMS | {"pre_feedforward_layernorm": "ffn_norm"},
    "olmo2": OUTPUT_NORMS,
}

pytestmark = pytest.mark.usefixtures("numpy_backend")


def code_blocks():
    return re.findall(r"```python\n(.*?)```", GUIDE.read_text(), flags=re.DOTALL)


@pytest.fixture
def registered(tmp_path, monkeypatch):
    """The guide's code, imported and registered: for each family its page, then its entry for folders."""
    blocks = iter(code_blocks())
    for family in FAMILIES:
        modules = []
        for part in ("page", "folder"):
            path = tmp_path / f"{family}_{part}.py"
            path.write_text(next(blocks))
            spec = importlib.util.spec_from_file_location(path.stem, path)
            module = importlib.util.module_from_spec(spec)
            monkeypatch.setitem(sys.modules, path.stem, module)
            spec.loader.exec_module(module)
            modules.append(module)
        monkeypatch.setitem(ADAPTERS, family, modules[0])
        monkeypatch.setitem(hf_config.FAMILIES, family, getattr(modules[1], family.upper()))
    assert next(blocks, None) is None


def gguf_keys(config):
    """What llama.cpp's converter writes for the config."""
    keys = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
    }
    if config.model_type == "granite":
        keys |= {
            "vocab_size": config.vocab_size,
            "rope.dimension_count": config.hidden_size // config.num_attention_heads,
            "rope.freq_base": config.rope_parameters["rope_theta"],
            "attention.scale": config.attention_multiplier,
            "embedding_scale": config.embedding_multiplier,
            "residual_scale": config.residual_multiplier,
            "logit_scale": config.logits_scaling,
        }
    if config.model_type == "gemma2":  # no attention.scale, so that the module must have the usual one
        keys |= {
            "attention.key_length": config.head_dim,
            "attention.value_length": config.head_dim,
            "attention.sliding_window": config.sliding_window,
            "attn_logit_softcapping": config.attn_logit_softcapping,
            "final_logit_softcapping": config.final_logit_softcapping,
        }
    return keys


def gguf_tensors(made):
    """The module's weights as the converter writes them: Granite's rows interleaved, Gemma's norms with their 1."""
    config = made.config
    tensors = {}
    for stored, parameter in made.named_parameters():
        module = next((module for module in LAYER_NAMES[config.model_type] if f".{module}." in stored), None)
        values = parameter.detach().numpy()
        if config.model_type == "granite" and ".q_proj." in stored:
            values = interleave_rows(values, config.num_attention_heads)
        if config.model_type == "granite" and ".k_proj." in stored:
            values = interleave_rows(values, config.num_key_value_heads)
        if config.model_type == "gemma2" and values.ndim == 1:
            values = values + 1
        renamed = LAYER_NAMES[config.model_type].get(module)
        tensors[f"blk.{stored.split('.')[2]}.{renamed}.weight" if renamed else gguf_name(stored)] = values
    return tensors


def opened(source, made, folder):
    family = made.config.model_type
    if source == "gguf":
        metadata = {"general.architecture": family} | {f"{family}.{k}": v for k, v in gguf_keys(made.config).items()}
        return read_gguf(write_gguf(folder / f"{family}.gguf", metadata, gguf_tensors(made)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.save_pretrained(folder / "folder")
    return read_safetensors(folder / "folder")


@pytest.mark.parametrize("source", ["gguf", "safetensors"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("registered")
def test_an_example_equals_transformers(family, source, tmp_path):
    config = CONFIGS[family]
    if family == "gemma2" and source == "gguf":
        config = Gemma2Config(**config.to_dict() | {"query_pre_attn_scalar": config.head_dim})
    made = make_module(config)
    tokens = random_tokens(40)
    expected = reference_logits(made, tokens)
    with opened(source, made, tmp_path) as checkpoint, running(checkpoint) as runner:
        for chunk in (7, 1024):
            (logits,) = prefill_logits(runner, [tokens], chunk)
            assert_parity(logits, expected, f"passes of {chunk}")
        (logits,) = decode_logits(runner, [tokens], [20])
        assert_parity(logits, expected[20:], "decoded")


@pytest.mark.usefixtures("registered")
def test_the_largest_gemma_2_scales_its_scores_by_another_number(tmp_path):
    made = make_module(Gemma2Config(**CONFIGS["gemma2"].to_dict() | {"num_hidden_layers": 46, "layer_types": None}))
    with opened("gguf", made, tmp_path) as checkpoint:
        config = adapter_for("gemma2").read_config(CheckpointReader(checkpoint))
        assert config.softmax_scale == (48 / 6) ** -0.5
        assert config.sliding_windows == (WINDOW, 0) * 23


def test_the_guide_is_short_and_its_examples_not_shipped():
    assert len(GUIDE.read_text().splitlines()) < 240
    for family in FAMILIES:
        with pytest.raises(ConfigError, match=f"architecture '{family}'"):
            adapter_for(family)
