"""Model.chat: what goes to the template, what to generate, and what neither knows."""

import warnings

import pytest

import rooflama
from small_checkpoint import Parts

SAID = [{"role": "user", "content": "ab"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
TEMPLATE = (
    "{% if enable_thinking is defined and not enable_thinking %}quiet{% endif %}{{ messages[0].content }}"
    "{% if add_generation_prompt %}:{% endif %}"
)


@pytest.fixture
def model(tmp_path, numpy_backend):
    parts = Parts()
    parts.metadata["tokenizer.chat_template"] = TEMPLATE
    parts.metadata["tokenizer.chat_template.tool_use"] = TEMPLATE + "{{ tools|tojson }}"
    with rooflama.load(parts.write(tmp_path / "small.gguf"), device="cpu") as model:
        yield model


@pytest.mark.parametrize(
    ("variables", "prompt"),
    [
        ({}, "ab:"),
        ({"enable_thinking": True}, "ab:"),
        ({"enable_thinking": False}, "quietab:"),
        ({"add_generation_prompt": False}, "ab"),
        ({"tools": [TOOL]}, 'ab:[{"type": "function", "function": {"name": "f", "parameters": {}}}]'),
        ({"chat_template": "tool_use", "tools": []}, "ab:[]"),
    ],
)
def test_variables_reach_the_template_and_options_generate(variables, prompt, model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answer = model.chat(SAID, max_new_tokens=3, temperature=1.0, seed=5, **variables)
    assert answer.timings.prompt_tokens == len(model.tokenizer.encode(prompt))
    assert (len(answer.token_ids), answer.seed) == (3, 5)
    assert answer.token_ids == model.generate(prompt, max_new_tokens=3, temperature=1.0, seed=5).token_ids


def test_a_mistyped_option_does_not_vanish(model):
    with pytest.warns(UserWarning, match="the chat template does not use max_tokens: no effect"):
        model.chat(SAID, max_new_tokens=1, max_tokens=5)


def test_plain_text_is_no_conversation(model):
    with pytest.raises(rooflama.RooflamaError, match=r"messages is a str \('ab'\): it must be a list of messages"):
        model.chat("ab")
