"""Cards are complete, and the committed pages are what the code says today."""

from pathlib import Path

import pytest

from rooflama import KernelInputError
from rooflama.kernel_card import CARDS, kernel_card

ROOT = Path(__file__).parents[1]

# where the formula stands that a definition delegates to
HELPERS = {
    "attention_decode": ["_attend"],
    "attention_prefill": ["_attend"],
    "paged_cache": ["quantize", "round_to_e4m3"],
    "sampling": ["allowed_tokens"],
}


@pytest.mark.parametrize("name", CARDS)
def test_the_committed_page_is_current(name):
    page = ROOT / "docs" / "kernels" / f"{name}.md"
    assert page.read_text() == kernel_card(name).markdown(), "run make kernel-cards"


@pytest.mark.parametrize("name", CARDS)
def test_a_wheel_shows_the_same_card(name, tmp_path, monkeypatch):
    """In a wheel the tables come from ``tables.json``."""
    here = kernel_card(name).markdown()
    monkeypatch.setattr("rooflama.kernel_card.COMPILE_MATRIX", tmp_path / "not in a wheel")
    monkeypatch.setattr("rooflama.kernel_card.SHIPPED", ROOT / "docs" / "kernels" / "tables.json")
    assert kernel_card(name).markdown() == here, "run make kernel-cards"


@pytest.mark.parametrize("name", CARDS)
def test_a_card_shows_definition_and_laws(name):
    text = kernel_card(name).markdown()
    for function in CARDS[name]:
        assert f"def {function}(" in text
        assert f"`rooflama.swap({function}=f)` calls `f` instead" in text
    for helper in HELPERS.get(name, ()):
        assert f"def {helper}(" in text
    laws = text.split("## Laws tested")[1].split("##")[0]
    assert laws.count("\n- ") >= 3


def test_every_public_operator_has_a_card():
    import rooflama.kernels as kernels

    functions = {name for name in kernels.__all__ if hasattr(kernels.reference, name)}
    assert functions <= {function for functions in CARDS.values() for function in functions}


def test_unknown_kernel():
    with pytest.raises(KernelInputError, match="kernel 'flash': the kernels are"):
        kernel_card("flash")
