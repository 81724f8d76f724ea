"""The command ``rooflama chat``: a conversation whose oldest turns are dropped when the context is full."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Any

from .ahead import begin
from .options import Loading, ModelSource, Sampling, SystemMessage, refuse, require_unicode
from .output import note
from .ranks import from_first
from .run import answer, system_message
from .template import TemplateVariables, ToolsFile, template_variables

if TYPE_CHECKING:
    from ..model import Model

Messages = list[dict[str, Any]]


def chat(
    model: ModelSource,
    system: SystemMessage = None,
    variables: TemplateVariables = [],  # noqa: B006  # typer makes a new list
    tools: ToolsFile = None,
    *,
    sampling: Sampling,
    loading: Loading,
) -> None:
    """Talk with MODEL.

    An empty line or Ctrl-D ends the conversation. Ctrl-C ends an answer, or else the program.
    """
    begin(loading.device)
    import rooflama

    options = sampling.keywords()
    chosen = template_variables(variables, tools)
    messages = system_message(system)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # lets input() edit a line and recall earlier ones
    with rooflama.load(model, **loading.keywords()) as loaded:
        while asked := from_first(_ask):
            said = [*messages, {"role": "user", "content": asked}]
            dropped, ids = _fit(loaded, said, chosen, options.get("max_new_tokens"))
            room = loaded.max_context - len(ids)
            if room < 1:
                note(f"not sent: a message of {len(ids)} tokens fills the context of {loaded.max_context}")
                continue
            if dropped:
                turns = "the oldest turn" if dropped == 1 else f"the {dropped} oldest turns"
                note(f"the context of {loaded.max_context} tokens is full: {turns} dropped from the conversation")
            limits = {"max_new_tokens": min(options.get("max_new_tokens", room), room)}
            text, interrupted = answer(loaded.stream(ids, **options | limits))
            if interrupted:
                note("the answer was ended; another Ctrl-C ends the program")
            messages = [*said, {"role": "assistant", "content": text}]


def _ask() -> str:
    """The next message; an empty one ends the conversation."""
    try:
        asked = input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return ""
    except UnicodeDecodeError:
        refuse("a message that is no text", f"standard input is read as {sys.stdin.encoding}", "Convert it")
    return require_unicode(asked, "the message") if asked.strip() else ""


def _fit(model: Model, messages: Messages, variables: dict[str, Any], wanted: int | None) -> tuple[int, list[int]]:
    """Drop the oldest turns from ``messages`` until an answer has room.

    An answer has room if ``wanted`` tokens are left, or a quarter of the context. The system message and the last turn
    stay, however long they are.

    Returns:
        The number of turns dropped, and the tokens of the rest.
    """
    room = min(wanted or model.max_context, max(1, model.max_context // 4))
    dropped = 0
    while True:
        ids = model.tokenizer.encode_chat(messages, **variables)
        turns = [index for index, message in enumerate(messages) if message["role"] == "user"]
        if len(ids) + room <= model.max_context or len(turns) == 1:
            return dropped, ids
        del messages[turns[0] : turns[1]]
        dropped += 1
