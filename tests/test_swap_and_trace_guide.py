"""docs/SWAP_AND_TRACE.md: its script runs, and its table says which kernels a model calls."""

import re
from collections import Counter
from pathlib import Path

import pytest

import rooflama
from demo_oracle import checkpoint_path
from rooflama import swap, trace
from rooflama.kernels.kernel import KERNELS
from whole_checkpoints import write_file

GUIDE = (Path(__file__).parents[1] / "docs" / "SWAP_AND_TRACE.md").read_text()
ROW = re.compile(r"^\| `(\w+)` \| (all|prompt|decoding) \| (.*) \| (.*) \|$", flags=re.MULTILINE)
TOKENS = 3  # drawn: a prompt's pass and two of decoding

pytestmark = pytest.mark.usefixtures("numpy_backend")


def run_script(number):
    script = re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL)[number]
    names = {}
    exec(compile(script, "SWAP_AND_TRACE.md", "exec"), names)
    return names


@pytest.mark.demo_checkpoint
def test_the_comparison_finds_a_plain_norm_exact(capsys):
    checkpoint_path()
    made = run_script(1)["made"]
    assert capsys.readouterr().out.startswith("None ")
    assert made.way == "unfused"
    assert len(made.layers) == 61


@pytest.mark.demo_checkpoint
def test_the_script_prints_a_small_error_per_layer(capsys):
    checkpoint_path()
    run_script(0)
    errors = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert len(errors) == 30
    assert all(0 < error < 1e-5 for error in errors)


def stated(column, num_layers):
    """Calls of each kernel that is called while TOKENS tokens are drawn, by a column of the table."""
    passes = {"all": TOKENS, "prompt": 1, "decoding": TOKENS - 1}
    calls = {}
    for name, kind, *cells in ROW.findall(GUIDE):
        terms = [term.split() for term in cells[column].split(" + ")]
        number = sum((1 if term[0] == "L" else int(term[0])) * (num_layers if "L" in term else 1) for term in terms)
        calls[name] = passes[kind] * number
    return Counter({name: number for name, number in calls.items() if number})


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
def test_a_model_calls_the_kernels_of_the_table(fused, tmp_path):
    calls = Counter()

    def counted(name):
        def call(*args, **kwargs):
            calls[name] += 1
            return KERNELS[name](*args, **kwargs)

        return call

    path = write_file("llama3", tmp_path / "m.gguf")
    with rooflama.load(path, device="cpu", fused=fused, progress=False) as model:
        with swap(**{name: counted(name) for name in KERNELS}):
            model.generate([5, 6, 7], max_new_tokens=TOKENS)
        assert calls == stated(0 if fused else 1, model.config.num_layers)


def test_the_names_of_the_table_can_be_traced(tmp_path):
    rows = re.findall(r"^\| (`[^|]*) \|", GUIDE[GUIDE.index("## What can be traced") :], flags=re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`([^`]*)`", row)]
    assert len(names) == 13
    with rooflama.load(write_file("llama3", tmp_path / "m.gguf"), device="cpu", progress=False) as model:
        traced = trace(model, [5, 6, 7], [re.sub(r"\.3", ".1", name) for name in names])
    assert all(tensor.isfinite().any() for tensor in traced.values())
