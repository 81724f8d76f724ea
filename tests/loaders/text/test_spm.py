"""SentencePiece vocabularies rebuilt from metadata, against the sentencepiece model that the metadata describes."""

import functools
import itertools
import re
import warnings

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given
from hypothesis import strategies as st
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from rooflama.loaders.text.tokenizer import Tokenizer, TokenizerError
from vocabularies import published_phi3_metadata, spm_metadata, trained_sentencepiece, without_tokens

texts = st.text() | st.lists(st.sampled_from(["the", "roof", " ", "  ", "\n", "\t", "12", "é", "漢", "🙂", "\0"])).map(
    "".join
)


@functools.cache
def original(byte_fallback=True):
    return sentencepiece.SentencePieceProcessor(model_proto=trained_sentencepiece(byte_fallback))


@functools.cache
def rebuilt(byte_fallback=True):
    return Tokenizer.from_metadata(spm_metadata(trained_sentencepiece(byte_fallback)))


def with_user_defined(**keys):
    """The trained vocabulary with <tool> as an additional user-defined token."""
    metadata = spm_metadata(trained_sentencepiece(), **keys)
    metadata["tokenizer.ggml.tokens"].append("<tool>")
    metadata["tokenizer.ggml.scores"] = np.append(metadata["tokenizer.ggml.scores"], np.float32(0))
    metadata["tokenizer.ggml.token_type"] = np.append(metadata["tokenizer.ggml.token_type"], np.int32(4))
    return metadata


@pytest.mark.parametrize("byte_fallback", [True, False])
@given(text=texts)
@example(text=" a  roof \u2581 \U0010ffff\0")
@example(text="text] tele")  # the scores decide which merge goes first
def test_encode_equals_sentencepiece(byte_fallback, text):
    assert rebuilt(byte_fallback).encode(text, add_special=False) == original(byte_fallback).encode(text)


@given(text=texts)
@example(text="the roof")
def test_unused_pieces_are_steps_of_a_merge_as_in_sentencepiece(text):
    """An unused word is never a result, but can become part of a longer word."""
    ours, theirs = with_unused_words()
    assert ours.encode(text, add_special=False) == theirs.encode(text)


@functools.cache
def with_unused_words():
    model = ModelProto.FromString(trained_sentencepiece())
    for piece in model.pieces:
        if piece.piece in ("\u2581the", "\u2581t", "oof"):
            piece.type = ModelProto.SentencePiece.UNUSED
    model = model.SerializeToString()
    return Tokenizer.from_metadata(spm_metadata(model)), sentencepiece.SentencePieceProcessor(model_proto=model)


@given(text=texts)
@example(text="  two before, two after  ")
@example(text="")
def test_decode_gives_back_the_text(text):
    """The vocabulary writes a space as U+2581, so that character is decoded as a space."""
    ids = rebuilt().encode(text)
    assert rebuilt().decode(ids, skip_special=True) == text.replace("\u2581", " ")
    assert rebuilt().decode(ids) == "<s>" + text.replace("\u2581", " ")


@given(ids=st.lists(st.integers(0, 429)))
@example(ids=[36, 387])  # a byte that is a space, at the start
def test_decode_of_any_ids_equals_sentencepiece(ids):
    """Without control and unknown tokens. The number of U+FFFD for a run of invalid bytes is not compared."""
    ids = [i for i in ids if not (original().is_control(i) or original().is_unknown(i))]
    ours, theirs = (re.sub("\ufffd+", "\ufffd", text) for text in (rebuilt().decode(ids), original().decode(ids)))
    assert ours == theirs


def test_a_space_goes_before_the_text_and_after_special_tokens():
    tokenizer = rebuilt()
    assert [tokenizer.tokens[i] for i in tokenizer.encode("the<|end|>the", parse_special=True)] == [
        "<s>", "\u2581the", "<|end|>", "\u2581the",
    ]  # fmt: skip
    assert tokenizer.decode(tokenizer.encode("the<|end|>the", parse_special=True)) == "<s>the<|end|>the"


def test_no_space_prefix_where_the_file_says_so():
    tokenizer = Tokenizer.from_metadata(spm_metadata(trained_sentencepiece(), add_space_prefix=False))
    ids = tokenizer.encode(" the", add_special=False)
    assert [tokenizer.tokens[i] for i in ids] == ["\u2581the"]
    assert tokenizer.decode(ids) == " the"
    assert tokenizer.encode("the", add_special=False) != ids


def test_a_stream_that_continues_a_prompt_keeps_its_first_space():
    tokenizer = rebuilt()
    the, end = tokenizer.tokens.index("\u2581the"), tokenizer.tokens.index("<|end|>")
    assert tokenizer.stream().feed(the) == "the"
    assert tokenizer.stream(after=the).feed(the) == " the"
    assert tokenizer.stream(after=end).feed(the) == "the"


def test_user_defined_tokens_are_found_in_plain_text_and_control_tokens_are_not():
    tokenizer = Tokenizer.from_metadata(with_user_defined())
    tool, end = tokenizer.tokens.index("<tool>"), tokenizer.tokens.index("<|end|>")
    ids = tokenizer.encode("the<tool> roof<|end|>")
    assert tool in ids
    assert end not in ids
    assert tokenizer.decode(ids, skip_special=True) == "the<tool> roof<|end|>"
    assert end in tokenizer.encode("roof<|end|>", parse_special=True)


def test_phi3_special_tokens_swallow_the_whitespace_after_them():
    """<|end|> strips, <s> does not; with another architecture, neither does."""
    text = "<s>\ni<|end|>\n \u00a0the"
    pieces = {}
    for arch in ("phi3", "llama"):
        metadata = spm_metadata(trained_sentencepiece()) | {"general.architecture": arch}
        tokenizer = Tokenizer.from_metadata(metadata)
        pieces[arch] = [tokenizer.tokens[i] for i in tokenizer.encode(text, parse_special=True)]
    assert pieces["phi3"] == ["<s>", "\u2581", "<0x0A>", "i", "<|end|>", "\u2581the"]
    assert pieces["llama"][:8] == ["<s>", "\u2581", "<0x0A>", "i", "<|end|>", "\u2581", "<0x0A>", "\u2581"]


def test_customary_ids_where_the_file_names_none():
    metadata = spm_metadata(trained_sentencepiece(), bos_token_id=None, eos_token_id=None, unknown_token_id=None)
    tokenizer = Tokenizer.from_metadata(metadata)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id) == (1, 2, 0)
    metadata["tokenizer.ggml.token_type"][1] = 1
    with pytest.raises(
        TokenizerError, match="bos_token_id is missing, or is not in the vocabulary: a tokenizer that adds BOS"
    ):
        Tokenizer.from_metadata(metadata)


def _change(key, index, value):
    metadata = spm_metadata(trained_sentencepiece())
    array = metadata[f"tokenizer.ggml.{key}"]
    array[index] = value
    return metadata


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (lambda: spm_metadata(trained_sentencepiece(), scores=None), r"scores is missing"),
        (lambda: _change("scores", 300, np.nan), r"scores\[300\] = nan: scores must be finite"),
        (
            lambda: _change("token_type", 400, 6),
            r"tokens\[400\] = '.+', typed as a byte: byte tokens are spelled",
        ),
        (lambda: spm_metadata(trained_sentencepiece(), remove_extra_whitespaces=True), "without normalisation"),
        (
            lambda: spm_metadata(trained_sentencepiece(), precompiled_charsmap=np.zeros(4, np.uint8)),
            "without normalisation",
        ),
    ],
)
def test_bad_metadata_is_refused(metadata, message):
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_metadata(metadata())


# Vocabularies as older converters and other tools wrote them.


@functools.cache
def published_phi3():
    with pytest.warns(UserWarning, match="mistypes '<|end|>', '<|eot_id|>': read as what they spell"):
        return Tokenizer.from_metadata(published_phi3_metadata())


@given(text=texts)
@example(text="the [PAD1] roof<|end|><unk> 漢<|user|>")
def test_published_phi3_encodes_plain_text_as_sentencepiece(text):
    """In plain text only the user-defined <|user|> is special, and whitespace after it is stripped."""
    tokenizer = published_phi3()
    expected, user = [], tokenizer.tokens.index("<|user|>")
    for i, part in enumerate(text.split("<|user|>")):
        stripped = re.sub(r"^[\s]+", "", part) if i else part
        expected += [user] * (i > 0) + original().encode(stripped)
    assert tokenizer.encode(text, add_special=False) == expected


def test_published_phi3_special_tokens():
    tokenizer = published_phi3()
    ids = tokenizer.encode("the[PAD2]\n the<unk>\t<|end|>", parse_special=True)
    pieces = ["<s>", "\u2581the", "[PAD2]", "\u2581the", "<unk>", "\u2581", "<0x09>", "<|end|>"]
    assert [tokenizer.tokens[i] for i in ids] == pieces
    assert {tokenizer.tokens[i] for i in tokenizer.eos_ids} == {"</s>", "<|end|>", "<|eot_id|>", "<|endoftext|>"}
    assert tokenizer.decode(ids, skip_special=True) == "thethe\t"
    assert tokenizer.unk_id == 0


@pytest.mark.parametrize("kept", [b"\n", "é漢".encode(), bytes(range(128))])
@given(text=texts)
@example(text="é\n漢字🙂🙂\0 é🙂the")
def test_a_character_without_all_its_byte_tokens_is_one_unknown_token(kept, text):
    """The definition: sentencepiece's result with all 256 byte tokens, with each run of such characters as <unk>."""
    pieces, expected = original().encode(text, out_type=str), []
    for of_bytes, run in itertools.groupby(pieces, lambda piece: re.fullmatch("<0x..>", piece) is not None):
        if not of_bytes:
            expected += run
            continue
        characters = bytes(int(piece[3:5], 16) for piece in run).decode()
        for covered, group in itertools.groupby(characters, lambda c: set(c.encode()) <= set(kept)):
            expected += [f"<0x{byte:02X}>" for byte in "".join(group).encode()] if covered else ["<unk>"]
    tokenizer = with_byte_tokens(kept)
    assert [tokenizer.tokens[i] for i in tokenizer.encode(text, add_special=False)] == expected


@functools.cache
def with_byte_tokens(kept):
    metadata = spm_metadata(trained_sentencepiece())
    tokens = metadata["tokenizer.ggml.tokens"]
    dropped = {tokens.index(f"<0x{byte:02X}>") for byte in range(256) if byte not in kept}
    with pytest.warns(UserWarning, match=f"has {len(kept)} byte tokens of 256"):
        return Tokenizer.from_metadata(without_tokens(metadata, dropped))


@pytest.mark.parametrize("unknown", [{"unknown_token_id": None}, {"unknown_token_id": 999}])
def test_a_character_without_any_token_is_refused(unknown):
    metadata = spm_metadata(trained_sentencepiece(byte_fallback=False), **unknown)
    metadata["tokenizer.ggml.token_type"][0] = 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer = Tokenizer.from_metadata(metadata)
    assert tokenizer.encode("the roof") == rebuilt(False).encode("the roof")
    with pytest.raises(TokenizerError, match="character '🙂': this vocabulary has no word with it"):
        tokenizer.encode("the 🙂")


def test_an_unknown_id_out_of_range_leaves_the_customary_one():
    metadata = spm_metadata(trained_sentencepiece(byte_fallback=False), unknown_token_id=999)
    with pytest.warns(
        UserWarning, match="unknown_token_id = 999 is not in the vocabulary, ids 0 to 149; it is not used"
    ):
        tokenizer = Tokenizer.from_metadata(metadata)
    assert tokenizer.encode("the 🙂") == rebuilt(False).encode("the 🙂")


def test_a_pre_tokenizer_of_a_sentencepiece_vocabulary_is_said_to_be_unused():
    with pytest.warns(UserWarning, match="tokenizer.ggml.pre = 'llama-spm' is not used by SentencePiece vocabularies"):
        tokenizer = Tokenizer.from_metadata(spm_metadata(trained_sentencepiece(), pre="llama-spm"))
    assert tokenizer.encode("the 12 🙂") == rebuilt().encode("the 12 🙂")


def test_an_unknown_token_that_is_a_word_is_still_that_word():
    """With all byte tokens, no text becomes the unknown token."""
    the = rebuilt().tokens.index("\u2581the")
    tokenizer = Tokenizer.from_metadata(spm_metadata(trained_sentencepiece(), unknown_token_id=the))
    assert tokenizer.encode("the 🙂") == rebuilt().encode("the 🙂")


@given(text=texts)
@example(text="the </s> <|end|> 🙂")
def test_a_byte_typed_as_a_word_is_a_byte(text):
    assert with_mistyped_bytes().encode(text) == rebuilt().encode(text)


@functools.cache
def with_mistyped_bytes():
    metadata = spm_metadata(trained_sentencepiece())
    types = metadata["tokenizer.ggml.token_type"]
    types[types == 6] = 1
    with pytest.warns(UserWarning, match=r"mistypes '<0x00>', '<0x01>', '<0x02>', '<0x03>', \.\.\.: read as what"):
        return Tokenizer.from_metadata(metadata)


@pytest.mark.parametrize("parse_special", [False, True])
@given(text=texts)
@example(text="<s>the </s> <|end|> <unk> <0x0A> 🙂")
def test_without_token_types_the_look_of_a_token_says_its_type(parse_special, text):
    tokenizer = without_types()
    assert tokenizer.encode(text, parse_special=parse_special) == rebuilt().encode(text, parse_special=parse_special)
    assert (tokenizer.eos_ids, tokenizer.unk_id) == (rebuilt().eos_ids, 0)
    assert tokenizer.decode(tokenizer.encode(text)) == rebuilt().decode(rebuilt().encode(text))


@functools.cache
def without_types():
    keys = {"token_type": None, "bos_token_id": None, "eos_token_id": None, "unknown_token_id": None}
    with pytest.warns(UserWarning, match="token_type is missing: tokens that look like"):
        return Tokenizer.from_metadata(spm_metadata(trained_sentencepiece(), **keys))
