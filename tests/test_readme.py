"""Figures of the README stand in the sources that it names, and the guides' links lead somewhere."""

import csv
import re
import sys
from pathlib import Path

import pytest

from rooflama.cli.commands import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def cells(line):
    return [cell.strip() for cell in line.strip("| \n").split("|")]


def numbers(text):
    return re.findall(r"\d+(?:\.\d+)?", text.replace(",", ""))


def speed_rows():
    section = (ROOT / "README.md").read_text().split("## Speed")[1].split("\n## ")[0]
    header, _, *rows = [cells(line) for line in section.splitlines() if line.startswith("|")]
    assert header == ["what", "rooflama", "best peer", "roofline", "source"]
    return rows


# A row's source is a table of measurements: which of its lines, and which column.
MEASURED = {
    "Product of 1 token": ({"type": "Q4_K", "rows": "28672", "columns": "4096", "tokens": "1"}, "gb_per_s"),
    "Decode attention": ({"kernel": "attention_decode", "case": "32/8 d128 8x32768"}, "gb_per_s"),
    "Prefill attention": ({"kernel": "attention_prefill", "case": "32/8 d128 n=4096"}, "tflop_per_s"),
}


@pytest.mark.parametrize("row", speed_rows(), ids=lambda row: row[0][:20])
def test_figures_of_the_speed_table_stand_in_their_sources(row):
    what, ours, peer, _, link = row
    source = ROOT / re.search(r"\((.*)\)", link).group(1)
    if source.suffix == ".csv":
        (wanted, column) = next(value for key, value in MEASURED.items() if what.startswith(key))
        with source.open(newline="") as file:
            lines = [line for line in csv.DictReader(file) if wanted.items() <= line.items()]
        best = {line.get("implementation", "rooflama"): line[column] for line in reversed(lines)}
        assert numbers(ours) == [best.pop("rooflama")]
        assert numbers(peer) == list(best.values())
    else:
        figures = {*numbers(ours), *numbers(peer)}
        tables = [cells(line) for line in source.read_text().splitlines() if line.startswith("|")]
        assert any(figures <= {cell.replace(",", "") for cell in line} for line in tables), figures


def test_the_speed_table_has_five_rows():
    assert len(speed_rows()) == 5


def test_the_roofline_of_a_decode_step(monkeypatch):
    """docs/PERFORMANCE.md: weights but the embedding table, keys and values, once per step at 3.00 TB/s."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import memory_plan_check as check

    monkeypatch.delitem(sys.modules, "memory_plan_check")
    page = (ROOT / "docs" / "PERFORMANCE.md").read_text()
    section = page.split("## A whole decode step")[1].split("\n## ")[0]
    table = section[section.index("\n|") + 1 :].split("\n\n")[0]
    header, _, *rows = [cells(line) for line in table.splitlines()]
    assert header[-1] == "roofline"
    stated = {row[0]: float(row[-1].replace(",", "")) for row in rows}
    config = check.config_of("Llama-3-8B")
    cached = {"Q4_K_M at 16,384 tokens": (1, 16384), "Q4_K_M, 8 sequences at 1,024 tokens, in total": (8, 1024)}
    names = ["Q4_K_M", *cached, "Q8_0", "Q4_0", "BF16"]
    assert list(stated) == names
    for name in names:
        sequences, tokens = cached.get(name, (1, 0))
        if not name.startswith("Q4_K_M"):
            monkeypatch.setattr(check, "type_of", lambda config, name=name: lambda tensor, shape: name)
        infos = check.ShapesOnly(config).tensors.values()
        weights = sum(info.nbytes for info in infos if info.name != "token_embd.weight")
        num_bytes = weights + sequences * tokens * config.kv_bytes_per_token(2)
        assert stated[name] == pytest.approx(3.00e12 * sequences / num_bytes, abs=0.5), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    for link in links:
        if "://" not in link:
            assert (page.parent / link).exists(), link


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "LOG.md"], ids=lambda page: page.name)
def test_files_that_are_named_exist(page):
    """But for those that a reader is told to write, and for LOG.md, which tells of earlier states."""
    folders = "kernels|models|loaders|rooflama|tests|benchmarks|docs|notebooks"
    named = re.findall(rf"`((?:{folders})/[\w/.-]+\.\w+)`", page.read_text())
    invented = re.compile("NAME|GPU|softcap|granite|gemma2|olmo2")
    assert [name for name in named if not invented.search(name) and not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "LOG.md"], ids=lambda page: page.name)
def test_commands_that_are_named_exist(page):
    code = "\n".join(re.findall(r"```.*?```|`[^`\n]+`", page.read_text(), re.DOTALL))
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"\bmake ([a-z][\w-]*)", code)) <= set(targets)
    commands = [command.name or command.callback.__name__ for command in app.registered_commands]
    assert set(re.findall(r"(?:^|[`/])rooflama ([a-z]\w*)", code, re.MULTILINE)) <= set(commands)
