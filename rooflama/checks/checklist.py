"""The integration checklist as a program: everything that must hold before a checkpoint's output can be trusted.

Checks run in order. The result of each is PASS, WARN or FAIL with a reason, or SKIP if a check that it needs has
failed. docs/LLAMA_INTEGRATION_CHECKLIST.md describes the same list for people.
"""

from __future__ import annotations

import hashlib
import os
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text
from torch.distributed import ProcessGroup

from rooflama.kernels import RooflamaError

from ..environment import facts
from ..json_text import json_text
from . import file_checks, run_checks

Status = Literal["PASS", "WARN", "FAIL", "SKIP"]
STYLES = {"PASS": "green", "WARN": "yellow", "FAIL": "bold red", "SKIP": "dim"}


class Check(NamedTuple):
    """One line of the list: its name, the checks that must not have failed, and the function that runs it."""

    name: str
    needs: tuple[str, ...]
    run: Callable[[file_checks.Subject], file_checks.Finding]


CHECKS = (
    Check("structure", (), file_checks.structure),
    Check("config", ("structure",), file_checks.config),
    Check("tensors", ("config",), file_checks.tensors),
    Check("layout", ("tensors",), file_checks.layout),
    Check("weights", ("structure",), file_checks.weights),
    Check("rope", ("config",), file_checks.rope),
    Check("tokenizer", ("structure",), file_checks.tokenizer),
    Check("chat template", ("tokenizer",), file_checks.chat_template),
    Check("memory", ("tensors",), run_checks.memory),
    Check("forward", ("memory", "weights", "tokenizer"), run_checks.forward),
    Check("generation", ("forward",), run_checks.generation),
)


@dataclass(frozen=True)
class Result:
    """One line of the report: the check, its status, the reason, its duration, and details for a bug report."""

    name: str
    status: Status
    reason: str
    seconds: float = 0.0
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """The lines for one checkpoint, all or as far as they came. Shows itself in a terminal and in Jupyter."""

    name: str
    paths: tuple[Path, ...]
    results: tuple[Result, ...]

    @property
    def exit_status(self) -> int:
        """0: all passed. 1: warnings. 2: a failure."""
        found = {result.status for result in self.results}
        return 2 if "FAIL" in found else 1 if "WARN" in found else 0

    def of(self, name: str) -> Result:
        return next(result for result in self.results if result.name == name)

    def to_dict(self) -> dict[str, Any]:
        return {
            "file": file_facts(self.name, self.paths),
            "exit_status": self.exit_status,
            "environment": dict(facts()),
            "checks": [
                {"name": r.name, "status": r.status, "reason": r.reason, "seconds": round(r.seconds, 3), **r.details}
                for r in self.results
            ],
        }

    def to_markdown(self) -> str:
        """The report for an issue: everything that a bug report needs, and no path and no weights."""
        shown = self.to_dict()
        lines = [
            f"# rooflama check: {shown['file']['name']}",
            "",
            "| check | status | seconds | reason |",
            "|--|--|--|--|",
        ]
        for result in self.results:
            reason = result.reason.replace("|", "\\|").replace("\n", " ")
            lines.append(f"| {result.name} | {result.status} | {result.seconds:.1f} | {reason} |")
        if len(self.results) < len(CHECKS):
            lines.append(f"| {CHECKS[len(self.results)].name} | | | begun; the run ended before it did |")
        for title, table in (("File", shown["file"]), ("Environment", shown["environment"])):
            lines += ["", f"## {title}", "", *(f"- {label}: {value}" for label, value in table.items())]
        lines += ["", "## Details", ""]
        for result in self.results:
            if result.details:
                body = json_text(result.details, indent=1)
                lines += [
                    f"<details><summary>{result.name}</summary>",
                    "",
                    "```json",
                    body,
                    "```",
                    "",
                    "</details>",
                    "",
                ]
        return "\n".join(lines)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from map(as_line, self.results)
        yield Text(self.verdict, style="bold")

    def _repr_html_(self) -> str:
        from html import escape

        rows = "".join(
            f"<tr><td><b>{r.status}</b></td><td>{escape(r.name)}</td><td>{escape(r.reason)}</td></tr>"
            for r in self.results
        )
        return f"<table style='text-align:left'>{rows}</table><p><b>{escape(self.verdict)}</b></p>"

    @property
    def verdict(self) -> str:
        counts = {status: sum(r.status == status for r in self.results) for status in STYLES}
        said = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
        return f"{self.name}: {said}, in {sum(r.seconds for r in self.results):.1f} s"


def as_line(result: Result) -> Table:
    """A result as one row."""
    row = Table.grid(padding=(0, 2, 0, 0))
    row.add_column(width=4)
    row.add_column(width=max(len(check.name) for check in CHECKS))
    row.add_column()
    row.add_row(Text(result.status, style=STYLES[result.status]), Text(result.name, style="bold"), Text(result.reason))
    return row


def file_facts(name: str, paths: tuple[Path, ...]) -> dict[str, Any]:
    """Name, size, and a hash of the first mebibyte of each file, which holds the metadata."""
    if not paths:
        return {"name": name, "error": "not opened"}
    digest = hashlib.sha256()
    try:
        for path in paths:
            with path.open("rb") as file:
                digest.update(file.read(2**20))
        size = sum(path.stat().st_size for path in paths)
    except OSError as error:
        return {"name": name, "error": error.strerror}
    return {"name": name, "files": len(paths), "bytes": size, "sha256 of the first MiB": digest.hexdigest()}


def check(
    path: str | os.PathLike[str],
    *,
    device: str = "auto",
    limit: int | None = None,
    tensor_parallel: bool | ProcessGroup = False,
    on_progress: Callable[[Report], None] | None = None,
) -> Report:
    """Run the checklist on a checkpoint.

    Args:
        path: a checkpoint as for ``load``.
        device: where to run it, as for ``load``.
        limit: bytes that the model must fit into; None for the device's free memory.
        tensor_parallel: the ranks that share the model, as for ``load``. Each gets a report.
        on_progress: called before the first line and after each, with the report so far.

    Nothing is raised for faults of the checkpoint; the report names them.
    """
    tell = on_progress or (lambda report: None)
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # the checks "structure", "config" and "tokenizer" report warnings
        subject = file_checks.Subject(os.fspath(path), device, limit, stack, tensor_parallel)
        tell(report := Report(subject.name, (), ()))
        for item in CHECKS:
            result = _run(item, subject, {r.name: r.status for r in report.results})
            tell(report := Report(subject.name, subject.paths, (*report.results, result)))
    return report


def _run(item: Check, subject: file_checks.Subject, before: dict[str, Status]) -> Result:
    missing = [name for name in item.needs if before[name] in ("FAIL", "SKIP")]
    if missing:
        return Result(item.name, "SKIP", f"needs {' and '.join(missing)}")
    started = time.perf_counter()
    try:
        found = item.run(subject)
        status, reason, details = found.status, subject.without_path(found.reason), found.details
    except RooflamaError as error:
        reason = subject.without_path(str(error))
        status, details = "FAIL", {"error": type(error).__name__}
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # the list must go on; panics of the tokenizers library are BaseExceptions
        said = subject.without_path(str(error)).replace(str(Path.home()), "~")
        status, reason = "FAIL", f"unexpected {type(error).__name__}: {said}; please report it"
        frames = traceback.extract_tb(error.__traceback__)
        details = {"traceback": [f"{Path(f.filename).name}:{f.lineno} in {f.name}: {f.line}" for f in frames]}
    return Result(item.name, status, reason, time.perf_counter() - started, details)
