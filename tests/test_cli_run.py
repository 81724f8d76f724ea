"""``rooflama run``: where a prompt comes from, what the options do, and how an answer ends."""

import json

import pytest

from command_line import rooflama
from rooflama.loaders.text.tokenizer import Tokenizer
from rooflama.model import Model, Stream
from small_checkpoint import VOCABULARY, write_small
from speaking_checkpoint import speaking

pytestmark = pytest.mark.usefixtures("numpy_backend")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return str(write_small(tmp_path_factory.mktemp("small") / "small.gguf"))


@pytest.fixture
def prompts(monkeypatch):
    """The prompts that ``Model.stream`` gets; the model does not run."""
    given = []
    stream = Model.stream

    def recorded(self, prompt, **options):
        given.append((prompt, options))
        return stream(self, prompt, **options | {"max_new_tokens": 1})

    monkeypatch.setattr(Model, "stream", recorded)
    return given


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_no_encoding_ends_an_answer(tmp_path, encoding):
    path = speaking(tmp_path / "m.gguf", "<🙂>")
    result = rooflama("run", path, "hi", "--max-new-tokens", "3", encoding=encoding)
    assert result.status == 0, result.stderr
    assert result.stdout == ("<🙂>" * 3 + "\n").encode(encoding, "replace").decode(encoding)


def test_a_pipe_gets_no_line_of_the_progress_bar(small):
    """Rich ends a bar with an empty line where there is no terminal."""
    assert all(rooflama("run", small, "hi", "--max-new-tokens", "1").stderr.splitlines())


@pytest.mark.parametrize("arguments", [["-"], []])
def test_the_prompt_from_standard_input(small, prompts, arguments):
    assert rooflama("run", small, *arguments, stdin="über\n\n").status == 0
    assert prompts == [("über\n", {})]


def test_the_prompt_from_a_file(small, prompts, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_bytes("a\r\nüber\n".encode())
    assert rooflama("run", small, "--file", str(file)).status == 0
    assert prompts == [("a\nüber", {})]


@pytest.mark.parametrize(
    ("arguments", "stdin", "found"),
    [
        (["ab", "--file", "x"], b"", "PROMPT and --file"),
        (["--file", "missing.txt"], b"", "missing.txt: it must be readable (No such file"),
        ([], b"a\xffb", "byte 1 of standard input"),
        (["a\udcff"], b"", "character 2 of PROMPT"),
        (["ab", "--system", "x"], b"", "--system without --chat"),
        (["ab", "--logprobs", "2"], b"", "--logprobs without --json"),
        (["ab", "-n", "0"], b"", "n 0"),
        (["ab", "--max-new-tokens", "0"], b"", "max_new_tokens 0"),
        (["ab", "--temperature", "-1"], b"", "temperature -1.0"),
        (["ab", "--top-p", "nan"], b"", "top_p nan"),
        (["ab", "--frequency-penalty", "inf"], b"", "frequency_penalty inf"),
        (["ab", "--logit-bias", "ab"], b"", "--logit-bias 'ab'"),
    ],
)
def test_slips_are_found_before_the_model_is_looked_at(arguments, stdin, found):
    result = rooflama("run", "missing.gguf", *arguments, stdin=stdin)
    assert result.status == 2
    assert result.stderr.startswith("error: ")
    assert found in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("option", "value", "found"),
    [
        ("--device", "tpu", "device 'tpu'"),
        ("--dtype", "float8", "dtype 'float8'"),
        ("--kv-dtype", "int4", "kv_dtype 'int4'"),
        ("--memory-limit", "much", "'much' as an amount"),
        ("--max-context", "0", "max_context 0"),
    ],
)
@pytest.mark.parametrize("command", [["run", "missing.gguf", "ab"], ["chat", "missing.gguf"]])
def test_loading_options_are_checked_before_the_file(command, option, value, found):
    result = rooflama(*command, option, value)
    assert (result.status, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {found}")


def test_without_a_prompt_a_terminal_is_not_waited_for(small):
    result = rooflama("run", small, terminal=True)
    assert result.status == 2
    assert "no prompt" in result.stderr


def test_options_reach_the_model(small, prompts):
    options = [
        "--repetition-penalty",
        "1.1",
        "--logit-bias",
        "5=-2",
        "--logit-bias",
        "6=1.5",
        "--temperature",
        "0.5",
        "--top-k",
        "3",
        "--top-p",
        "0.9",
        "--min-p",
        "0.1",
        "--seed",
        "7",
    ]
    assert rooflama("run", small, "ab", *options, "--stop", "x", "--stop", "yz").status == 0
    given = {"temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.1, "seed": 7, "stop": ["x", "yz"]}
    given |= {"repetition_penalty": 1.1, "logit_bias": {5: -2.0, 6: 1.5}}
    assert prompts == [("ab", given)]


def test_a_system_message(small, monkeypatch):
    conversations = []

    def recorded(self, messages, **variables):
        conversations.append(messages)
        return [1]

    monkeypatch.setattr(Tokenizer, "encode_chat", recorded)
    assert rooflama("run", small, "hi", "--chat", "--system", "be brief", "--max-new-tokens", "1").status == 0
    system, user = {"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}
    assert conversations == [[system, user]]


@pytest.mark.parametrize("chat", [False, True])
def test_a_chat_template_that_is_not_used_is_mentioned(small, chat):
    result = rooflama("run", small, "hi", "--max-new-tokens", "1", *["--chat"] * chat)
    assert ("note: this model has a chat template, and --chat" in result.stderr) is not chat
    assert "tokens/s" in result.stderr


def test_json_holds_the_answer_and_nothing_else_is_printed(tmp_path):
    path = speaking(tmp_path / "m.gguf", "<x>")
    result = rooflama("run", path, "hi", "--max-new-tokens", "2", "--json", encoding="ascii")
    assert result.status == 0, result.stderr
    (generation,) = json.loads(result.stdout, parse_constant=pytest.fail)["generations"]
    assert generation["text"] == "<x><x>"
    assert generation["token_ids"] == [VOCABULARY] * 2
    assert generation["finish_reason"] == "length"
    assert generation["timings"]["prompt_tokens"] == 2


def test_json_of_several_answers_with_log_probabilities(tmp_path):
    path = speaking(tmp_path / "m.gguf", "<x>")
    result = rooflama("run", path, "hi", "--max-new-tokens", "2", "--json", "-n", "3", "--logprobs", "2")
    assert result.status == 0, result.stderr
    generations = json.loads(result.stdout)["generations"]
    assert [generation["text"] for generation in generations] == ["<x><x>"] * 3
    for entry in generations[2]["logprobs"]:
        assert entry["token_id"] == entry["top"][0][0] == VOCABULARY
        assert len(entry["top"]) == 2


def test_several_answers_are_numbered(tmp_path):
    result = rooflama("run", speaking(tmp_path / "m.gguf", "<x>"), "hi", "--max-new-tokens", "1", "--n", "2")
    assert (result.status, result.stdout) == (0, "<x>\n<x>\n")
    assert "answer 2 of 2" in result.stderr


def test_ctrl_c_ends_the_answer(tmp_path, monkeypatch):
    class Interrupted(Stream):
        def __iter__(self):
            yield next(super().__iter__())
            raise KeyboardInterrupt

    monkeypatch.setattr("rooflama.model.Stream", Interrupted)
    result = rooflama("run", speaking(tmp_path / "m.gguf", "<x>"), "hi", "--max-new-tokens", "9")
    assert (result.status, result.stdout) == (130, "<x>\n")
    assert "tokens/s" in result.stderr


def test_ctrl_c_while_loading(small, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("rooflama.load", interrupted)
    assert rooflama("run", small, "hi").status == 130
