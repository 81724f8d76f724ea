"""The command ``rooflama warm``: the kernels of a model, compiled ahead."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import ranks
from .options import DTYPES, KV_DTYPES, DeviceName, ModelSource, Rope, refuse
from .output import console

Target = Annotated[str | None, typer.Option(help="a GPU that need not be here: sm_90, gfx942; --device by default")]


def warm(
    model: ModelSource,
    target: Target = None,
    max_sequences: Annotated[int, typer.Option(help="the most sequences that will decode together")] = 1,
    device: DeviceName = "auto",
    dtype: Annotated[str, typer.Option(help=DTYPES)] = "auto",
    kv_dtype: Annotated[str, typer.Option(help=KV_DTYPES)] = "auto",
    max_context: Annotated[int | None, typer.Option(help="the most tokens of prompt and answer together")] = None,
    rope: Rope = None,
) -> None:
    """Compile the kernels that MODEL needs.

    Only its header is read. The kernels go into Triton's cache, the folder TRITON_CACHE_DIR. A later process with
    the same options finds them there.
    """
    import rooflama

    if ranks.joined():
        refuse("warm by ranks of torchrun", "ranks compile what they run", "Start it without torchrun, or not at all")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    errors = Console(stderr=True)
    with Progress(*columns, console=errors, disable=not errors.is_terminal, transient=True) as bar:
        task = bar.add_task("compiling kernels", total=None)
        made = rooflama.warm(
            model,
            target=target,
            max_sequences=max_sequences,
            device=device,
            dtype=dtype,
            kv_dtype=kv_dtype,
            max_context=max_context,
            rope=rope,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    console().print(made)
