"""The memory plan: worked examples whose numbers were found elsewhere, what a load really holds, and what fits."""

import io
import re
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import rooflama
from model_shapes import SHAPES, config_of, type_rule
from rooflama import ArgumentError, demo_checkpoint, plan_memory
from rooflama.kernels import LAYOUTS, reference, use_backend
from rooflama.loaders.device import DeviceUnavailable
from rooflama.loaders.gguf import read_gguf
from rooflama.loaders.gguf.repack import repack
from rooflama.loaders.gguf.types import TYPE_SIZES, row_nbytes
from rooflama.loaders.opening import UnknownCheckpointError
from rooflama.models import (
    CheckpointReader,
    adapter_for,
    checkpoint_weights,
)
from rooflama.models.memory import terms
from rooflama.models.memory.amounts import parse_bytes
from rooflama.models.memory.weights import plane_shapes
from small_checkpoint import write_small

GIB, MIB = 2**30, 2**20

# GiB of F16, Q8_0, Q4_0 and Q4_K_M files as llama.cpp makes them, and K/V bytes a token in 16 bits.
WEIGHTS = {
    "Llama-2-7B": ("12.552", "6.669", "3.562", "3.800", 524288),
    "Llama-2-13B": ("24.245", "12.881", "6.859", "7.325", 819200),
    "Llama-2-70B": ("128.48", "68.26", "36.20", "38.58", 327680),
    "Llama-3-8B": ("14.958", "7.947", "4.334", "4.575", 131072),
    "Llama-3-70B": ("131.42", "69.82", "37.22", "39.59", 327680),
    "Llama-3.2-1B": ("2.302", "1.223", "0.711", "0.745", 32768),
    "Llama-3.2-3B": ("5.985", "3.180", "1.778", "1.873", 114688),
    "Qwen2.5-0.5B": ("0.920", "0.489", "0.322", "0.365", 12288),
    "Qwen2.5-1.5B": ("2.876", "1.528", "0.865", "0.913", 28672),
    "Qwen2.5-7B": ("14.186", "7.537", "4.122", "4.356", 57344),
    "Qwen2.5-14B": ("27.513", "14.618", "7.927", "8.365", 196608),
    "Qwen2.5-72B": ("135.43", "71.95", "38.39", "44.15", 327680),
    "Qwen3-0.6B": ("1.110", "0.590", "0.350", "0.364", 114688),
    "Qwen3-8B": ("15.257", "8.106", "4.441", "4.677", 147456),
    "Phi-3-mini": ("7.118", "3.782", "2.026", "2.228", 393216),
    "Phi-3-medium": ("26.004", "13.815", "7.354", "7.978", 204800),
    "TinyLlama": ("2.049", "1.089", "0.592", "0.621", 22528),
    "SmolLM2-135M": ("0.251", "0.133", "0.084", "0.097", 23040),
    "SmolLM2-1.7B": ("3.188", "1.694", "0.921", "0.981", 196608),
}

# GiB of Q4_K_M weights with the K/V of one sequence, in 16 bits and in 8 bits without scales.
TOTALS = {
    "Llama-2-7B": {4096: ("5.80", "4.80"), 32768: ("19.8", "11.8"), 131072: ("67.8", "35.8")},
    "Llama-3-8B": {4096: ("5.08", None), 32768: ("8.58", "6.58"), 131072: ("20.6", "12.6")},
    "Qwen2.5-7B": {4096: ("4.57", None), 32768: ("6.11", "5.23"), 131072: ("11.4", "7.86")},
    "Phi-3-mini": {4096: ("3.73", None), 32768: ("14.2", "8.23"), 131072: ("50.2", "26.2")},
}


def digits(value: float, printed: str) -> str:
    """``value`` with as many decimals as ``printed``."""
    return f"{value:.{len(printed.partition('.')[2])}f}"


@pytest.mark.parametrize("mix", ["F16", "Q8_0", "Q4_0", "Q4_K_M"])
@pytest.mark.parametrize("name", SHAPES)
def test_weights_as_stored(name, mix):
    printed = WEIGHTS[name][["F16", "Q8_0", "Q4_0", "Q4_K_M"].index(mix)]
    plan = plan_memory(config_of(name), context=4096, device="cuda", weight_types=type_rule(name, mix))
    assert digits(sum(plan.weights.stored.values()) / GIB, printed) == printed


@pytest.mark.parametrize("name", SHAPES)
def test_kv_bytes_a_token(name):
    config = config_of(name)
    assert terms.kv_token_bytes(config, torch.float16) == WEIGHTS[name][-1]
    assert terms.kv_token_bytes(config, torch.float32) == 2 * WEIGHTS[name][-1]
    scales = 2 * 4 * config.num_layers * config.num_kv_heads
    for codes in (torch.int8, torch.float8_e4m3fn):
        assert terms.kv_token_bytes(config, codes) == WEIGHTS[name][-1] // 2 + scales


@pytest.mark.parametrize("name", TOTALS)
@pytest.mark.parametrize("context", [4096, 32768, 131072])
def test_weights_with_keys_and_values(name, context):
    sixteen, eight = TOTALS[name][context]
    config, rule = config_of(name), type_rule(name, "Q4_K_M")
    plan = plan_memory(config, context=context, device="cuda", kv_dtype="float16", weight_types=rule)
    kv = plan.bytes_of("keys and values")
    assert digits((sum(plan.weights.stored.values()) + kv) / GIB, sixteen) == sixteen
    if eight is not None:
        codes = plan.but(kv_dtype=torch.int8).bytes_of("keys and values")
        scales = context * 2 * 4 * config.num_layers * config.num_kv_heads
        assert digits((sum(plan.weights.stored.values()) + codes - scales) / GIB, eight) == eight


def test_known_kv_pools():
    """Llama-2-7B at 4,096 tokens holds 2 GiB of keys and values, in 64 pages of 64 tokens and not a token to spare."""
    plan = plan_memory(config_of("Llama-2-7B"), context=4096, device="cuda", kv_dtype="float16")
    assert plan.num_pages == 64
    assert {line.name: line.nbytes for line in plan.lines if line.group == "keys and values"} == {"tokens": 2 * GIB}
    spare = {line.name: line.nbytes for line in plan.but(context=4097).lines}["rest of last pages"]
    assert spare == 63 * 524288


@given(kind=st.sampled_from(sorted(LAYOUTS)), rows=st.integers(1, 4), blocks=st.integers(1, 3))
def test_planes_are_those_of_repack(kind, rows, blocks):
    columns = blocks * LAYOUTS[kind].quant_block
    raw = np.zeros((rows, row_nbytes(kind, columns)), np.uint8)
    repacked = repack(raw, kind, columns)
    assert [(tuple(p.shape), p.dtype) for p in repacked.planes] == plane_shapes(kind, rows, columns)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_small(tmp_path_factory.mktemp("plan") / "small.gguf")


@pytest.mark.parametrize("backend", ["numpy", "triton"])
@pytest.mark.parametrize("kv_dtype", ["float32", "int8"])
def test_a_load_holds_what_was_planned(small, backend, kv_dtype):
    with use_backend(backend):
        plan = plan_memory(small, context=100, kv_dtype=kv_dtype, device="cpu")
        with rooflama.load(small, device="cpu", max_context=100, kv_dtype=kv_dtype, progress=False) as model:
            assert model.weight_bytes == sum(plan.weights.resident.values()) == plan.bytes_of("weights")
            tables = {line.name: line.nbytes for line in plan.lines}["rotary tables"]
            assert sum(b.nbytes for b in model.device.held() if "rotary" in b.label) == tables
            assert model.device.held_bytes == plan.bytes_of("weights", "keys and values") + tables
            assert [b.nbytes for b in model.device.held()][: len(plan.weights.allocations)] == [
                *plan.weights.allocations
            ]
            assert model.plan.but(free_bytes=None) == plan.but(free_bytes=None)


@pytest.mark.parametrize("backend", ["numpy", "triton"])
def test_a_config_alone_gives_the_same_bytes_as_its_file(small, backend):
    with read_gguf(small) as checkpoint:
        reader = CheckpointReader(checkpoint)
        config = adapter_for("llama").read_config(reader)
        from_file = checkpoint_weights(reader, config, adapter_for("llama"), backend)
        types = {name: info.ggml_type for name, info in checkpoint.tensors.items()}
    with use_backend(backend):
        plan = plan_memory(config, context=64, device="cpu", weight_types=lambda name, shape: types[name])
    assert plan.weights.stored == from_file.stored
    assert plan.weights.resident == from_file.resident


def test_lines_add_up_and_say_how():
    plan = plan_memory(config_of("Llama-3-8B"), context=5000, sequences=3, device="cuda", limit="24GiB")
    shown = plan.to_dict()
    assert plan.total_bytes == sum(line["bytes"] for line in shown["lines"])
    assert all(line["formula"] for line in shown["lines"])
    assert shown["limit_bytes"] == 24 * GIB
    assert shown["total_bytes"] + shown["headroom_bytes"] == 24 * GIB
    names = {line.name for line in plan.lines}
    assert {"tokens", "rest of last pages", "rotary tables", "block tables", "prefill activations"} <= names
    assert {"split-KV partials", "logits and sampling", "allocator rounding", "context and kernels"} <= names


@pytest.mark.parametrize(
    ("backend", "forms"),
    [
        ("triton", {"Q4_1": "repacked", "Q8_0": "repacked", "F16": "as they are", "F32": "as they are"}),
        ("numpy", {"Q4_1": "as float32", "Q8_0": "as float32", "F16": "as float32", "F32": "as they are"}),
    ],
)
def test_a_plan_says_in_what_form_weights_are_held(tmp_path, backend, forms):
    """And its bytes bear that out: what stays as it is takes what it takes in the file, float32 four bytes a weight."""
    with use_backend(backend):
        plan = plan_memory(write_small(tmp_path / "small.gguf"), device="cpu", context=64)
    lines = {line.name: line for line in plan.lines if line.group == "weights"}
    for kind, form in forms.items():
        stored, layout = plan.weights.stored[kind], LAYOUTS[kind]
        assert lines[kind].formula == f"{stored:,} bytes in the file, {form}"
        if form == "as they are":
            assert lines[kind].nbytes == stored
        if form == "as float32":
            assert lines[kind].nbytes == 4 * stored // TYPE_SIZES[kind][1] * layout.quant_block


def test_pictures():
    plan = plan_memory(config_of("Llama-3-8B"), context=8192, device="cuda", limit="16.5GiB")
    html = plan._repr_html_()
    widths = [float(width) for width in re.findall(r"<rect x='[\d.]+' y='0' width='([\d.]+)'", html)]
    assert sum(widths) == pytest.approx(1000, abs=0.1)  # the plan passes its limit, so it is the scale
    assert "a context of" in html

    console = Console(width=160, file=io.StringIO())
    console.print(plan)
    text = console.file.getvalue()
    assert "Llama-3-8B: 1 sequence of 8,192 tokens" in text
    assert all(line.name in text for line in plan.lines)


def test_scores_of_the_numpy_definition(small):
    """NumPy's own bytes at the widest moment of a long prompt's attention."""
    context, config = 1024, config_of("SmolLM2-135M")
    rng = np.random.default_rng(0)
    q = rng.standard_normal((300, config.num_heads, config.head_dim), np.float32)
    pages = rng.standard_normal((context // 64, 64, config.num_kv_heads, config.head_dim), np.float32)
    table, lengths, starts = np.arange(context // 64)[None], np.array([context]), np.array([0, 300])
    tracemalloc.start()
    reference.attention_prefill(q, pages, pages, table, lengths, starts, softmax_scale=0.1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    moment = terms.definition_moments(config, 300, context, 1, 4, 1)[0]
    planned = moment["attention scores"] + moment["gathered keys and values"]
    assert 0.7 * planned <= peak <= 1.1 * planned


AMOUNTS = {
    "24": 24,
    "24GiB": 24 * GIB,
    "512 MiB": 512 * MIB,
    "80GB": 80 * 10**9,
    "1.5gib": 1536 * MIB,
    "8e9": 8 * 10**9,
    "514.10MiB": 539072922,
}


@pytest.mark.parametrize(("text", "nbytes"), AMOUNTS.items())
def test_amounts_of_memory(text, nbytes):
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "lots", "-1GiB", "0GiB", "nanGiB", "infGiB", "1 TiB", "GiB"])
def test_what_is_no_amount_of_memory(text):
    with pytest.raises(ArgumentError, match="amount"):
        parse_bytes(text)


def test_arguments_out_of_range(small):
    for wrong in (
        {"context": 0},
        {"context": 2**24 + 1},
        {"context": 8, "sequences": 0},
        {"sequences": 65537},
        {"sequences": 10**400},
        {"limit": 10**400},
        {"kv_dtype": "int4"},
    ):
        with pytest.raises(ArgumentError):
            plan_memory(small, **wrong)


@pytest.mark.parametrize("name", ["cuda:½", "cuda:-1", "cuda:", "cuda:99999999999999999999", "cudax", "hip:x", ""])
def test_what_is_no_device_is_not_planned_for(small, name):
    with pytest.raises(DeviceUnavailable):
        plan_memory(small, device=name)


@pytest.mark.parametrize("name", ["cuda:127", "hip:127"])
def test_a_gpu_that_is_not_here_is_planned_for(small, name):
    plan = plan_memory(small, device=name)
    assert (plan.target.kind, plan.free_bytes) == (name.partition(":")[0], None)


@pytest.mark.parametrize("name", ["context", "sequences", "limit"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, float("nan")])
def test_amounts_are_whole_and_positive(small, name, value):
    with pytest.raises(ArgumentError, match=name.removesuffix("s")):
        plan_memory(small, **{name: value})


@pytest.mark.demo_checkpoint
def test_the_demo_checkpoint():
    try:
        path = demo_checkpoint()
    except UnknownCheckpointError as error:
        pytest.skip(str(error))
    plan = plan_memory(path, context=8192, device="cuda", dtype="bfloat16")
    assert plan.weights.stored == {"Q4_1": 66355200, "Q8_0": 30081024, "F32": 140544}
    assert sum(plan.weights.resident.values()) == sum(plan.weights.stored.values()) <= 1.1 * path.stat().st_size
    assert plan.bytes_of("keys and values") == 8192 * 23040
