"""Numbers at the edge of what attention takes: windows that int32 barely holds, scores that are infinite or NaN."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from rooflama.kernels import KernelInputError, attention_decode, attention_prefill, reference
from rooflama.kernels.launch import override
from rooflama.testing.assertions import assert_bit_equal
from rooflama.testing.attention import Drawn, arguments, assert_attention, define, run_decode, run_prefill, sequences
from rooflama.testing.strategies import DEVICE

# More queries than keys: the first ones stand before position 0 and see nothing.
EARLY = Drawn(query_lens=(4, 40), seq_lens=(1, 37), num_kv_heads=1, group=2, head_dim=16)
LONG = Drawn(query_lens=(1, 1), seq_lens=(20, 300), num_kv_heads=1, group=2, head_dim=16)  # one split, and several


@pytest.mark.parametrize("window", [300, 2**31 - 1])
def test_a_window_beyond_all_keys_is_no_window(window):
    dense = sequences(EARLY)
    for one, other in zip(
        run_prefill(attention_prefill, replace(EARLY, sliding_window=window), dense),
        run_prefill(attention_prefill, EARLY, dense),
        strict=True,
    ):
        assert_bit_equal(one, other)
    dense = sequences(LONG)
    want = define(reference.attention_decode, LONG, dense, decode=True)
    assert_attention(run_decode(attention_decode, replace(LONG, sliding_window=window), dense), want, LONG, dense)


@pytest.mark.parametrize("key", [-torch.inf, torch.nan])
def test_scores_of_minus_infinity_weigh_nothing_and_nan_stays(key):
    """Of all keys; a sequence of one split and one whose splits are merged."""
    fields = arguments(LONG, decode=True)
    fields["q"].abs_()
    fields["k_pages"].fill_(key)
    out, lse = attention_decode(**fields)
    if key == -torch.inf:
        assert not out.any()
        assert (lse == -torch.inf).all()
    else:
        assert out.isnan().all()
        assert lse.isnan().all()


@pytest.mark.parametrize("decode", [True, False])
def test_scores_that_are_all_very_negative(decode):
    """Their softmax is that of the same scores, shifted: no maximum of 0 to begin with."""
    drawn = replace(LONG, query_lens=(1, 1) if decode else (7, 20))
    dense = [replace(s, q=s.q.abs(), k=-200 * s.k.abs()) for s in sequences(drawn)]
    definition, kernel, runs = (
        (reference.attention_decode, attention_decode, run_decode)
        if decode
        else (reference.attention_prefill, attention_prefill, run_prefill)
    )
    want = define(definition, drawn, dense, decode=decode)
    assert want[1].max() < -150  # exp of it is 0 in float32
    assert_attention(runs(kernel, drawn, dense), want, drawn, dense)


def test_many_splits():
    """More than are merged at once, and more keys than the most splits of the least size hold.

    On the CPU with splits so small that 1,100 keys do; a GPU's own are small enough.
    """
    lens = (1100, 4, 2100) if DEVICE.type == "cpu" else (5000, 4, 9000)
    drawn = replace(LONG, query_lens=(1, 1, 1), seq_lens=lens)
    dense = sequences(drawn)
    want = define(reference.attention_decode, drawn, dense, decode=True)
    with override("attention_splits", MIN_SPLIT=32, MAX_SPLITS=64) if DEVICE.type == "cpu" else nullcontext():
        got = run_decode(attention_decode, drawn, dense)
    assert_attention(got, want, drawn, dense)


def test_a_row_without_keys_is_zero_whatever_its_block_sees():
    """The first queries stand before position 0; a later one of their block sees a NaN."""
    fields = arguments(EARLY)
    fields["v_pages"].fill_(torch.nan)
    out, lse = attention_prefill(**fields)
    unseen = torch.tensor([0, 1, 2, *range(4, 7)], device=DEVICE)
    assert not out[unseen].any()
    assert (lse[unseen] == -torch.inf).all()
    assert out[[3, 7, 43]].isnan().all()


@pytest.mark.usefixtures("numpy_backend")
def test_definition_of_rows_without_weight():
    for key in (-torch.inf, torch.nan):
        test_scores_of_minus_infinity_weigh_nothing_and_nan_stays(key)
    test_a_row_without_keys_is_zero_whatever_its_block_sees()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"softmax_scale": torch.inf}, "softmax_scale must be positive, and finite"),
        ({"softmax_scale": torch.nan}, "softmax_scale is nan"),
        ({"softcap": torch.inf}, "softcap must be 0 or more, and finite"),
        ({"sliding_window": 4.5}, r"sliding_window is 4\.5: .* a whole number"),
        ({"sliding_window": True}, "sliding_window is True"),
        ({"sliding_window": 2**31}, "sliding_window is 2147483648"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(change, message):
    with pytest.raises(KernelInputError, match=message):
        attention_decode(**arguments(LONG, decode=True) | change)
    with pytest.raises(KernelInputError, match=message):
        attention_prefill(**arguments(LONG) | change)
