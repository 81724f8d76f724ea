"""Options of several commands. A group of options is a dataclass, which a command takes as one argument."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Annotated, Any, NoReturn, get_type_hints

import typer

from . import ranks

ModelSource = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="a .gguf file, a Hugging Face folder, or hf:owner/repo[@revision][:file.gguf] of the Hub"
    ),
]
DeviceName = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N")]
Rope = Annotated[
    str | None,
    typer.Option(metavar="KEY=VALUE,...", help="replace the file's RoPE parameters, e.g. kind=yarn,factor=4"),
]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]
SystemMessage = Annotated[str | None, typer.Option("--system", metavar="TEXT", help="the system message of the chat")]
Option = typer.Option
DTYPES = "dtype of activations: auto, float32, float16, bfloat16"
KV_DTYPES = "dtype of keys and values: auto, float32, float16, bfloat16, fp8, int8"


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How an answer is drawn and when it ends: keyword arguments of ``Model.stream``."""

    max_new_tokens: Annotated[
        int | None, Option(help="end the answer after this many; the model ends it by default")
    ] = None
    temperature: Annotated[float, Option(help="how random the draw is; 0 takes the likeliest token")] = 0.0
    top_k: Annotated[int, Option(help="draw from the k likeliest; 0 is off")] = 0
    top_p: Annotated[float, Option(help="draw from the likeliest that together reach this probability; 1 is off")] = 1.0
    min_p: Annotated[float, Option(help="drop tokens below this share of the highest probability; 0 is off")] = 0.0
    repetition_penalty: Annotated[float, Option(help="make tokens of prompt and answer less likely; 1 is off")] = 1.0
    frequency_penalty: Annotated[float, Option(help="lower a token's logit for each time it was drawn; 0 is off")] = 0.0
    presence_penalty: Annotated[float, Option(help="lower the logit of each token that was drawn; 0 is off")] = 0.0
    logit_bias: Annotated[
        list[str], Option(metavar="ID=VALUE", help="add VALUE to the logit of token ID; repeatable")
    ] = field(default_factory=list)
    seed: Annotated[int | None, Option(help="the same seed draws the same text")] = None
    stop: Annotated[list[str], Option(metavar="TEXT", help="end the answer before this text; repeatable")] = field(
        default_factory=list
    )

    def keywords(self, **others: Any) -> dict[str, Any]:
        """The options that differ from their defaults, and ``others``, checked without loading a model.

        Raises:
            ArgumentError: a value is out of range.
        """
        from ..arguments import RequestOptions

        given = {f.name: getattr(self, f.name) for f in fields(self)}
        changed = {name: value for name, value in given.items() if value != _default(type(self), name)}
        if self.logit_bias:
            changed["logit_bias"] = dict(map(_bias, self.logit_bias))
        RequestOptions.of(changed | others)
        return changed | others


@dataclass(frozen=True, kw_only=True)
class Loading:
    """Device, dtypes and limits of a model: keyword arguments of ``rooflama.load``."""

    device: DeviceName = "auto"
    dtype: Annotated[str, Option(help=DTYPES)] = "auto"
    kv_dtype: Annotated[str, Option(help=KV_DTYPES)] = "auto"
    max_context: Annotated[int | None, Option(help="the most tokens of prompt and answer together")] = None
    rope: Rope = None
    memory_limit: Annotated[str | None, Option(help="memory that the model must fit into, e.g. 24GiB")] = None

    def keywords(self) -> dict[str, Any]:
        """The options, and whether the ranks that torchrun started share the model."""
        return {f.name: getattr(self, f.name) for f in fields(self)} | {"tensor_parallel": ranks.joined()}


def with_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Turn each parameter of ``command`` that is annotated with a dataclass into one option per field."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        if parameter.name in groups:
            parameters += _parameters(groups[parameter.name])
        else:
            parameters.append(parameter.replace(annotation=hints[parameter.name]))

    @functools.wraps(command)
    def flat(**given: Any) -> None:
        made = {name: group(**{f.name: given.pop(f.name) for f in fields(group)}) for name, group in groups.items()}
        command(**given, **made)

    del flat.__wrapped__  # typer would read its annotations
    flat.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    flat.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return flat


def _parameters(group: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            f.name, inspect.Parameter.KEYWORD_ONLY, default=_default(group, f.name), annotation=hints[f.name]
        )
        for f in fields(group)
    ]


def _default(group: Any, name: str) -> Any:
    found = group.__dataclass_fields__[name]
    return found.default_factory() if callable(found.default_factory) else found.default


def _bias(text: str) -> tuple[int, float]:
    token, _, value = text.partition("=")
    try:
        return int(token), float(value)
    except ValueError:
        refuse(f"--logit-bias {text!r}", "it is a token's id and a number", "Write it like 42=-1.5")


def require_unicode(text: str, name: str) -> str:
    """``text``. Raises ArgumentError if it holds bytes that are invalid in the terminal's encoding."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        refuse(f"character {error.start + 1} of {name}", "it must be text in the terminal's encoding", "Correct it")
    return text


def refuse(found: str, rule: str, remedy: str) -> NoReturn:
    """Raise ArgumentError, which is imported here because its import brings torch."""
    from rooflama.models import ArgumentError

    raise ArgumentError(found, rule=rule, remedy=remedy)
