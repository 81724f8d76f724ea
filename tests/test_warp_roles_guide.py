"""docs/WARP_ROLES.md and its picture say what the kernel does."""

import re
from pathlib import Path

import pytest

from rooflama.kernels.attention_prefill_hopper_tiles import Rings

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs" / "WARP_ROLES.md").read_text()


def texts(svg):
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg.read_text())


def test_the_picture_is_current(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(ROOT / "docs" / "site")
    import warp_roles

    warp_roles.save(tmp_path)
    drawn = texts(tmp_path / "warp_roles.svg")
    assert drawn == texts(ROOT / "docs" / "warp_roles.svg"), "run python docs/site/warp_roles.py"
    assert {"k_full", "k_empty", "v_full", "v_empty", "turns"} <= set(drawn)


def test_no_consumer_multiplies_before_its_softmax_is_done(monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(ROOT / "docs" / "site")
    import warp_roles

    drawn = list(warp_roles.intervals())
    for one in drawn:
        others = [other for other in drawn if other is not one and other.row == one.row]
        assert all(one.start >= o.start + o.length or one.start + one.length <= o.start for o in others)


def test_files_and_barriers_are_listed():
    files = {path.name for path in (ROOT / "kernels").glob("attention_prefill_*.py")}
    assert set(re.findall(r"^\| `(\w+\.py)`", GUIDE, re.MULTILINE)) == files
    listed = re.findall(r"^\| (`[^|]*) \|", GUIDE.split("## Barriers")[1], re.MULTILINE)
    barriers = {name for line in listed for name in re.findall(r"`(\w+)`", line)}
    assert barriers == {name for name in Rings._fields if name.endswith(("full", "empty", "turns"))}
