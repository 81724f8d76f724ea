"""Rotary tables against transformers' own functions, llama.cpp's formula, and extended precision."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import LlamaConfig, Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from rooflama.models.rope.huggingface import rope_from_hf
from rooflama.models.rope.spec import (
    KINDS,
    Dynamic,
    Linear,
    Llama3,
    LongRope,
    RopeError,
    RopeSpec,
    Scaling,
    Yarn,
    attention_factor,
    choose_factor_set,
    inverse_frequencies,
    rope_tables,
)

EPS32 = 2.0**-23

bases = st.sampled_from([100.0, 10_000.0, 130_000.0, 500_000.0, 1_000_000.0])
factors = st.floats(1.0, 64.0)
contexts = st.sampled_from([32, 2048, 4096, 8192, 32768])
# (head_dim, partial_rotary_factor): rotary dimensions 64, 96, 128, 80, 96 of 128, 20 of 80
shapes = st.sampled_from([(64, 1.0), (96, 1.0), (128, 1.0), (80, 1.0), (128, 0.75), (80, 0.25)])


def both(kind, parameters, *, head_dim, part, base, context, seq_len=None):
    """(our frequencies and factor in float64, transformers' in float32) for one dictionary of parameters."""
    parameters = {"rope_type": kind, **parameters}
    spec = rope_from_hf(
        parameters, head_dim=head_dim, max_position_embeddings=context, theta=base, partial_rotary_factor=part
    )
    config = LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        head_dim=head_dim,
        max_position_embeddings=context,
        rope_parameters={**parameters, "rope_theta": base, "partial_rotary_factor": part},
    )
    theirs = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len)
    factor_set = choose_factor_set(spec, seq_len or 0)
    ours = inverse_frequencies(spec, factor_set=factor_set, seq_len=seq_len if kind == "dynamic" else None)
    return (ours, attention_factor(spec)), (theirs[0].double().numpy(), theirs[1])


def assert_same(ours, theirs, *, base, blend=0.0):
    """float32 holds the exponent to half a unit, which base^exponent magnifies by ln(base); a few roundings follow.

    ``blend``: by how much a rounding of the ramp between two frequencies shows in the smaller of them.
    """
    np.testing.assert_allclose(ours[0], theirs[0], rtol=EPS32 * (math.log(base) / 2 + 4 + blend), atol=0)
    assert ours[1] == pytest.approx(theirs[1], rel=1e-12)


@given(shape=shapes, base=bases)
def test_default_equals_transformers(shape, base):
    head_dim, part = shape
    spec = rope_from_hf(None, head_dim=head_dim, max_position_embeddings=64, theta=base, partial_rotary_factor=part)
    dims = spec.rotary_dim
    config = LlamaConfig(hidden_size=dims, num_attention_heads=1, rope_parameters={"rope_theta": base})
    frequencies, scale = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    assert_same((inverse_frequencies(spec), attention_factor(spec)), (frequencies.double().numpy(), scale), base=base)


@given(shape=shapes, base=bases, factor=factors, context=contexts)
def test_linear_equals_transformers(shape, base, factor, context):
    head_dim, part = shape
    assert_same(
        *both("linear", {"factor": factor}, head_dim=head_dim, part=part, base=base, context=context), base=base
    )


@given(shape=shapes, base=bases, factor=factors, context=contexts, stretch=st.floats(0.1, 20))
def test_dynamic_equals_transformers(shape, base, factor, context, stretch):
    head_dim, part = shape
    seq_len = max(1, int(stretch * context))
    ours, theirs = both(
        "dynamic", {"factor": factor}, head_dim=head_dim, part=part, base=base, context=context, seq_len=seq_len
    )
    assert_same(ours, theirs, base=base * (factor * max(stretch, 1)) ** 1.2)


yarn_parameters = st.fixed_dictionaries(
    {"factor": factors},
    optional={
        "attention_factor": st.floats(0.1, 3),
        "mscale": st.just(0) | st.floats(1e-30, 2),  # 0 is absent, and no number is below 1e-30
        "mscale_all_dim": st.just(0) | st.floats(1e-30, 2),
        "beta_fast": st.sampled_from([0, 8, 32, 48.5]),
        "beta_slow": st.sampled_from([0, 1, 2.5]),
        "truncate": st.booleans(),
        "original_max_position_embeddings": contexts,
    },
)


@given(shape=shapes, base=bases, context=contexts, parameters=yarn_parameters)
@example(shape=(64, 1.0), base=1e4, context=4096, parameters={"factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.7})
def test_yarn_equals_transformers(shape, base, context, parameters):
    head_dim, part = shape
    ours, theirs = both("yarn", parameters, head_dim=head_dim, part=part, base=base, context=context)
    assert_same(ours, theirs, base=base, blend=parameters["factor"])


@given(
    shape=shapes,
    base=bases,
    original=contexts,
    given_factor=st.none() | factors,
    given_attention_factor=st.none() | st.floats(0.1, 3),
    beyond=st.sampled_from([-1, 0, 1, 1000]),
    seed=st.integers(0, 2**32 - 1),
)
def test_longrope_equals_transformers(shape, base, original, given_factor, given_attention_factor, beyond, seed):
    """Either side of the boundary: a length equal to the original context is still short."""
    head_dim, part = shape
    rng = np.random.default_rng(seed)
    pairs = int(head_dim * part) // 2
    parameters = {
        "short_factor": rng.uniform(1, 3, pairs).tolist(),
        "long_factor": rng.uniform(1, 60, pairs).tolist(),
        "original_max_position_embeddings": original,
    }
    if given_factor is not None:
        parameters["factor"] = given_factor
    if given_attention_factor is not None:
        parameters["attention_factor"] = given_attention_factor
    ours, theirs = both(
        "longrope",
        parameters,
        head_dim=head_dim,
        part=part,
        base=base,
        context=32 * original,
        seq_len=original + beyond,
    )
    assert_same(ours, theirs, base=base)


@given(
    shape=shapes,
    base=bases,
    factor=factors,
    low=st.floats(0.5, 4),
    width=st.floats(0.5, 8),
    original=st.sampled_from([128, 2048, 8192]),
)
def test_llama3_equals_transformers(shape, base, factor, low, width, original):
    head_dim, part = shape
    parameters = {
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": low + width,
        "original_max_position_embeddings": original,
    }
    ours, theirs = both("llama3", parameters, head_dim=head_dim, part=part, base=base, context=131072)
    assert_same(ours, theirs, base=base, blend=factor * (low + width) / width * (math.log(base) + 8))


def llama_cpp_divisors(spec):
    """The rope_freqs.weight that a converted Llama 3.1 file carries, in float32."""
    scaling, divisors = spec.scaling, []
    for frequency in spec.plain_frequencies():
        wavelength = 2 * math.pi / frequency
        if wavelength < scaling.original_context / scaling.high_freq_factor:
            divisors.append(1.0)
        elif wavelength > scaling.original_context / scaling.low_freq_factor:
            divisors.append(scaling.factor)
        else:
            smooth = (scaling.original_context / wavelength - scaling.low_freq_factor) / (
                scaling.high_freq_factor - scaling.low_freq_factor
            )
            divisors.append(1 / ((1 - smooth) / scaling.factor + smooth))
    return tuple(np.array(divisors, dtype=np.float32).tolist())


@pytest.mark.parametrize(
    ("head_dim", "factor", "unchanged", "divided"), [(64, 32.0, 15, 18), (128, 8.0, 29, 35), (128, 32.0, 29, 35)]
)
def test_gguf_divisors_equal_llama3(head_dim, factor, unchanged, divided):
    """Llama-3.2-1B, Llama-3.1-8B and Llama-3.2-3B: which pairs are left alone, blended, divided."""
    scaling = Llama3(factor=factor, original_context=8192, low_freq_factor=1.0, high_freq_factor=4.0)
    spec = RopeSpec(head_dim=head_dim, rotary_dim=head_dim, base=500_000.0, scaling=scaling)
    divisors = np.array(llama_cpp_divisors(spec))
    assert (divisors[:unchanged] == 1).all()
    assert (divisors[divided:] == factor).all()
    assert ((divisors[unchanged:divided] > 1) & (divisors[unchanged:divided] < factor)).all()
    from_file = RopeSpec(head_dim=head_dim, rotary_dim=head_dim, base=500_000.0, frequency_divisors=tuple(divisors))
    np.testing.assert_allclose(inverse_frequencies(from_file), inverse_frequencies(spec), rtol=EPS32)


@given(
    base=bases,
    factor=st.floats(1.5, 64),
    original=st.sampled_from([2048, 8192, 32768]),
    yarn=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_divisors_combine_as_in_llama_cpp(base, factor, original, yarn, seed):
    """The angle is divided first, then interpolated: pair by pair, in ggml's order of operations."""
    dims = 64
    divisors = tuple(np.random.default_rng(seed).uniform(0.5, 40, dims // 2).tolist())
    scaling = Yarn(factor=factor, original_context=original) if yarn else Linear(factor=factor)
    spec = RopeSpec(head_dim=dims, rotary_dim=dims, base=base, scaling=scaling, frequency_divisors=divisors)

    def turns_to_dim(turns):
        return dims * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = max(0, math.floor(turns_to_dim(32))), min(dims - 1, math.ceil(turns_to_dim(1)))
    expected = []
    for j, divisor in enumerate(divisors):
        extrapolated = base ** (-2 * j / dims) / divisor
        mix = 1 - min(1, max(0, (j - low) / max(0.001, high - low))) if yarn else 0.0
        expected.append(extrapolated / factor * (1 - mix) + extrapolated * mix)
    np.testing.assert_allclose(inverse_frequencies(spec), expected, rtol=1e-12)


def longrope(**changes):
    values = {"factor": 32.0, "original_context": 4096, "short_factors": (1.0, 2.0), "long_factors": (3.0, 4.0)}
    return RopeSpec(head_dim=4, rotary_dim=4, scaling=LongRope(**{**values, **changes}))


def test_attention_factors_of_real_models():
    assert attention_factor(longrope()) == pytest.approx(1.190238, abs=1e-6)  # Phi-3-mini-128k
    qwen = RopeSpec(head_dim=128, rotary_dim=128, base=1e6, scaling=Yarn(factor=4.0, original_context=32768))
    assert attention_factor(qwen) == pytest.approx(0.1 * math.log(4) + 1)
    assert attention_factor(RopeSpec(head_dim=64, rotary_dim=64)) == 1.0


@pytest.mark.parametrize(
    ("planned", "policy", "chosen"),
    [
        (4095, "auto", "short"),
        (4096, "auto", "short"),
        (4097, "auto", "long"),
        (1, "long", "long"),
        (99999, "short", "short"),
    ],
)
def test_a_sequence_gets_one_factor_set_when_it_is_admitted(planned, policy, chosen):
    assert choose_factor_set(longrope(), planned, policy) == chosen
    assert choose_factor_set(RopeSpec(head_dim=4, rotary_dim=4), planned, policy) is None


@pytest.mark.parametrize("base", [10_000.0, 1_000_000.0])
@pytest.mark.parametrize("scaling", [Scaling(), Yarn(factor=4.0, original_context=32768)], ids=["default", "yarn"])
def test_tables_are_rounded_once(base, scaling):
    """Half a unit in the last place of float32 from extended precision, up to position 131071."""
    if np.finfo(np.longdouble).nmant <= 52:
        pytest.skip("no extended precision on this machine")
    spec = RopeSpec(head_dim=128, rotary_dim=128, base=base, scaling=scaling)
    cos, sin = rope_tables(spec, 131072)
    assert cos.dtype == sin.dtype == np.float32
    assert cos.shape == sin.shape == (131072, 64)
    plain = np.longdouble(base) ** (-np.arange(0, 128, 2).astype(np.longdouble) / 128)
    keep = inverse_frequencies(spec) / spec.plain_frequencies()  # 1 for every pair of the default kind
    positions = np.array([0, 1, 4095, 4096, 32767, 131071]).astype(np.longdouble)
    angles = positions[:, None] * (plain * keep)
    for table, exact in ((cos, np.cos(angles)), (sin, np.sin(angles))):
        exact = exact * np.longdouble(attention_factor(spec))
        got = table[positions.astype(int)]
        allowed = np.spacing(np.abs(got)) / 2 + 1e-10
        assert (np.abs(got - exact) <= allowed).all()


@pytest.mark.parametrize("length", [100, 200])
def test_tables_equal_the_cos_and_sin_of_transformers(length):
    """Phi-3's module below and above its original context, the attention factor included."""
    rng = np.random.default_rng(0)
    parameters = {
        "rope_type": "longrope",
        "short_factor": rng.uniform(1, 2, 24).tolist(),
        "long_factor": rng.uniform(1, 30, 24).tolist(),
    }
    config = Phi3Config(
        hidden_size=192,
        num_attention_heads=4,
        max_position_embeddings=4096,
        original_max_position_embeddings=128,
        rope_parameters={**parameters, "rope_theta": 10_000.0},
        pad_token_id=0,
    )
    cos, sin = Phi3RotaryEmbedding(config)(torch.zeros(1), torch.arange(length)[None])
    spec = rope_from_hf(
        parameters,
        head_dim=48,
        max_position_embeddings=4096,
        theta=10_000.0,
        original_max_position_embeddings=128,
    )
    ours = rope_tables(spec, length, factor_set=choose_factor_set(spec, length))
    for table, theirs in zip(ours, (cos, sin), strict=True):
        np.testing.assert_allclose(table, theirs[0, :, :24].numpy(), atol=length * EPS32 * 4)


def test_every_kind_describes_itself():
    pairs = tuple(range(1, 5))
    made = {
        "default": Scaling(),
        "linear": Linear(factor=2),
        "dynamic": Dynamic(factor=2, original_context=8),
        "yarn": Yarn(factor=4, original_context=32768),
        "longrope": LongRope(factor=32, original_context=4096, short_factors=pairs, long_factors=pairs),
        "llama3": Llama3(factor=8, original_context=8192, low_freq_factor=1, high_freq_factor=4),
    }
    assert made.keys() == KINDS.keys()
    for kind, scaling in made.items():
        spec = RopeSpec(head_dim=16, rotary_dim=8, scaling=scaling)
        assert hash(spec) == hash(RopeSpec(head_dim=16, rotary_dim=8, scaling=scaling))
        assert spec.describe().startswith(kind)
        assert spec.describe().endswith("base 10000, 8 of 16 dimensions")
    assert "factor 4, original_context 32768" in RopeSpec(head_dim=16, rotary_dim=8, scaling=made["yarn"]).describe()


BAD_NUMBERS = [math.nan, 0.0, -1.0, math.inf, True, "8"]


@pytest.mark.parametrize("bad", BAD_NUMBERS)
def test_numbers_out_of_range_are_refused(bad):
    with pytest.raises(RopeError, match="base"):
        RopeSpec(head_dim=4, rotary_dim=4, base=bad)
    with pytest.raises(RopeError, match="factor"):
        Linear(factor=bad)
    with pytest.raises(RopeError, match="attention_factor"):
        Yarn(factor=2.0, original_context=8, attention_factor=bad)
    with pytest.raises(RopeError, match="frequency_divisors"):
        RopeSpec(head_dim=4, rotary_dim=4, frequency_divisors=(1.0, bad))
    with pytest.raises(RopeError, match="long_factors"):
        longrope(long_factors=(1.0, bad))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RopeSpec(head_dim=64, rotary_dim=63), "rotary_dim is even"),
        (lambda: RopeSpec(head_dim=64, rotary_dim=66), "between 2 and head_dim"),
        (lambda: RopeSpec(head_dim=64, rotary_dim=0), "between 2 and head_dim"),
        (lambda: RopeSpec(head_dim=4, rotary_dim=4, base=1.0), "base is above 1"),
        (lambda: RopeSpec(head_dim=4, rotary_dim=4, frequency_divisors=(1.0,)), "1 entries: there are 2"),
        (lambda: longrope(short_factors=(1.0,)), "short_factors has 1 entries"),
        (lambda: longrope(original_context=1), "at least 2"),
        (lambda: Yarn(factor=2, original_context=8, beta_fast=1, beta_slow=2), "beta_fast is at least beta_slow"),
        (lambda: Llama3(factor=8, original_context=8, low_freq_factor=4, high_freq_factor=4), "low is below high"),
        (
            lambda: RopeSpec(
                head_dim=4,
                rotary_dim=4,
                scaling=Dynamic(factor=2, original_context=8),
                frequency_divisors=(1.0, 1.0),
            ),
            "frequency_divisors with kind 'dynamic'",
        ),
        (lambda: inverse_frequencies(longrope()), "factor_set None"),
        (lambda: inverse_frequencies(RopeSpec(head_dim=4, rotary_dim=4), factor_set="short"), "has one set"),
        (lambda: inverse_frequencies(RopeSpec(head_dim=4, rotary_dim=4), seq_len=9), "'default' ignores it"),
        (
            lambda: RopeSpec(head_dim=2, rotary_dim=2, scaling=Dynamic(factor=2, original_context=8)),
            "rotary_dim is at least 4",
        ),
        (lambda: choose_factor_set(longrope(), 10, "medium"), "it is auto, short or long"),
    ],
)
def test_contradictions_are_refused(make, message):
    with pytest.raises(RopeError, match=message):
        make()
