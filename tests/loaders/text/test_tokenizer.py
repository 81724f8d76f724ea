"""The whole tokenizer: that of the demo checkpoint, special tokens, streaming, BOS, and inconsistent metadata."""

import re
import struct

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer as HubTokenizer
from tokenizers import decoders, models, pre_tokenizers

from limits import within_seconds
from rooflama import demo_checkpoint
from rooflama.loaders.gguf import read_gguf
from rooflama.loaders.text import Tokenizer, open_tokenizer
from rooflama.loaders.text.bpe import BYTE_ALPHABET
from rooflama.loaders.text.chat_template import ChatTemplateError
from rooflama.loaders.text.vocabulary import TokenizerError
from small_checkpoint import VOCABULARY, write_small
from tiny_checkpoints import write_gguf
from vocabularies import bpe_metadata, spm_metadata, trained_bpe, trained_sentencepiece

SPECIAL = {"<|start|>": 3, "<|end|>": 3, "<|endoftext|>": 3, "<tool>": 4, "<tool>s": 4, "[PAD]": 5}


def bpe_with_special(**keys):
    tokens, merges = trained_bpe()
    types = [1] * len(tokens) + list(SPECIAL.values())
    return bpe_metadata([*tokens, *SPECIAL], merges, types=types, bos_token_id=len(tokens), **keys)


bpe = Tokenizer.from_metadata(bpe_with_special())
spm = Tokenizer.from_metadata(spm_metadata(trained_sentencepiece()))
both = pytest.mark.parametrize("tokenizer", [bpe, spm], ids=["bpe", "spm"])


@pytest.fixture(scope="module")
def smollm2():
    with read_gguf(demo_checkpoint()) as file:
        yield Tokenizer.from_metadata(file.metadata), file.metadata


@pytest.mark.demo_checkpoint
def test_smollm2_words_and_digits(smollm2):
    """The pre-tokeniser separates every numeral (Nd, Nl, No) before it cuts words."""
    tokenizer, _ = smollm2
    spelled = {
        "Hello world": ["Hello", "Ġworld"],
        "in 2026": ["in", "Ġ", "2", "0", "2", "6"],
        "½Ⅷ": ["Â½", "â", "ħ", "§"],
        "a٣٤": ["a", "Ù", "£", "Ù", "¤"],
        "<|im_end|>": ["<", "|", "im", "_", "end", "|", ">"],
    }
    assert {text: [tokenizer.tokens[i] for i in tokenizer.encode(text)] for text in spelled} == spelled
    assert tokenizer.encode("<|im_end|>", parse_special=True) == [2]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eos_ids) == (1, 2, {0, 2})
    assert (tokenizer.vocab_size, tokenizer.add_bos, tokenizer.add_eos) == (49152, False, False)


@pytest.mark.demo_checkpoint
@given(text=st.text(st.characters(exclude_categories=["Cc", "Cs", "Cn", "Co"], max_codepoint=0x1FFFF)))
@example(text="Roofs, llamas & 3 kernels:\n\n  isn't it ½Ⅷ٣ grand? 漢字 🙂")
def test_smollm2_equals_the_published_pipeline(smollm2, text):
    """The pipeline of SmolLM2's tokenizer.json: single digits, GPT-2's splitter, the merges of the file."""
    tokenizer, metadata = smollm2
    published = _published_smollm(metadata)
    assert tokenizer.encode(text) == published.encode(text).ids
    assert tokenizer.decode(tokenizer.encode(text)) == text


def _published_smollm(metadata, cache={}):  # noqa: B006
    if not cache:
        vocab = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
        merges = [tuple(line.split(" ")) for line in metadata["tokenizer.ggml.merges"]]
        cache[0] = HubTokenizer(models.BPE(vocab, merges))
        digits, words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
        cache[0].pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    return cache[0]


@both
@given(data=st.data())
def test_stream_equals_decode_and_never_shows_half_a_character(tokenizer, data):
    text = data.draw(st.text())
    ids = tokenizer.encode(text, parse_special=True)
    stream = tokenizer.stream(skip_special=False)
    pieces = [stream.feed(i) for i in ids]
    assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in text
    assert stream.flush() == ""
    assert "".join(pieces) == tokenizer.decode(ids)


@both
@given(data=st.data())
def test_stream_of_any_ids_equals_decode_of_their_bytes(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1)))
    stream = tokenizer.stream(skip_special=False)
    text = "".join([stream.feed(i) for i in ids]) + stream.flush()
    assert text == tokenizer.decode(ids)
    if not tokenizer.add_space_prefix:
        assert text == b"".join(tokenizer.piece(i).data for i in ids).decode(errors="replace")


def test_an_unfinished_character_waits_and_then_is_replaced():
    stream = bpe.stream()
    byte_ids = [bpe.tokens.index(BYTE_ALPHABET[byte]) for byte in "🙂".encode()]
    assert [stream.feed(i) for i in byte_ids] == ["", "", "", "🙂"]
    assert [stream.feed(i) for i in byte_ids[:3]] == ["", "", ""]
    assert stream.flush() == "\ufffd"
    assert stream.feed(byte_ids[0]) == ""


def test_special_tokens_by_type():
    ids = {text: bpe.tokens.index(text) for text in SPECIAL}
    text = "a<tool>s b<tool><|start|>[PAD]<|end|>"
    plain = bpe.encode(text)
    assert [i for i in plain if bpe.tokens[i] in SPECIAL] == [ids["<tool>s"], ids["<tool>"]]
    parsed = bpe.encode(text, parse_special=True)
    assert [bpe.tokens[i] for i in parsed if bpe.tokens[i] in SPECIAL] == ["<tool>s", "<tool>", "<|start|>", "<|end|>"]
    assert bpe.decode(plain) == bpe.decode(parsed) == text
    assert bpe.decode(parsed, skip_special=True) == "a<tool>s b<tool>[PAD]"
    assert bpe.decode([ids["[PAD]"]], skip_special=True) == ""


def test_end_of_generation_ids():
    """The file's eos, eot and eom, and the known end tokens; none of them is shown."""
    ends = {bpe.tokens.index("<|end|>"), bpe.tokens.index("<|endoftext|>")}
    assert bpe.eos_ids == ends
    more = Tokenizer.from_metadata(bpe_with_special(eos_token_id=7, eot_token_id=8, eom_token_id=np.uint32(9)))
    assert more.eos_ids == ends | {7, 8, 9}
    assert more.eos_id == 7
    assert more.decode(more.eos_ids, skip_special=True) == ""


@pytest.mark.parametrize("kind", [1, 4, 5])
def test_an_end_token_is_one_whatever_its_type(kind):
    metadata = bpe_with_special()
    metadata["tokenizer.ggml.token_type"][bpe.tokens.index("<|end|>")] = kind
    with pytest.warns(UserWarning, match=r"mistypes '<\|end\|>': read as what they spell, the end of a turn"):
        tokenizer = Tokenizer.from_metadata(metadata)
    assert tokenizer.eos_ids == bpe.eos_ids
    for parse_special in (False, True):
        ids = bpe.encode("a<|end|>b", parse_special=parse_special)
        assert tokenizer.encode("a<|end|>b", parse_special=parse_special) == ids
        assert tokenizer.decode(ids, skip_special=True) == bpe.decode(ids, skip_special=True)


@pytest.mark.parametrize(("kind", "bos", "ends"), [(3, 0, True), (4, 1, True), (4, 0, False), (1, 0, False)])
def test_a_closing_s_ends_a_text_where_it_is_no_html_tag(kind, bos, ends):
    """In Gemma's vocabulary <s> and </s> are tags, and other tokens begin and end texts."""
    tokens = [*BYTE_ALPHABET, "<bos>", "<s>", "</s>", "<eos>"]
    metadata = bpe_metadata(tokens, [], types=[1] * 256 + [3, 4, kind, 3], bos_token_id=256 + bos)
    assert Tokenizer.from_metadata(metadata).eos_ids == ({258, 259} if ends else {259})


def test_without_token_types_tokens_that_look_special_are():
    with pytest.warns(UserWarning, match="tokenizer.ggml.token_type is missing"):
        tokenizer = Tokenizer.from_metadata(bpe_with_special() | {"tokenizer.ggml.token_type": None})
    text = "a<|start|> b<|end|>"
    for parse_special in (False, True):
        assert tokenizer.encode(text, parse_special=parse_special) == bpe.encode(text, parse_special=parse_special)
    assert tokenizer.eos_ids == bpe.eos_ids


@pytest.mark.parametrize("name", ["bos", "eot", "eom", "padding", "unknown"])
@pytest.mark.parametrize("value", [999, -1, np.uint32(2**32 - 1)])
def test_an_id_out_of_range_that_is_not_used_is_said(name, value):
    metadata = bpe_with_special() | {f"tokenizer.ggml.{name}_token_id": value}
    with pytest.warns(UserWarning, match=f"{name}_token_id = {value} is not in the vocabulary, ids 0 to 4"):
        tokenizer = Tokenizer.from_metadata(metadata)
    assert tokenizer.encode("the roof") == bpe.encode("the roof")
    assert tokenizer.eos_ids == bpe.eos_ids


@pytest.mark.filterwarnings("ignore:tokenizer.ggml.bos_token_id = 999 is no id")
def test_a_bos_out_of_range_that_is_added_is_refused():
    for metadata in (bpe_with_special(add_bos_token=True), spm_metadata(trained_sentencepiece())):
        with pytest.raises(TokenizerError, match="bos_token_id is missing, or is not in the vocabulary: a tokenizer"):
            Tokenizer.from_metadata(metadata | {"tokenizer.ggml.bos_token_id": 999})


def test_bos_and_eos_are_added_once():
    tokenizer = Tokenizer.from_metadata(bpe_with_special(eos_token_id=1, add_bos_token=True, add_eos_token=True))
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    words = tokenizer.encode("the roof", add_special=False)
    assert tokenizer.encode("the roof") == [bos, *words, eos]
    assert tokenizer.encode("<|start|>the roof", parse_special=True) == [bos, *words, eos]
    assert tokenizer.encode("") == [bos, eos]
    assert Tokenizer.from_metadata(bpe_with_special()).encode("the roof") == words
    assert Tokenizer.from_metadata(bpe_with_special(pre="llama-bpe")).add_bos
    assert not Tokenizer.from_metadata(bpe_with_special(pre="llama-bpe", add_bos_token=False)).add_bos
    assert spm.encode("the roof")[0] == spm.bos_id
    with_eos = Tokenizer.from_metadata(spm_metadata(trained_sentencepiece(), add_bos_token=False, add_eos_token=True))
    assert with_eos.encode("") == [with_eos.eos_id]


@pytest.mark.parametrize("template", ["{{ bos_token }}", ""])
@pytest.mark.parametrize("adds_bos", [True, False])
def test_a_chat_begins_with_one_bos_at_most(template, adds_bos):
    template += "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"
    metadata = bpe_with_special(add_bos_token=adds_bos, eos_token_id=1, add_eos_token=True)
    tokenizer = Tokenizer.from_metadata(metadata | {"tokenizer.chat_template": template})
    ids = tokenizer.encode_chat([{"role": "user", "content": "the roof"}])
    begun = adds_bos or "bos" in template
    assert ids.count(tokenizer.bos_id) == begun
    assert ids == [tokenizer.bos_id] * begun + tokenizer.encode(
        "the roof<|end|>", add_special=False, parse_special=True
    )


def test_named_chat_templates():
    key, messages = "tokenizer.chat_template", [{"role": "user", "content": "the roof"}]
    named = {f"{key}.tool_use": "{{ tools|length }} tool", f"{key}s": ["tool_use"]}
    tokenizer = Tokenizer.from_metadata(bpe_with_special() | named | {key: "plain"})
    assert tokenizer.chat_templates == {"default": "plain", "tool_use": "{{ tools|length }} tool"}
    assert tokenizer.apply_chat_template(messages) == tokenizer.chat_template == "plain"
    assert tokenizer.apply_chat_template(messages, tools=[{}]) == "1 tool"
    alone = Tokenizer.from_metadata(bpe_with_special() | named)
    assert alone.chat_template is None
    assert alone.apply_chat_template(messages, tools=[{}]) == "1 tool"
    with pytest.raises(ChatTemplateError, match="no chat template named 'default': its templates are 'tool_use'"):
        alone.apply_chat_template(messages)
    with pytest.raises(TokenizerError, match=r"tokenizer.chat_template.tool_use is a int: it must be a string"):
        Tokenizer.from_metadata(bpe_with_special() | {f"{key}.tool_use": 5})


@pytest.mark.parametrize("bad", ["\ud800", "ok \udfff"])
@both
def test_lone_surrogates_are_refused(tokenizer, bad):
    with pytest.raises(TokenizerError, match=f"character {len(bad) - 1} of the text is .*: a lone surrogate"):
        tokenizer.encode(bad)


@pytest.mark.parametrize("bad", [-1, bpe.vocab_size, np.int64(2**40)])
def test_ids_out_of_range_are_refused(bad):
    with pytest.raises(TokenizerError, match=f"token id {bad}: ids of this vocabulary are 0 to {bpe.vocab_size - 1}"):
        bpe.decode([bad])


@pytest.mark.parametrize("bad", [None, 5, "ab", np.int64(5), [None], ["a"], [[1]]], ids=repr)
def test_what_is_no_ids_is_refused(bad):
    with pytest.raises(TokenizerError, match="instead of token ids: token ids are whole numbers"):
        bpe.decode(bad)


def _with(**keys):
    changes = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    changed = bpe_metadata(list(BYTE_ALPHABET), []) | changes
    return {key: value for key, value in changed.items() if value is not None}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "tokenizer.ggml.model is missing: supported kinds of tokenizer are gpt2, llama"),
        (_with(model="t5"), "tokenizer.ggml.model = 't5': supported kinds of tokenizer are gpt2, llama"),
        (_with(model=3), "tokenizer.ggml.model is a int: it must be a string"),
        (_with(tokens=None), "tokenizer.ggml.tokens is missing"),
        (_with(tokens="abc"), "tokenizer.ggml.tokens is a str: it must be an array"),
        (_with(tokens=[]), "tokenizer.ggml.tokens is empty"),
        (_with(tokens=["a", 7]), r"tokens\[1\] = 7: every element must be a string"),
        (_with(tokens=["a", "b", "a"]), r"tokens\[0\] = 'a' occurs again at 2: tokens must be distinct"),
        (_with(tokens=["a", ""]), r"tokens\[1\] = '': a token must not be empty"),
        (_with(token_type=np.ones(255, np.int32)), "token_type has 255 elements and tokenizer.ggml.tokens has 256"),
        (_with(token_type=np.ones(256, np.float32)), "holds float32 in 1 dimensions: it must be a flat array of whole"),
        (_with(token_type=np.ones((2, 128), np.int32)), "holds int32 in 2 dimensions"),
        (_with(token_type=np.arange(256)), r"token_type\[0\] = 0: token types are 1 normal"),
        (_with(token_type=["1"] * 256), "it must be a flat array of whole numbers"),
        (_with(merges=None), "merges is missing"),
        (_with(merges=np.zeros(3)), r"merges\[0\] = .*: every element must be a string"),
        (_with(merges=["th"]), r"merges\[0\] = 'th': a merge joins two tokens into a third"),
        (_with(eos_token_id=256), "eos_token_id = 256: it must be an id of the vocabulary, 0 to 255"),
        (_with(eos_token_id=-1), "eos_token_id = -1"),
        (_with(bos_token_id=2.0), "bos_token_id = 2.0"),
        (_with(bos_token_id="x"), "bos_token_id = 'x'"),
        (_with(eot_token_id=True), "eot_token_id = True"),
        (_with(add_bos_token=1), "add_bos_token = 1: it must be a boolean"),
        (
            _with(add_eos_token=True),
            "eos_token_id is missing, or is not in the vocabulary: a tokenizer that adds EOS",
        ),
        (_with(pre=["smollm"]), "tokenizer.ggml.pre is a list: it must be a string"),
        (_with() | {"tokenizer.chat_template": 5}, "tokenizer.chat_template is a int: it must be a string"),
    ],
)
def test_bad_metadata_is_refused(metadata, message):
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_metadata(metadata)


SPM = {"model": "llama", "scores": [0.0] * VOCABULARY}


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("model", {"model": "wordpiece"}),
        ("pre", {"pre": "bloom"}),
        ("tokens", {"tokens": ["a", "a"]}),
        ("token_type", {"token_type": [1, 2, 3]}),
        ("merges", {"merges": ["a"]}),
        ("eos_token_id", {"eos_token_id": VOCABULARY}),
        ("add_bos_token", {"add_bos_token": 1}),
        ("scores", SPM | {"scores": [float("nan")] * VOCABULARY}),
        ("tokens", SPM | {"token_type": [6] * VOCABULARY}),
    ],
)
def test_what_is_wrong_in_a_file_is_named_with_its_byte(key, changes, tmp_path):
    changes = {f"tokenizer.ggml.{name}": value for name, value in changes.items()}
    path, key = write_small(tmp_path / "small.gguf", changes), f"tokenizer.ggml.{key}"
    byte = path.read_bytes().index(struct.pack("<Q", len(key)) + key.encode()) + 8 + len(key) + 4
    with pytest.raises(TokenizerError, match=re.escape(f"{path}, byte {byte}: {key}")):
        open_tokenizer(path)


@pytest.mark.parametrize("source", ["file", "folder"])
def test_a_vocabulary_of_150_thousand_loads_in_two_seconds(source, tmp_path):
    """A vocabulary of Qwen's size, from a GGUF file and from a folder."""
    tokens, merges, level = list(BYTE_ALPHABET), [], BYTE_ALPHABET[33:127]
    while len(merges) < 150_000:
        pairs = [(left, right) for left in level for right in BYTE_ALPHABET[97:123]][: 150_000 - len(merges)]
        merges += [f"{left} {right}" for left, right in pairs]
        level = [left + right for left, right in pairs]
        tokens += level
    if source == "file":
        metadata = bpe_metadata(tokens, merges) | {"tokenizer.ggml.token_type": [1] * len(tokens)}
        path = write_gguf(tmp_path / "large.gguf", {"general.architecture": "qwen2"} | metadata, {})
    else:
        path = tmp_path
        pairs = [tuple(merge.split(" ")) for merge in merges]
        made = HubTokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, pairs))
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
        made.save(str(tmp_path / "tokenizer.json"))

    def load():
        tokenizer = open_tokenizer(path)
        tokenizer.encode("the first text")
        return tokenizer

    tokenizer = within_seconds(2.0, load)
    assert tokenizer.vocab_size == 150_256
