"""Byte-level BPE against a plain implementation that cuts words with another regex engine."""

import functools
import itertools

import pytest
import regex
from hypothesis import example, given
from hypothesis import strategies as st

from rooflama.loaders.text.bpe import BYTE_ALPHABET, PRE_TOKENIZERS, word_splitter
from rooflama.loaders.text.tokenizer import Tokenizer, TokenizerError
from vocabularies import bpe_metadata, trained_bpe

# As published in the models' tokenizer.json; the first of each list cuts first, what it leaves between counts too.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PUBLISHED = {
    "gpt-2": [GPT2],
    "smollm": [r"\p{N}", GPT2],
    "llama-bpe": [WORDS],
    "smaug-bpe": [WORDS],
    "qwen2": [WORDS.replace("{1,3}", "")],
    "gpt-4o": [CASED],
    "tekken": [CASED.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)?", "").replace("{1,3}", "")],
    "default": [r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
}
# What the patterns tell apart: letters of either case, marks, digits of all kinds, punctuation, spaces, line ends.
texts = st.lists(
    st.sampled_from([*"abZÉßſ漢अा1209٣½Ⅷ'sStTrRelLvVmMdD.,!$+<=>^~|_/ \t\n\r\u00a0\u3000🙂\u0301"]), max_size=24
).map("".join)


def cut(patterns, text):
    pieces = [text]
    for pattern in patterns:
        pieces = [part for piece in pieces for part in regex.split(f"({pattern})", piece, flags=regex.V1) if part]
    return pieces


def merge(word, ranks):
    """The definition: join the pair of lowest rank, leftmost first, until no pair has a rank."""
    symbols = [BYTE_ALPHABET[byte] for byte in word.encode()]
    while pairs := [(ranks[pair], i) for i, pair in enumerate(itertools.pairwise(symbols)) if pair in ranks]:
        _, i = min(pairs)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    return symbols


@functools.cache
def tokenizer(pre):
    tokens, merges = trained_bpe()
    return Tokenizer.from_metadata(bpe_metadata(tokens, merges, pre=pre, add_bos_token=False))


@pytest.mark.parametrize("pre", PUBLISHED)
@given(text=texts)
@example(text="WE'LL $+<a|b>/\n\n/\r/ ½Ⅷ٣٣ 12345/ \u00a0.../\r\nÉCLAIRaB isn't")
def test_words_equal_the_published(pre, text):
    words = [word for word, _ in word_splitter(PRE_TOKENIZERS[pre]).pre_tokenize_str(text)]
    assert words == ["".join(BYTE_ALPHABET[byte] for byte in word.encode()) for word in cut(PUBLISHED[pre], text)]


@pytest.mark.parametrize("pre", PUBLISHED)
@given(text=texts)
@example(text="We'LL see  1234567 llamas\r\n\n  isn't\u00a0it ½Ⅷ٣٣ $+<a|b> ")
def test_encode_equals_the_definition(pre, text):
    ranks = {tuple(line.split(" ")): rank for rank, line in enumerate(trained_bpe()[1])}
    symbols = [symbol for word in cut(PUBLISHED[pre], text) for symbol in merge(word, ranks)]
    assert [tokenizer(pre).tokens[i] for i in tokenizer(pre).encode(text)] == symbols, f"{pre=} {text=}"


@pytest.mark.parametrize("pre", PUBLISHED)
@given(text=st.text())
@example(text="\x00\x04\u2028🙂\U0010ffff")
def test_decode_gives_back_the_text(pre, text):
    assert tokenizer(pre).decode(tokenizer(pre).encode(text)) == text


# What convert_hf_to_gguf.py writes for the families that are promised, and whether BOS then is added by itself.
CONVERTED = {
    "Llama 3, 3.1, 3.2": ("llama-bpe", "llama-bpe", True),
    "older Llama 3": ("llama3", "llama-bpe", True),
    "SmolLM3": ("smaug-bpe", "smaug-bpe", False),
    "Mistral Nemo, Small 3": ("tekken", "tekken", True),
    "SmolLM, SmolLM2": ("smollm", "smollm", False),
    "Qwen 2, 2.5, 3": ("qwen2", "qwen2", False),
    "DeepSeek-R1 on Qwen": ("deepseek-r1-qwen", "qwen2", False),
    "Phi-4, OLMo 2, Granite 4": ("dbrx", "smaug-bpe", False),
    "Phi-4-mini": ("gpt-4o", "gpt-4o", False),
    "Granite 3": ("refact", "smollm", False),
    "OLMo": ("olmo", "gpt-2", False),
}


@pytest.mark.parametrize("model", CONVERTED)
def test_names_that_converters_write(model):
    name, rules, adds_bos = CONVERTED[model]
    assert PRE_TOKENIZERS[name] == PRE_TOKENIZERS[rules]
    assert PRE_TOKENIZERS[name].add_bos == adds_bos


def test_ignore_merges_takes_the_whole_word():
    """Merges lead to "th" + "e"; only a pre-tokeniser that ignores merges finds "the"."""
    tokens = [*BYTE_ALPHABET, "th", "he", "the"]
    names = {}
    for pre in ("llama-bpe", "tekken", "smaug-bpe"):
        metadata = bpe_metadata(tokens, ["t h", "h e"], pre=pre, add_bos_token=False)
        names[pre] = [tokens[i] for i in Tokenizer.from_metadata(metadata).encode("the")]
    assert names == {"llama-bpe": ["the"], "tekken": ["the"], "smaug-bpe": ["th", "e"]}


def test_a_merge_named_twice_keeps_its_first_rank():
    tokens = [*BYTE_ALPHABET, "th", "he"]
    twice = Tokenizer.from_metadata(bpe_metadata(tokens, ["t h", "h e", "t h"]))
    assert [tokens[i] for i in twice.encode("the")] == ["th", "e"]


def test_ignore_merges_finds_no_control_token_in_plain_text():
    tokens = [*BYTE_ALPHABET, "stop"]
    metadata = bpe_metadata(tokens, [], pre="llama-bpe", types=[1] * 256 + [3], add_bos_token=False)
    stopper = Tokenizer.from_metadata(metadata)
    assert stopper.encode("stop") == [tokens.index(c) for c in "stop"]
    assert stopper.encode("stop", parse_special=True) == [256]


def test_a_byte_without_a_token_is_refused():
    tokens = [character for byte, character in enumerate(BYTE_ALPHABET) if byte != 0x04]
    narrow = Tokenizer.from_metadata(bpe_metadata(tokens, []))
    with pytest.raises(
        TokenizerError, match=r"'\\x04' \(U\+0004\), at 2 in a piece of the text: this vocabulary has no"
    ):
        narrow.encode("ok\x04")


@pytest.mark.parametrize(("line", "unknown"), [("t zz", "zz"), ("zz t", "zz"), ("t e", "te"), ("th", "")])
def test_a_merge_of_unknown_tokens_is_refused(line, unknown):
    with pytest.raises(TokenizerError, match=rf"merges\[1\] = '{line}': .* '{unknown}' is not a token"):
        Tokenizer.from_metadata(bpe_metadata([*BYTE_ALPHABET, "th"], ["t h", line]))


def test_unknown_pre_tokenizer_names_the_known():
    with pytest.raises(
        TokenizerError, match=r"'bloom': the pre-tokeniser must be one of a\.x-4\.0, chatglm-bpe, codeshell"
    ):
        Tokenizer.from_metadata(bpe_metadata(BYTE_ALPHABET, [], pre="bloom"))


@pytest.mark.parametrize("missing", [None, ""])
def test_missing_pre_tokenizer_warns(missing):
    with pytest.warns(UserWarning, match="tokenizer.ggml.pre is missing: words are cut by the 'default' rules"):
        Tokenizer.from_metadata(bpe_metadata(BYTE_ALPHABET, [], pre=missing))
