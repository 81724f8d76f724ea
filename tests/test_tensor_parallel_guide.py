"""The picture of docs/TENSOR_PARALLEL.md is what the code cuts, and what the page states is so."""

import json
import re
from pathlib import Path

import pytest

from command_line import rooflama
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


def test_a_plan_needs_no_second_process():
    model = str(checkpoint_path())
    done = rooflama("plan", model, "--device", "cuda", "--tensor-parallel", "3", "--json")
    assert json.loads(done.stdout)["ranks"] == 3
    assert "one of 3 ranks: 1 sequence" in rooflama("plan", model, "--device", "cuda", "--tensor-parallel", "3").stdout
    refused = rooflama("plan", model, "--tensor-parallel", "2")
    assert (refused.status, refused.stderr.count("\n")) == (2, 1)
    assert "tensor_parallel counts ranks" in rooflama("plan", model, "--tensor-parallel", "0").stderr


def test_the_refusal_that_the_page_quotes():
    with pytest.raises(ConfigError) as refused:
        plan_memory(checkpoint_path(), device="cuda", tensor_parallel=2)
    start, end = re.search(r"`(on 2 ranks: [^`]*) \.\.\. ([^`]*)`", PAGE).groups()
    assert start in str(refused.value)
    assert str(refused.value).endswith(end)
