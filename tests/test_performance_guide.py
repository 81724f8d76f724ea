"""docs/PERFORMANCE.md has the committed figures, and its picture is drawn from them."""

import csv
import re
from pathlib import Path

import pytest

from rooflama.kernels import LAYOUTS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "PERFORMANCE.md").read_text()
FLOATS = ("F32", "F16", "BF16")
SHAPES = ("[28672, 4096]", "[4096, 14336]", "[6144, 4096]", "[4096, 4096]", "[128256, 4096]")
CHUNK_DEPTHS = (2048, 8192, 32768, 65536, 131072)
TOKEN_DEPTHS = (1024, *CHUNK_DEPTHS[1:])


def rows_of(table):
    with (ROOT / "benchmarks" / "results" / table).open(newline="") as file:
        return list(csv.DictReader(file))


def line(*cells):
    return f"| {' | '.join(cells)} |"


def fractions():
    """Per type, then of torch: microseconds of one token and their share of the memory rate, of each shape."""
    found = {(row["case"], row["implementation"]): row for row in rows_of("one_token.csv")}
    types = {name: (name, "rooflama") for name in LAYOUTS if name not in FLOATS}
    types |= {"BF16": ("BF16", "rooflama"), "BF16, torch": ("BF16", "torch bf16")}
    yield line("", *SHAPES)
    for label, (ggml_type, implementation) in types.items():
        rows = [found[f"{ggml_type} {shape} tokens=1", implementation] for shape in SHAPES]
        yield line(label, *(f"{float(row['us_p50']):.1f} ({float(row['of_roofline']):.0%})" for row in rows))


def long_context():
    cases = {}
    for row in rows_of("long_context.csv"):
        cases.setdefault((row["weights"], row["pages"]), {})[row["what"], int(row["depth"])] = row
    for what, depths, digits in (("chunk", CHUNK_DEPTHS, 1), ("token", TOKEN_DEPTHS, 2)):
        for (weights, pages), rows in cases.items():
            found = [rows.get((what, depth)) for depth in depths]
            cells = [f"{float(row['ms']):.{digits}f} ({float(row['of_roofline']):.0%})" if row else "" for row in found]
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


@pytest.mark.parametrize("lines", [fractions, long_context])
def test_the_tables_have_the_committed_figures(lines):
    missing = [line for line in lines() if line not in PAGE]
    assert not missing, "docs/PERFORMANCE.md should have\n" + "\n".join(missing)


def test_the_plan_of_a_long_context_holds():
    rows = rows_of("long_context.csv")
    assert {(row["weights"], row["pages"]) for row in rows} >= {("Q4_K_M", "bfloat16"), ("Q4_K_M", "int8")}
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
