"""The command ``rooflama compare``: a function of the user's beside the kernel that it could replace."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..json_text import json_text
from .options import Json, Loading, ModelSource, refuse
from .output import console, note

KernelOption = Annotated[
    str,
    typer.Option("--kernel", metavar="NAME=MODULE:FUNCTION", help="the kernel, and the function to compare with it"),
]


def compare(
    model: ModelSource,
    prompt: Annotated[str | None, typer.Argument(help="text that the model reads; a sentence by default")] = None,
    *,
    kernel: KernelOption,
    plot: Annotated[Path | None, typer.Option(help="draw the errors into this file (.svg, .png, .pdf)")] = None,
    as_json: Json = False,
    loading: Loading,
) -> None:
    """Compare a function of yours with a kernel.

    Every call that MODEL makes is compared: error per layer, tolerance, speed.

    MODULE is imported as Python does, from the current directory too. Exit status 1: an error exceeds its tolerance.
    """
    import rooflama

    name, _, place = kernel.partition("=")
    options: dict[str, Any] = {} if prompt is None else {"prompt": prompt}
    replacement = {name: _imported(kernel, place)}
    with rooflama.swap(**replacement):
        pass  # refuses a name that is no kernel's before the model is loaded
    with rooflama.load(model, **loading.keywords()) as loaded:
        made = rooflama.compare(loaded, **options | replacement)
    if plot is not None:
        made.plot().savefig(plot)
        note(f"{plot} shows the errors")
    if as_json:
        print(json_text(made.to_dict(), indent=2))
    else:
        console().print(made)
    raise typer.Exit(0 if made.first_beyond is None else 1)


def _imported(option: str, place: str) -> Callable[..., Any]:
    module, _, function = place.partition(":")
    if not module or not function:
        refuse(f"--kernel {option}", "it names a kernel, a module and a function", "Write it NAME=MODULE:FUNCTION")
    sys.path.insert(0, "")
    try:
        found = getattr(importlib.import_module(module), function, None)
    except ImportError as error:
        refuse(
            f"--kernel {option}: {error}",
            "the module must be importable",
            "Run the command in the folder of the module",
        )
    finally:
        sys.path.remove("")
    if found is None:
        refuse(f"--kernel {option}", f"{module} must define {function}", "Name a function of the module")
    return found
