"""The picture of the roofline is current, shows what was measured, and comes out the same each time."""

import csv
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from command_line import rooflama
from rooflama.kernel_card import MEASUREMENTS
from rooflama.roofline import Measured, measurements, save_picture, table

PICTURE = Path(__file__).parents[1] / "docs" / "roofline.svg"


def drawn(path, cases):
    save_picture(cases, path)
    return path.read_text(encoding="utf-8")


def description(svg):
    return ElementTree.fromstring(svg).find(".//{http://purl.org/dc/elements/1.1/}description").text


def texts(svg):
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def test_the_committed_picture_is_current(tmp_path):
    """Another version of matplotlib may place strokes otherwise; what they stand for may not differ."""
    pytest.importorskip("matplotlib")
    committed = PICTURE.read_text(encoding="utf-8")
    now = drawn(tmp_path / "now.svg", measurements())
    remedy = "run make roofline"
    assert description(committed) == description(now) == table(measurements()), remedy
    assert texts(committed) == texts(now), remedy
    (made_by, makes) = (re.search(r"Matplotlib v\S+", svg).group() for svg in (committed, now))
    if made_by == makes:
        assert committed == now, remedy


def test_every_measured_case_is_shown():
    with MEASUREMENTS.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["implementation"] == "rooflama"]
    shown = {(case.kernel, case.case): case for case in measurements()}
    assert len(rows) == len(shown)
    for row in rows:
        case = shown[row["kernel"], row["case"]]
        assert case.microseconds["rooflama"] == float(row["us_p50"])
        assert case.fractions["rooflama"] == pytest.approx(float(row["of_roofline"]), abs=0.006)
        assert row["commit"] in case.run


def test_a_wheel_has_the_same_figures(tmp_path, monkeypatch):
    here = table(measurements())
    for name in ("COMPILE_MATRIX", "MEASUREMENTS"):
        monkeypatch.setattr(f"rooflama.kernel_card.{name}", tmp_path / "not in a wheel")
    monkeypatch.setattr("rooflama.kernel_card.SHIPPED", PICTURE.parent / "kernels" / "tables.json")
    assert table(measurements()) == here


def bars(svg):
    """The right end of each bar, as drawn: the blue rectangles."""
    return [
        float(re.search(r"L ([\d.]+) ", path).group(1))
        for path in re.findall(r'<path d="([^"]*)"[^>]*style="fill: #4878a8"', svg)
    ]


def test_longer_bars_for_more_of_the_roofline_and_unmeasured_kernels_are_named(tmp_path):
    pytest.importorskip("matplotlib")
    run = "a GPU, 2026-01-01"
    cases = [
        Measured("norm", f"case {percent}", {"rooflama": percent / 100, "other": 1.0}, {"rooflama": 1.0}, run)
        for percent in (20, 40, 80)
    ]
    svg = drawn(tmp_path / "new.svg", cases)
    first, second, third = bars(svg)
    assert third - second == pytest.approx(2 * (second - first), rel=1e-3)
    assert {"norm", "case 20", "other"} <= set(texts(svg))
    (foot,) = (text for text in texts(svg) if text.startswith(f"Measured on {run}. Not measured yet: "))
    assert "sampling" in foot
    assert "norm" not in foot
    assert not any("More than 100%" in text for text in texts(svg))


def test_the_table_names_the_fastest_peer():
    case = Measured("norm", "c", {"rooflama": 0.5, "a": 0.4, "b": 0.8}, {"rooflama": 8.0, "a": 10.0, "b": 5.0}, "here")
    header, line, _, run, missing = table([case]).splitlines()
    assert " ".join(header.split()) == "kernel case us of roofline best peer us of roofline run"
    assert line.split() == ["norm", "c", "8.00", "50%", "b", "5.00", "80%", "1"]
    assert run == "run 1: here"
    assert missing.startswith("Not measured yet: all_reduce, attention_decode, ")


def test_the_command_prints_into_a_pipe_and_draws_where_it_is_told(tmp_path):
    pytest.importorskip("matplotlib")
    assert rooflama("roofline").stdout == rooflama("roofline", "--text").stdout == table(measurements())
    path = tmp_path / "picture.svg"
    result = rooflama("roofline", "--out", str(path))
    assert (result.status, result.stdout) == (0, "")
    assert description(path.read_text(encoding="utf-8")) == table(measurements())


def test_what_keeps_it_from_drawing_is_said(tmp_path, monkeypatch):
    nowhere = rooflama("roofline", "--out", str(tmp_path / "none" / "picture.svg"))
    assert nowhere.status == 2
    assert "cannot be written (No such file or directory)" in nowhere.stderr
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    missing = rooflama("roofline", "--out", str(tmp_path / "picture.svg"))
    assert missing.status == 2
    assert "matplotlib is not installed" in missing.stderr
    assert "pip install 'rooflama[bench]'" in missing.stderr
