"""The commands ``rooflama plan`` and ``rooflama check``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ..json_text import json_text
from . import ranks
from .options import DTYPES, KV_DTYPES, DeviceName, Json, ModelSource, Rope
from .output import console

Limit = Annotated[str | None, typer.Option(help="memory that the model must fit into, e.g. 24GiB")]


def plan(
    model: ModelSource,
    context: Annotated[int | None, typer.Option(help="tokens per sequence; the model's own context by default")] = None,
    sequences: Annotated[int, typer.Option(help="number of sequences at once")] = 1,
    kv_dtype: Annotated[str, typer.Option(help=KV_DTYPES)] = "auto",
    dtype: Annotated[str, typer.Option(help=DTYPES)] = "auto",
    device: DeviceName = "auto",
    limit: Limit = None,
    rope: Rope = None,
    tensor_parallel: Annotated[
        int | None, typer.Option(help="number of ranks (GPUs) that share the model; torchrun's by default, else 1")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show the memory that MODEL needs, without loading it.

    The device need not be in this machine. Exit status 1: the model does not fit.
    """
    from ..planning import plan_memory

    made = plan_memory(
        model,
        context=context,
        sequences=sequences,
        kv_dtype=kv_dtype,
        dtype=dtype,
        device=device,
        limit=limit,
        rope=rope,
        tensor_parallel=ranks.size() if tensor_parallel is None else tensor_parallel,
    )
    if as_json:
        print(json_text(made.to_dict(), indent=2))
    else:
        console().print(made)
    raise typer.Exit(0 if made.fits else 1)


def check(
    model: ModelSource,
    device: DeviceName = "auto",
    limit: Limit = None,
    as_json: Json = False,
    report: Annotated[Path | None, typer.Option(help="also write this file, for a bug report")] = None,
) -> None:
    """Run the integration checklist on MODEL.

    Exit status 0: all passed, 1: warnings, 2: a failure.
    """
    from rooflama.models.memory.amounts import parse_bytes

    from ..checks.checklist import Report, as_line
    from ..checks.checklist import check as run_checks

    if report is not None:
        ranks.from_first(partial(_require_writable, report, model))
        report = report if ranks.is_first() else None
    screen = console()

    def show(so_far: Report) -> None:
        for line in () if as_json else so_far.results[-1:]:
            screen.print(as_line(line))
        if report is not None:  # after each line, so that a killed run leaves a report
            report.write_text(so_far.to_markdown(), encoding="utf-8")

    result = run_checks(
        model,
        device=device,
        limit=None if limit is None else parse_bytes(limit),
        tensor_parallel=ranks.joined(),
        on_progress=show,
    )
    if as_json:
        print(json_text(result.to_dict(), indent=2))
    else:
        screen.print(result.verdict, style="bold")
    raise typer.Exit(result.exit_status)


def _require_writable(report: Path, model: str) -> None:
    """Raise ArgumentError if the report cannot be written, or would replace a file of the checkpoint."""
    from rooflama.models import ArgumentError

    try:
        if report.exists() and report.resolve().is_relative_to(Path(model).resolve()):
            found = "a file of the checkpoint itself"
        elif report.exists() and not report.is_file():
            found = "there, and no file"
        else:
            _try_writing(report.resolve())
            return
    except OSError as error:
        found = f"cannot be written ({error.strerror})"
    raise ArgumentError(
        f"--report {report}: {found}",
        rule="a report is written to a file of its own",
        remedy="Name a new file, such as report.md",
    )


def _try_writing(file: Path) -> None:
    """Raise OSError if ``file`` cannot be written. Its content does not change."""
    is_new = not file.exists()
    file.open("a").close()
    if is_new:
        file.unlink()
