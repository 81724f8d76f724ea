"""The worked example of docs/ADAPTER_PATTERN_GUIDE.md, run as it stands, against transformers' OLMo 2."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
from transformers import Olmo2Config

from rooflama.loaders import hf_config
from rooflama.loaders.gguf import read_gguf
from rooflama.loaders.safetensors import read_safetensors
from rooflama.models import ADAPTERS, ConfigError, adapter_for
from running_models import assert_parity, decode_logits, prefill_logits, running
from tiny_checkpoints import SIZES, gguf_name, make_module, random_tokens, reference_logits, write_gguf

GUIDE = Path(__file__).parents[2] / "docs/ADAPTER_PATTERN_GUIDE.md"
OUTPUT_NORMS = {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm"}

pytestmark = pytest.mark.usefixtures("numpy_backend")


def code_blocks():
    return re.findall(r"```python\n(.*?)```", GUIDE.read_text(), flags=re.DOTALL)


@pytest.fixture
def olmo2(tmp_path, monkeypatch):
    """The guide's code, imported and registered."""
    modules = []
    for name, code in zip(("olmo2_page", "olmo2_folder"), code_blocks(), strict=True):
        path = tmp_path / f"{name}.py"
        path.write_text(code)
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        modules.append(module)
    monkeypatch.setitem(ADAPTERS, "olmo2", modules[0])
    monkeypatch.setitem(hf_config.FAMILIES, "olmo2", modules[1].OLMO2)


@pytest.fixture(scope="module")
def made():
    return make_module(Olmo2Config(**SIZES))


def tiny_gguf(made, path):
    config = made.config
    keys = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_parameters["rope_theta"],
    }
    tensors = {}
    for stored, parameter in made.named_parameters():
        module = next((module for module in OUTPUT_NORMS if f".{module}." in stored), None)
        name = f"blk.{stored.split('.')[2]}.{OUTPUT_NORMS[module]}.weight" if module else gguf_name(stored)
        tensors[name] = parameter.detach().numpy()
    metadata = {"general.architecture": "olmo2"} | {f"olmo2.{key}": value for key, value in keys.items()}
    return write_gguf(path, metadata, tensors)


@pytest.mark.parametrize("source", ["gguf", "safetensors"])
@pytest.mark.usefixtures("olmo2")
def test_the_example_equals_transformers(source, made, tmp_path):
    if source == "gguf":
        opened = read_gguf(tiny_gguf(made, tmp_path / "olmo2.gguf"))
    else:
        made.save_pretrained(tmp_path / "folder")
        opened = read_safetensors(tmp_path / "folder")
    tokens = random_tokens(40)
    expected = reference_logits(made, tokens)
    with opened as checkpoint, running(checkpoint) as engine:
        for chunk in (7, 1024):
            (logits,) = prefill_logits(engine, [tokens], chunk)
            assert_parity(logits, expected, f"passes of {chunk}")
        (logits,) = decode_logits(engine, [tokens], [20])
        assert_parity(logits, expected[20:], "decoded")


def test_the_guide_is_short_and_its_example_not_shipped():
    assert len(GUIDE.read_text().splitlines()) < 120
    with pytest.raises(ConfigError, match="architecture 'olmo2'"):
        adapter_for("olmo2")
