"""``rooflama chat``: the conversation, a full context, and Ctrl-C in a real terminal."""

import os
import pty
import select
import signal
import sys
import time

import pytest

from command_line import rooflama
from rooflama.cli.run import answer
from rooflama.loaders.text.tokenizer import Tokenizer
from rooflama.model import Stream
from small_checkpoint import CONTEXT
from speaking_checkpoint import speaking

pytestmark = pytest.mark.usefixtures("numpy_backend")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return speaking(tmp_path_factory.mktemp("chat") / "m.gguf", "<x>")


@pytest.fixture
def conversations(monkeypatch):
    """Each list of messages that goes through the template."""
    seen = []
    encode = Tokenizer.encode_chat

    def recorded(self, messages, **options):
        seen.append([(message["role"], message["content"]) for message in messages])
        return encode(self, messages, **options)

    monkeypatch.setattr(Tokenizer, "encode_chat", recorded)
    return seen


def test_turns_are_remembered(model, conversations):
    result = rooflama("chat", model, "--system", "s", "--max-new-tokens", "2", stdin="a\nb\n\nc\n")
    assert (result.status, result.stdout) == (0, "<x><x>\n" * 2)
    first = [("system", "s"), ("user", "a")]
    assert conversations == [first, [*first, ("assistant", "<x><x>"), ("user", "b")]]


def test_a_full_context_drops_the_oldest_turns_and_says_so(model, conversations):
    """Each turn takes some 40 of 128 tokens, so from the third on one has to go."""
    lines = [letter * 20 for letter in "abcd"]
    result = rooflama("chat", model, "--system", "s", "--max-new-tokens", "4", stdin="\n".join(lines))
    assert result.status == 0, result.stderr
    assert result.stdout == "<x><x><x><x>\n" * 4
    kept = [("user", lines[2]), ("assistant", "<x><x><x><x>"), ("user", lines[3])]
    assert conversations[-1][0] == ("system", "s")
    assert conversations[-1][-3:] == kept[-3:]
    assert ("user", lines[0]) not in conversations[-1]
    assert f"the context of {CONTEXT} tokens is full: the oldest turn dropped" in result.stderr


def test_an_answer_may_fill_the_context(model):
    result = rooflama("chat", model, stdin="a\n")
    assert result.status == 0, result.stderr
    assert 90 < result.stdout.count("<x>") < CONTEXT


def test_a_message_beyond_the_context_is_not_sent(model, conversations):
    result = rooflama("chat", model, "--max-new-tokens", "1", stdin="a\n" + "b" * 300 + "\nc\n")
    assert result.status == 0
    assert "note: not sent: a message of" in result.stderr
    assert conversations[-1] == [("user", "a"), ("assistant", "<x>"), ("user", "c")]


def test_a_message_that_is_no_text(model):
    result = rooflama("chat", model, stdin=b"a\xff\n")
    assert result.status == 2
    assert "error: a message that is no text" in result.stderr


def test_the_answer_so_far_stays_after_ctrl_c(model, conversations, monkeypatch):
    class Interrupted(Stream):
        def __iter__(self):
            yield next(super().__iter__())
            raise KeyboardInterrupt

    monkeypatch.setattr("rooflama.model.Stream", Interrupted)
    result = rooflama("chat", model, stdin="a\nb\n")
    assert (result.status, result.stdout) == (0, "<x>\n<x>\n")
    assert conversations[-1] == [("user", "a"), ("assistant", "<x>"), ("user", "b")]


def test_ctrl_c_twice_in_a_terminal(tmp_path):
    """The first ends an answer of up to 100,000 tokens, the second ends the program."""
    path = speaking(tmp_path / "m.gguf", "<x>", **{"llama.context_length": 100_000})
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process, terminal = pty.fork()
    if process == 0:
        command = [sys.executable, "-m", "rooflama", "chat", path, "--device", "cpu"]
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # else it stays ignored where the tests run in the background
        os.execve(sys.executable, command, environment)
    try:
        _read_until(terminal, b"> ")
        os.write(terminal, b"hi\n")
        _read_until(terminal, b"<x><x>")
        os.write(terminal, b"\x03")
        _read_until(terminal, b"another Ctrl-C ends the program\r\n> ")
        status = _interrupted_until_it_ends(process, terminal)
    finally:
        os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 130


@pytest.fixture
def sigint():
    """As Python sets it up, also where the tests run in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("sigint")
def test_an_interrupt_is_not_lost_in_a_finaliser(capsys):
    """Python drops an exception that is raised in one; Ctrl-C there ends the answer all the same, at its next piece."""

    class Finalised:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    def pieces():
        yield "one"
        Finalised()
        yield " two"
        yield " three"

    assert answer(pieces()) == ("one two", True)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert capsys.readouterr().out == "one two\n"


def test_a_program_that_ignores_interrupts_goes_on_doing_so():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert answer(iter(["one"])) == ("one", False)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def _interrupted_until_it_ends(process, terminal):
    """The exit status. A Ctrl-C between Python's prompt and its read is seen after the read only: press it again.

    Not too soon: a press while the program already ends kills it.
    """
    for _ in range(20):
        os.write(terminal, b"\x03")
        deadline = time.monotonic() + 15
        while time.monotonic() < deadline:
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                return status
            time.sleep(0.02)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    raise AssertionError("Ctrl-C does not end the program")


def _read_until(terminal, expected):
    text = b""
    deadline = time.monotonic() + 60
    while expected not in text:
        ready, _, _ = select.select([terminal], [], [], deadline - time.monotonic())
        assert ready, text
        text += os.read(terminal, 4096)
