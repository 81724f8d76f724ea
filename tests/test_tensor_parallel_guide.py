"""The picture of docs/TENSOR_PARALLEL.md is what the code cuts, and what the page states is so."""

import re
from pathlib import Path

import pytest

from demo_oracle import checkpoint_path
from rooflama import ConfigError, plan_memory

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "TENSOR_PARALLEL.md").read_text()

pytestmark = pytest.mark.demo_checkpoint


def shapes(svg):
    """Texts and outlines."""
    return re.findall(r"<text[^>]*>([^<]*)</text>|<path d=\"([^\"]*)\"", svg.read_text())


def test_the_picture_is_current(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    checkpoint_path()
    monkeypatch.syspath_prepend(DOCS / "site")
    import tensor_parallel

    tensor_parallel.save(tmp_path)
    assert shapes(tmp_path / "tensor_parallel.svg") == shapes(DOCS / "tensor_parallel.svg")
    assert tensor_parallel.runs(tensor_parallel.Share(1, 3).qkv_rows(tensor_parallel.demo_config())) == [
        (192, 192),
        (640, 64),
        (832, 64),
    ]


def test_the_refusal_that_the_page_quotes():
    with pytest.raises(ConfigError) as refused:
        plan_memory(checkpoint_path(), device="cuda", tensor_parallel=2)
    start, end = re.search(r"`(on 2 ranks: [^`]*) \.\.\. ([^`]*)`", PAGE).groups()
    assert start in str(refused.value)
    assert str(refused.value).endswith(end)
