"""docs/PERFORMANCE.md has the committed figures, and its picture is drawn from them."""

import csv
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "PERFORMANCE.md").read_text()
CHUNK_DEPTHS = (2048, 8192, 32768, 65536, 131072)
TOKEN_DEPTHS = (1024, *CHUNK_DEPTHS[1:])


def rows_of(table):
    with (ROOT / "benchmarks" / "results" / table).open(newline="") as file:
        return list(csv.DictReader(file))


def line(*cells):
    return f"| {' | '.join(cells)} |"


def long_context():
    cases = {}
    for row in rows_of("long_context.csv"):
        cases.setdefault((row["weights"], row["pages"]), {})[row["what"], int(row["depth"])] = row
    for what, depths in (("chunk", CHUNK_DEPTHS), ("token", TOKEN_DEPTHS)):
        for (weights, pages), rows in cases.items():
            chosen = [rows[what, depth] for depth in depths]
            cells = [
                f"{float(row['ms']):.{1 if what == 'chunk' else 2}f} ({float(row['of_roofline']):.0%})"
                for row in chosen
            ]
            if what == "chunk":
                seconds = sum(float(row["ms"]) for (kind, _), row in rows.items() if kind == "chunk") / 1e3
                cells.append(f"{seconds:.1f} s")
            yield line(f"{weights}, {pages}", *cells)
    for (weights, pages), rows in cases.items():
        row = next(iter(rows.values()))
        names = ("planned_total", "driver_used", "planned_allocated", "peak_allocated")
        total, driver, allocated, peak = (f"{float(row[f'{name}_mib']):,.0f}" for name in names)
        errors = [f"{abs(float(row[f'{name}_error'])):.2%}" for name in ("total", "allocated")]
        yield line(f"{weights}, {pages}", total, driver, errors[0], allocated, peak, errors[1])


def test_the_tables_have_the_committed_figures():
    missing = [line for line in long_context() if line not in PAGE]
    assert not missing, "docs/PERFORMANCE.md should have\n" + "\n".join(missing)


def test_the_plan_of_a_long_context_holds():
    rows = rows_of("long_context.csv")
    assert {(row["weights"], row["pages"]) for row in rows} >= {("Q4_K_M", "bfloat16"), ("BF16", "bfloat16")}
    for row in rows:
        assert all(abs(float(row[f"{name}_error"])) <= 0.02 for name in ("total", "allocated"))


def shapes(svg):
    """Texts and outlines."""
    return re.findall(r"<text[^>]*>([^<]*)</text>|<path d=\"([^\"]*)\"", svg.read_text())


def test_the_picture_of_long_contexts_is_current(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(ROOT / "docs" / "site")
    import performance

    performance.save(tmp_path)
    committed = ROOT / "docs" / "long_context.svg"
    assert shapes(tmp_path / "long_context.svg") == shapes(committed), "python docs/site/performance.py"
