"""The compile matrix as a table: its rows, ``docs/compile_matrix.csv``, and the summary for a terminal."""

from __future__ import annotations

import csv
import dataclasses
import re
from pathlib import Path

from timing import read_rows


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table."""

    kernel: str
    target: str
    call: str
    arguments: str
    options: str
    registers: int
    spills: int
    shared_bytes: int
    matrix_instruction: str
    problem: str
    triton: str
    seconds: float = dataclasses.field(default=0.0, compare=False)


COLUMNS = [field.name for field in dataclasses.fields(Row) if field.name not in ("problem", "seconds")]
LAUNCH = COLUMNS[:5]  # what is known without compiling; a row's alone


def write(rows: list[Row], path: Path, pattern: str) -> None:
    """Write ``rows`` in place of the table's rows of kernels whose name matches ``pattern``; "" is every kernel."""
    lines = [row for row in read_rows(path) if not re.search(pattern, row["kernel"])]
    lines += [{column: str(getattr(row, column)) for column in COLUMNS} for row in rows]
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(sorted(lines, key=lambda line: [line[column] for column in LAUNCH]))


def launches_in(path: Path) -> set[tuple[str, ...]]:
    """The ``LAUNCH`` columns of the table's rows."""
    return {tuple(row[column] for column in LAUNCH) for row in read_rows(path)}


def differences(written: set[tuple[str, ...]], launched: set[tuple[str, ...]]) -> list[str]:
    """In words, the launches that are in only one of the two."""
    return [
        f"{reason}: {' '.join(launch[:3])}\n    {launch[3]}\n    {launch[4]}"
        for reason, alone in (("not in the table", launched - written), ("launched no more", written - launched))
        for launch in sorted(alone)
    ]


def summary(rows: list[Row]) -> str:
    """One line per kernel and target: the number of specialisations, and the largest use of each resource."""
    lines = [
        f"{'kernel':34} {'target':7} {'n':>4} {'registers':>9} {'spills':>6} {'shared':>8}  instructions        seconds"
    ]
    for kernel, target in sorted({(row.kernel, row.target) for row in rows}):
        group = [row for row in rows if (row.kernel, row.target) == (kernel, target)]
        instructions = ",".join(sorted({row.matrix_instruction for row in group}))
        lines.append(
            f"{kernel:34} {target:7} {len(group):4} {max(r.registers for r in group):9} "
            f"{max(r.spills for r in group):6} {max(r.shared_bytes for r in group):8}  {instructions:19} "
            f"{sum(r.seconds for r in group):7.1f}"
        )
    return "\n".join(lines)
