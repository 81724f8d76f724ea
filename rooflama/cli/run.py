"""The command ``rooflama run``: one prompt, its answer streamed to standard output or described as JSON."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..json_text import json_text
from .ahead import begin
from .options import Json, Loading, ModelSource, Sampling, SystemMessage, refuse, require_unicode
from .output import aside, note
from .ranks import from_first
from .template import TemplateVariables, ToolsFile, template_variables

if TYPE_CHECKING:
    from ..model import Generation, Model, Stream


def run(
    model: ModelSource,
    prompt: Annotated[str | None, typer.Argument(help="text to continue; -, or a pipe, for standard input")] = None,
    file: Annotated[Path | None, typer.Option(help="read the prompt from this file")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="put the prompt through the model's chat template")] = False,
    system: SystemMessage = None,
    variables: TemplateVariables = [],  # noqa: B006  # typer makes a new list
    tools: ToolsFile = None,
    n: Annotated[int, typer.Option("-n", "--n", help="number of answers")] = 1,
    logprobs: Annotated[
        int | None, typer.Option(help="with --json: log probabilities of each token and of this many of the likeliest")
    ] = None,
    as_json: Json = False,
    *,
    sampling: Sampling,
    loading: Loading,
) -> None:
    """Continue a text, or answer it with --chat.

    The text is streamed to standard output.

    A prompt from a file or standard input loses the line break at its end.
    """
    begin(loading.device)
    import rooflama
    from rooflama.models.memory.amounts import count

    if logprobs is not None and not as_json:
        refuse("--logprobs without --json", "log probabilities are part of the JSON", "Add --json")
    others = ({} if n == 1 else {"n": n}) | ({} if logprobs is None else {"logprobs": logprobs})
    options = sampling.keywords(**others)
    chosen = template_variables(variables, tools, chat=chat)
    if system is not None and not chat:
        refuse("--system without --chat", "only a chat template takes a system message", "Add --chat")
    text = from_first(lambda: _read_prompt(prompt, file))
    started = time.perf_counter()
    with rooflama.load(model, **loading.keywords()) as loaded:
        seconds = time.perf_counter() - started
        ids: str | list[int] = text
        if chat:
            ids = loaded.tokenizer.encode_chat([*system_message(system), {"role": "user", "content": text}], **chosen)
        if as_json or n > 1:
            made = loaded.generate(ids, **options)
            _show(loaded, made if isinstance(made, list) else [made], as_json=as_json)
            return
        stream = loaded.stream(ids, **options)
        if not chat and loaded.tokenizer.chat_templates:
            note("this model has a chat template, and --chat puts the prompt through it")
        _, interrupted = answer(stream)
        timings = stream.timings
        aside(
            f"loaded in {seconds:.1f} s, {count(timings.prompt_tokens, 'prompt token')} in {timings.prefill_s:.2f} s, "
            f"then {timings.decode_tokens_per_s:.1f} tokens/s on {loaded.describe()}"
        )
        if interrupted:
            raise typer.Exit(130)


def answer(stream: Stream) -> tuple[str, bool]:
    """Write an answer to standard output until its end or Ctrl-C. Returns its text, and whether it was interrupted."""
    text = ""
    with _interrupts() as pressed:
        try:
            for piece in stream:
                print(piece, end="", flush=True)
                text += piece
                if pressed:
                    break
        except KeyboardInterrupt:
            pressed.append(signal.SIGINT)
    print(flush=True)
    return text, bool(pressed)


@contextlib.contextmanager
def _interrupts() -> Iterator[list[int]]:
    """A list to which a first Ctrl-C adds its signal; a second one raises KeyboardInterrupt.

    The first must not raise, because an exception that happens to be raised in a finaliser is dropped by Python.
    """
    pressed: list[int] = []

    def handle(number: int, _: object) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    before = signal.getsignal(signal.SIGINT)  # ignored in a program that a shell started in the background
    if before is signal.SIG_IGN or threading.current_thread() is not threading.main_thread():
        yield pressed
        return
    signal.signal(signal.SIGINT, handle)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def system_message(text: str | None) -> list[dict[str, Any]]:
    """A conversation with this system message, or an empty one for None."""
    return [] if text is None else [{"role": "system", "content": require_unicode(text, "--system")}]


def _read_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt: given, from a file, or from standard input. Raises ArgumentError for none, and for no text."""
    if prompt is not None and file is not None:
        refuse("PROMPT and --file", "there is one prompt", "Give one of them")
    if file is not None and str(file) != "-":
        try:
            return file.read_bytes().decode("utf-8").replace("\r\n", "\n").removesuffix("\n")
        except OSError as error:
            refuse(f"--file {file}", f"it must be readable ({error.strerror})", "Check its name")
        except UnicodeDecodeError as error:
            refuse(f"byte {error.start} of --file {file}", "a prompt is UTF-8", "Convert the file to UTF-8")
    if prompt not in (None, "-"):
        return require_unicode(prompt, "PROMPT")
    if prompt is None and file is None and sys.stdin.isatty():
        refuse("no prompt", "there is a prompt to continue", "Give PROMPT, --file FILE, or pipe a text in")
    try:
        return require_unicode(sys.stdin.read().removesuffix("\n"), "standard input")
    except UnicodeDecodeError as error:
        refuse(f"byte {error.start} of standard input", f"it is read as {sys.stdin.encoding}", "Convert it")


def _show(model: Model, made: list[Generation], *, as_json: bool) -> None:
    if as_json:
        facts = {"model": model.name, "runs_on": model.describe()}
        print(json_text(facts | {"generations": [_described(generation) for generation in made]}, indent=2))
        return
    for number, generation in enumerate(made, 1):
        aside(f"answer {number} of {len(made)}:")
        print(generation.text, flush=True)


def _described(generation: Generation) -> dict[str, Any]:
    timings = asdict(generation.timings) | {"decode_tokens_per_s": generation.timings.decode_tokens_per_s}
    logprobs = None if generation.logprobs is None else [entry._asdict() for entry in generation.logprobs]
    return asdict(generation) | {"timings": timings, "logprobs": logprobs}
