"""rooflama.compare: errors of each layer against the definition, their tolerance, drift and speed."""

import builtins
import io
import json

import pytest

import rooflama
from command_line import rooflama as command
from rooflama import ArgumentError, KernelInputError, RooflamaError, compare, kernels
from rooflama.kernels.kernel import KERNELS
from small_checkpoint import LAYERS, write_small
from whole_checkpoints import write_file

PROMPT = "ab ab ab"

pytestmark = pytest.mark.usefixtures("numpy_backend", "quick")


@pytest.fixture
def quick(monkeypatch):
    """Timings of a few milliseconds."""
    from rooflama import comparing

    monkeypatch.setattr(comparing, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(comparing, "LEAST_RUNS", 2)


@pytest.fixture
def kv_dtype():
    return "float32"


@pytest.fixture
def model(kv_dtype, tmp_path):
    path = write_small(tmp_path / "m.gguf")
    with rooflama.load(path, device="cpu", kv_dtype=kv_dtype, progress=False) as model:
        yield model


def same(name):
    def mine(*args, **kwargs):
        return KERNELS[name](*args, **kwargs)

    return mine


def off_in_one_call(name, number, factor=1.01):
    """The kernel, but for results or writes of call ``number``, which are too large."""
    calls = iter(range(1000))

    def mine(*args, **kwargs):
        result = KERNELS[name](*args, **kwargs)
        if next(calls) != number:
            return result
        if isinstance(result, tuple):
            return (result[0] * factor, *result[1:])
        return result * factor

    return mine


# one_shot_sum runs on several devices at once.
COMPARED = [name for name in kernels.__all__ if name in KERNELS and name != "one_shot_sum"]
ELSEWHERE = {
    **dict.fromkeys(["rms_norm", "rope", "write_kv", "swiglu"], "unfused"),
    **dict.fromkeys(
        [
            "add_rms_norm",
            "copy_pages",
            "dequantize",
            "gather_kv",
            "geglu",
            "next_slots",
            "penalise",
            "sample",
            "sum_parts",
        ],
        "own tensors",
    ),
}


@pytest.mark.parametrize("kv_dtype", ["float32", "int8", "fp8"])
@pytest.mark.parametrize("name", COMPARED)
def test_a_kernel_is_within_its_own_tolerance(name, model):
    made = compare(model, prompt=PROMPT, **{name: same(name)})
    assert made.first_beyond is None
    assert made.way == ELSEWHERE.get(name, "as loaded")
    layers = {row.layer for row in made.layers}
    outside = {"embedding", "next_slots", "penalise", "sample"}
    assert layers == {None} if name in outside else layers - {None} == set(range(LAYERS))
    assert all(row.error == row.own_error for row in made.layers)
    assert all(row.tolerance > row.own_error or name in ("next_slots", "sample") for row in made.layers)
    assert made.same_token
    assert not any(made.drift.values())
    assert all(speed.kernel > 0 and speed.replacement > 0 for speed in made.speeds.values())
    free = model.runner.cache.pool.num_free
    assert free == len(model.runner.cache.pool.references)


def test_a_pair_of_products_where_the_model_has_none(tmp_path):
    """All of its projections have one type."""
    with rooflama.load(write_file("llama3", tmp_path / "m.gguf"), device="cpu", progress=False) as model:
        made = compare(model, prompt=[5, 6, 7], quantized_matmul_pair=same("quantized_matmul_pair"))
        assert made.way == "own tensors"
        assert made.first_beyond is None
        assert {row.layer for row in made.layers} == set(range(model.config.num_layers))


@pytest.mark.parametrize(
    ("name", "call", "phase", "layer"),
    [
        ("attention_prefill", 1, "prompt", 1),
        ("attention_decode", 0, "decoding", 0),
        ("rms_norm", 2, "prompt", 1),
        ("quantized_matmul", 0, "prompt", 0),
        ("rope_and_cache_write", 3, "decoding", 1),
        ("embedding", 1, "decoding", None),
        ("add_rms_norm", 1, "own tensors", 1),
    ],
)
def test_the_first_layer_that_is_off_is_named(name, call, phase, layer, model):
    made = compare(model, prompt=PROMPT, **{name: off_in_one_call(name, call)})
    beyond = made.first_beyond
    assert (beyond.phase, beyond.layer) == (phase, layer)
    assert sum(row.is_beyond for row in made.layers) == 1
    assert 0.005 < beyond.error < 0.02
    assert f"{phase}" in dict(made.rows())["beyond the tolerance"]


def test_what_a_replacement_writes_is_compared(model):
    def wrong_place(k, v, k_pages, v_pages, slot_mapping, *rest, **scales):
        KERNELS["write_kv"](k, v, k_pages, v_pages, slot_mapping ^ 1, *rest, **scales)

    def no_writes(*args, **kwargs):
        pass

    for mine in (wrong_place, no_writes):
        made = compare(model, prompt=PROMPT, write_kv=mine)
        assert all(row.is_beyond for row in made.layers)
    assert compare(model, prompt=PROMPT, sample=lambda *a, **k: KERNELS["sample"](*a, **k) + 1).first_beyond


def test_drift_accumulates_where_errors_do_not(model):
    def coarse(*args, **kwargs):
        out, lse = KERNELS["attention_prefill"](*args, **kwargs)
        return out.half().float(), lse

    made = compare(model, prompt=PROMPT, attention_prefill=coarse)
    assert made.drift["prompt", 0] > 0
    assert all(1e-5 < row.error < 1e-3 for row in made.layers)


def test_a_result_that_is_left_out_is_not_compared(model):
    def no_lse(*args, **kwargs):
        return KERNELS["attention_decode"](*args, **kwargs)[0], None

    assert compare(model, prompt=PROMPT, attention_decode=no_lse).first_beyond is None


def test_nan_is_beyond_every_tolerance(model):
    made = compare(model, prompt=PROMPT, rms_norm=lambda x, weight, eps: x * float("nan"))
    assert all(row.is_beyond for row in made.layers)


def test_a_prompt_of_one_token_is_a_step_of_decoding(model):
    made = compare(model, prompt=[5], quantized_matmul=same("quantized_matmul"))
    assert {row.phase for row in made.layers} == {"decoding"}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ArgumentError, "0 replacements: one comparison is of one kernel"),
        ({"rope": same("rope"), "swiglu": same("swiglu")}, ArgumentError, "2 replacements"),
        ({"rop": same("rope")}, KernelInputError, "no kernel is named rop"),
        ({"rope": 3}, KernelInputError, "a replacement is callable"),
        ({"rope": lambda *a, **k: None}, ArgumentError, "a replacement that returns nothing"),
        ({"rope": lambda x, *a, **k: x[:1]}, ArgumentError, r"result 0 of the replacement is \[1, .*: rope returns \["),
        ({"rope": lambda x, *a, **k: x.half()}, ArgumentError, r"torch.float16: rope returns .* torch.float32"),
        ({"rope": same("rope"), "prompt": []}, ArgumentError, "prompt"),
    ],
)
def test_what_cannot_be_compared_is_refused(arguments, error, message, model):
    with pytest.raises(error, match=message):
        compare(model, **arguments)


def test_a_kernel_that_no_pass_calls_is_refused(model):
    with pytest.raises(ArgumentError, match=r"one_shot_sum with .*no pass of this model makes one"):
        compare(model, one_shot_sum=same("one_shot_sum"))


def test_it_shows_itself(model):
    from rich.console import Console

    made = compare(model, prompt=PROMPT, rms_norm=off_in_one_call("rms_norm", 0))
    printed = io.StringIO()
    Console(width=300, file=printed).print(made)
    assert "unfused passes (fused=False)" in printed.getvalue()
    assert [line.split()[:2] for line in printed.getvalue().splitlines() if line.rstrip().endswith("beyond")] == [
        ["prompt", "0"]
    ]
    html = made._repr_html_()
    assert html.count("<tr") == len(made.rows()) + 1 + len(made.layers)
    assert html.count("#b00020") == 1


def test_the_picture_shows_both_passes(model):
    pytest.importorskip("matplotlib")
    figure = compare(model, prompt=PROMPT, quantized_matmul=same("quantized_matmul")).plot()
    assert [axes.get_title() for axes in figure.axes] == ["prompt", "decoding"]
    errors, tolerance, *_ = figure.axes[1].lines
    assert list(errors.get_xdata()) == [*range(LAYERS), -1]
    assert (errors.get_ydata() < tolerance.get_ydata()).all()


def test_without_matplotlib_the_error_says_how_to_get_it(model, monkeypatch):
    made = compare(model, prompt=PROMPT, rope=same("rope"))
    plain = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return plain(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(RooflamaError, match=r"matplotlib is not installed.*pip install 'rooflama\[bench\]'"):
        made.plot()


def test_the_command(tmp_path, monkeypatch):
    path = write_small(tmp_path / "m.gguf")
    (tmp_path / "theirs.py").write_text(
        "from rooflama.kernels import rms_norm\n"
        "def right(x, weight, eps):\n    return rms_norm(x, weight, eps)\n"
        "def wrong(x, weight, eps):\n    return rms_norm(x, weight, eps) * 1.01\n"
    )
    monkeypatch.chdir(tmp_path)
    run = ["compare", str(path), PROMPT, "--device", "cpu", "--kernel"]
    for function, status in (("right", 0), ("wrong", 1)):
        result = command(*run, f"rms_norm=theirs:{function}", "--json")
        assert result.status == status, result.stderr
        made = json.loads(result.stdout)
        assert made["replacement"] == function
        assert any(layer["is_beyond"] for layer in made["layers"]) == bool(status)
    assert "1.0e-02" in command(*run, "rms_norm=theirs:wrong", "--plot", "errors.png").stdout
    assert (tmp_path / "errors.png").stat().st_size > 1000
    for wrong, message in (
        ("rms_norm", "NAME=MODULE:FUNCTION"),
        ("rms_norm=nowhere:f", "nowhere"),
        ("rms_norm=theirs:f", "theirs must define f"),
        ("norm=theirs:right", "no kernel is named norm"),
    ):
        result = command(*run, wrong)
        assert result.status == 2
        assert message in result.stderr
    assert "no kernel is named norm" in command("compare", "nowhere.gguf", "--kernel", "norm=theirs:right").stderr
