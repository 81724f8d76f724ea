"""rooflama.testing.laws: our kernels keep them, and functions with a bug do not."""

import pytest
import torch
from hypothesis import Phase, settings

from rooflama import kernels
from rooflama.kernels.kernel import KERNELS
from rooflama.testing import laws
from rooflama.testing.laws import LAWS


def test_every_public_kernel_has_laws():
    """one_shot_sum alone has none: it runs on several devices at once."""
    assert set(LAWS) == {name for name in kernels.__all__ if name in KERNELS} - {"one_shot_sum"}
    assert all(getattr(laws, name) is LAWS[name] for name in LAWS)
    assert all(len(LAWS[name]) >= 3 for name in LAWS)


# Those of attention are kept in tests/kernels/test_attention_*.py, with more cases.
@pytest.mark.parametrize(
    "law", [pytest.param(law, id=f"{name}-{law}") for name in LAWS if "attention" not in name for law in LAWS[name]]
)
def test_a_kernel_keeps_its_laws(law, request):
    law(KERNELS[request.node.callspec.id.split("-")[0]])


@pytest.fixture(autouse=True)
def few_cases():
    """And no shrinking, which takes minutes in the interpreter: most failures here are what is wanted."""
    before = settings.get_current_profile_name()
    settings.register_profile("few cases", settings(), max_examples=4, phases=[Phase.generate])
    settings.load_profile("few cases")
    yield
    settings.load_profile(before)


def scaled(name):
    """The kernel with a bug: 1% too much in everything that it returns or writes."""

    def wrong(*args, **kwargs):
        kernel = KERNELS[name]
        bound = kernel.__signature__.bind(*args, **kwargs)
        before = {n: bound.arguments[n].clone() for n in kernel.mutates if bound.arguments.get(n) is not None}
        result = kernel(*args, **kwargs)
        for n, old in before.items():
            tensor = bound.arguments[n]
            tensor.copy_(
                torch.where(tensor.float() == old.float(), tensor.float(), tensor.float() * 1.01 + 1).to(tensor)
            )
        if isinstance(result, tuple):
            return tuple(map(more, result))
        return None if result is None else more(result)

    return wrong


def more(tensor):
    return tensor * 1.01 + 0.01 if tensor.is_floating_point() else tensor + 1


@pytest.mark.parametrize("name", LAWS)
def test_a_result_that_is_off_breaks_the_first_law(name):
    first = next(iter(LAWS[name]))
    assert str(first) == "equals_definition"
    with pytest.raises(AssertionError):
        first(scaled(name))


def test_each_law_finds_its_bug():
    count = iter(range(10**6))

    def unsteady(x, weight, eps):
        return kernels.rms_norm(x, weight, eps) + next(count)

    def careless(gate, up):
        out = kernels.swiglu(gate, up)
        gate.zero_()
        return out

    def neighbourly(x, weight, eps):
        return kernels.rms_norm(x, weight, eps) + 1e-6 * len(x)

    for name, wrong, law in (
        ("rms_norm", unsteady, "the_same_call_gives_the_same_bits"),
        ("swiglu", careless, "only_what_it_may_write_is_written"),
        ("rms_norm", neighbourly, "rows_do_not_depend_on_each_other"),
    ):
        (broken,) = [one for one in LAWS[name] if str(one) == law]
        with pytest.raises(AssertionError):
            broken(wrong)


def test_a_number_that_is_not_drawn_cannot_be_fixed():
    with pytest.raises(TypeError, match=r"heads.* of a call of rms_norm: what can be fixed is .*hidden"):
        laws.rms_norm(kernels.rms_norm, heads=3)
    with pytest.raises(TypeError, match=r"heads.* of an attention problem: what can be fixed is .*head_dim"):
        laws.attention_decode(kernels.attention_decode, heads=3)
