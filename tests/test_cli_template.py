"""--template-variable and --tools: what the chat template is given, and slips that are refused."""

import json

import pytest
from typer.testing import CliRunner

from rooflama.cli import app
from rooflama.cli.template import template_variables
from rooflama.loaders.text.tokenizer import Tokenizer
from rooflama.models import ArgumentError
from small_checkpoint import write_small

TOOLS = [{"type": "function", "function": {"name": "größe", "parameters": {}}}]
TEMPLATE = "{{ messages[-1].content }}{{ enable_thinking }}{{ tools|length if tools }}"


def tools_file(tmp_path, text):
    path = tmp_path / "tools.json"
    path.write_text(text, encoding="utf-8")
    return path


def test_values_are_json_else_text(tmp_path):
    given = ["a=false", "b=False", "c=None", "d=1.5", 'e={"x": [1]}', "f=high", "g=", "h=a=b", 'i="5"', "j=null"]
    wanted = {"a": False, "b": False, "c": None, "d": 1.5, "e": {"x": [1]}}
    wanted |= {"f": "high", "g": "", "h": "a=b", "i": "5", "j": None}
    assert template_variables(given, None) == wanted
    assert template_variables([], tools_file(tmp_path, json.dumps(TOOLS))) == {"tools": TOOLS}
    assert template_variables([], None, chat=False) == {}


@pytest.mark.parametrize(
    ("given", "tools", "chat", "found"),
    [
        (["enable_thinking"], None, True, "'enable_thinking': it must be NAME=VALUE"),
        (["enable-thinking=1"], None, True, "'enable-thinking=1': it must be NAME=VALUE"),
        (["messages=[]"], None, True, "messages: messages is set otherwise"),
        (["tools=[]"], None, True, "tools is set otherwise. Use --tools"),
        (["a=1", "a=2"], None, True, "a twice"),
        (["a=1"], None, False, "--template-variable without --chat"),
        ([], "[]", False, "--tools without --chat"),
        ([], "[", True, "tools.json: it is no JSON"),
        ([], None, True, "missing.json: it cannot be read"),
    ],
)
def test_slips_are_refused(given, tools, chat, found, tmp_path):
    path = None if given else tmp_path / "missing.json" if tools is None else tools_file(tmp_path, tools)
    with pytest.raises(ArgumentError, match=found):
        template_variables(given, path, chat=chat)


@pytest.mark.parametrize("command", [["run", "ab", "--chat"], ["chat"]])
def test_they_reach_the_template(command, tmp_path, monkeypatch, numpy_backend):
    prompts = []

    def recorded(self, *args, **kwargs):
        prompts.append(text := self.apply_chat_template(*args, **kwargs))
        return self.encode(text)

    monkeypatch.setattr(Tokenizer, "encode_chat", recorded)
    model = str(write_small(tmp_path / "small.gguf", {"tokenizer.chat_template": TEMPLATE}))
    options = ["--template-variable", "enable_thinking=false", "--max-new-tokens", "1", "--device", "cpu"]
    options += ["--tools", str(tools_file(tmp_path, json.dumps(TOOLS)))]
    result = CliRunner().invoke(app, [command[0], model, *command[1:], *options], input="ab\n")
    assert result.exception is None, result.output
    assert prompts == ["abFalse1"]
