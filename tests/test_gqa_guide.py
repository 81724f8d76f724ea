"""The code of docs/GQA_AND_MHA.md draws its figure, from the numbers that the text states."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"

# Bytes a token in 16 bits, from the models' published configs.
PUBLISHED_BYTES = {
    "Phi-3-mini": 393216,
    "Llama-2-7B": 524288,
    "Llama-2-70B": 327680,
    "Llama-3-8B": 131072,
    "Qwen3-8B": 147456,
    "Qwen2.5-7B": 57344,
    "Llama-3.2-1B": 32768,
    "SmolLM2-135M": 23040,
}


def texts(svg):
    return sorted(re.findall(r"<text[^>]*>([^<]*)</text>", svg.read_text()))


def test_the_figure_shows_what_the_code_computes(tmp_path):
    pytest.importorskip("matplotlib")
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "GQA_AND_MHA.md").read_text(), flags=re.DOTALL)
    scope = {}
    exec(compile(code, "GQA_AND_MHA.md", "exec"), scope)
    assert scope["draw"](str(tmp_path / "figure.svg")) == PUBLISHED_BYTES
    labels = texts(DOCS / "gqa_and_mha.svg")
    assert labels == texts(tmp_path / "figure.svg")
    assert "Qwen2.5-7B, GQA, group 7" in labels
    assert "Llama-2-7B, MHA, group 1" in labels
    for number in PUBLISHED_BYTES.values():
        assert f"{number / 1024:g}" in labels


def test_the_contexts_that_the_text_names():
    text = (DOCS / "GQA_AND_MHA.md").read_text()
    for name, size in (("Phi-3-mini", 48), ("Llama-3-8B", 16), ("Qwen2.5-7B", 7)):
        assert PUBLISHED_BYTES[name] * 131072 / 2**30 == size
        assert f"{size} GiB for {name}" in text
