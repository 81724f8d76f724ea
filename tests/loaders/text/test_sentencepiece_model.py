"""tokenizer.model files against the sentencepiece library, and files that are damaged or contradict their folder."""

import contextlib
import functools
import json
import math
import re
import tempfile
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import example, given
from hypothesis import strategies as st
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from rooflama.loaders.text.folder import read_folder_tokenizer
from rooflama.loaders.text.tokenizer import TokenizerError
from vocabularies import spm_metadata, texts, trained_sentencepiece


def write_model(folder, model=None, config=None, **files):
    (folder / "tokenizer.model").write_bytes(trained_sentencepiece() if model is None else model)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **(config or {})}
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in names.items() if v is not None}))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@functools.cache
def of_model():
    with tempfile.TemporaryDirectory() as folder:
        return read_folder_tokenizer(write_model(Path(folder)))


@given(text=texts)
@example(text=" a  roof \u2581 \U0010ffff\0")
@example(text="text] tele")  # the scores decide which merge goes first
def test_tokenizer_model_equals_sentencepiece(text):
    original = sentencepiece.SentencePieceProcessor(model_proto=trained_sentencepiece())
    assert of_model().encode(text, add_special=False) == original.encode(text)
    assert of_model().decode(of_model().encode(text), skip_special=True) == text.replace("\u2581", " ")


def test_tokenizer_model_says_what_gguf_metadata_says():
    ours, metadata = of_model(), spm_metadata(trained_sentencepiece())
    assert list(ours.tokens) == metadata["tokenizer.ggml.tokens"]
    assert ours._vocabulary.types.tolist() == metadata["tokenizer.ggml.token_type"].tolist()
    assert (ours.bos_id, ours.eos_id, ours.unk_id, ours.add_bos, ours.add_eos) == (1, 2, 0, True, False)


def test_added_tokens_follow_the_pieces_of_a_tokenizer_model(tmp_path):
    added = {"430": {"content": "<|user|>", "special": True}, "431": {"content": "<tool>", "special": False}}
    config = {"added_tokens_decoder": added, "add_bos_token": False, "add_eos_token": True}
    ours = read_folder_tokenizer(write_model(tmp_path, config=config))
    assert ours.encode("<|user|>the<tool>", parse_special=True, add_special=False)[0] == 430
    ids = ours.encode("<|user|>the<tool>")
    assert 430 not in ids
    assert ids[-2:] == [431, 2]
    assert ids[0] != 1
    older = write_model(tmp_path, added_tokens={"<|user|>": 430}, special_tokens_map={})
    assert read_folder_tokenizer(older).encode("<|user|>", add_special=False) == [430]


def model_and(trainer=None, normalizer=None, pieces=()):
    """The trained model file with further fields; of a repeated setting, the last one counts."""
    more = ModelProto(trainer_spec=trainer, normalizer_spec=normalizer, pieces=pieces)
    return trained_sentencepiece() + more.SerializeToString()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": b""}, "no pieces"),
        ({"model": b"IQ== 0\nIg== 1\n"}, "no pieces"),  # Llama 3's original
        ({"model": trained_sentencepiece()[:-5]}, "not a SentencePiece model"),
        ({"model": trained_sentencepiece()[:2000]}, "not a SentencePiece model"),
        ({"model": trained_sentencepiece() + b"\x0a\x03\x0a\x01\xff"}, "not a SentencePiece model (piece b'\\xff')"),
        (
            {"model": trained_sentencepiece() + b"\x0a\x05\x0a\x03\xed\xa0\x80"},
            "not a SentencePiece model (piece b'\\xed",
        ),
        ({"model": trained_sentencepiece() + b"\x0a\x05\x0a\x01x\x18\x07"}, "(SentencePiece.type = 7)"),
        ({"model": trained_sentencepiece() + b"\x0a\x02\x08\x05"}, "(SentencePiece.piece = 5)"),
        ({"model": trained_sentencepiece() + b"\x10\x05"}, "(ModelProto.trainer_spec = 5)"),
        ({"model": trained_sentencepiece() + b"\x12\x02\x18\x09"}, "(TrainerSpec.model_type = 9)"),
        ({"model": trained_sentencepiece() + b"\x1a\x03\x22\x01\x01"}, "(NormalizerSpec.remove_extra_whitespaces = b"),
        ({"model": model_and(trainer={"model_type": "UNIGRAM"})}, "model_type 1"),
        ({"model": model_and(trainer={"treat_whitespace_as_suffix": True})}, "treat_whitespace_as_suffix"),
        ({"model": model_and(normalizer={"remove_extra_whitespaces": True})}, "text is encoded without normalisation"),
        ({"model": model_and(normalizer={"precompiled_charsmap": b"1234"})}, "text is encoded without normalisation"),
        ({"model": model_and(normalizer={"escape_whitespaces": False})}, "no escape_whitespaces"),
        ({"model": model_and(pieces=[{"score": 1.0}])}, "tokens[430] = ''"),
        ({"model": model_and(pieces=[{"piece": "x y", "score": math.nan}])}, "scores[430] = nan"),
        ({"config": {"bos_token": "<bos>"}}, "no token '<bos>'"),
        ({"config": {"added_tokens_decoder": {"1": {"content": "<bos>"}}}}, "'<s>' at id 1, where"),
        ({"config": {"added_tokens_decoder": {"440": {"content": "<x>"}}}}, "the end, 430 pieces at id 440"),
        ({"config": {"added_tokens_decoder": {"430": {"content": "<x>", "rstrip": True}}}}, "strips spaces"),
        ({"added_tokens": {"<x>": "430"}}, "'<x>' has id '430'"),
    ],
)
def test_bad_tokenizer_models_are_refused(content, message, tmp_path):
    with pytest.raises(TokenizerError, match=re.escape(message)):
        read_folder_tokenizer(write_model(tmp_path, **content))


def test_every_truncation_of_a_tokenizer_model_is_refused_or_read(tmp_path):
    """A file cut at the end of a field still parses, but lacks settings or tokens."""
    whole = trained_sentencepiece()
    for size in range(0, len(whole), 61):
        with pytest.raises(TokenizerError):
            read_folder_tokenizer(write_model(tmp_path, whole[:size]))


@given(data=st.data())
def test_damaged_bytes_of_a_tokenizer_model_are_refused_or_read(data):
    damaged = bytearray(trained_sentencepiece())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(damaged)))
        damaged[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(TokenizerError):
        tokenizer = read_folder_tokenizer(write_model(Path(folder), damaged))
        assert all(isinstance(token, str) for token in tokenizer.tokens)


def test_every_end_of_generation_config_counts_beside_a_model_file(tmp_path):
    ours = read_folder_tokenizer(write_model(tmp_path, generation_config={"eos_token_id": [2, 7]}))
    assert ours.eos_ids == {2, 7, ours.tokens.index("<|end|>")}


def test_an_end_beyond_the_vocabulary_of_a_model_file_is_not_used(tmp_path):
    with pytest.warns(UserWarning, match="430 tokens, and eos_token_id 430 in another file; not used"):
        ours = read_folder_tokenizer(write_model(tmp_path, generation_config={"eos_token_id": [2, 430]}))
    assert ours.eos_ids == {2, ours.tokens.index("<|end|>")}


def test_settings_of_the_model_file_decide_about_the_space_before_a_text(tmp_path):
    no_prefix = model_and(normalizer={"add_dummy_prefix": False})
    ours = read_folder_tokenizer(write_model(tmp_path, no_prefix))
    original = sentencepiece.SentencePieceProcessor(model_proto=no_prefix)
    assert not ours.add_space_prefix
    assert ours.encode("the roof", add_special=False) == original.encode("the roof")


def test_phi3_special_tokens_of_a_model_file_swallow_the_whitespace_after_them(tmp_path):
    added = {"430": {"content": "<|user|>", "special": True, "rstrip": True}}
    write_model(tmp_path, config={"added_tokens_decoder": added})
    (tmp_path / "config.json").write_text('{"model_type": "phi3"}')
    ours = read_folder_tokenizer(tmp_path)
    pieces = [ours.tokens[i] for i in ours.encode("<|user|>\n the", parse_special=True)]
    assert pieces == ["<s>", "<|user|>", "\u2581the"]


def test_a_padding_token_that_is_a_word_remains_one(tmp_path):
    plain = read_folder_tokenizer(write_model(tmp_path))
    with pytest.warns(UserWarning, match="'\u2581the', the pad_token of another file, is a word and stays one"):
        ours = read_folder_tokenizer(write_model(tmp_path, config={"pad_token": "\u2581the"}))
    assert ours.encode("the roof") == plain.encode("the roof")
    assert ours.decode(ours.encode("the roof"), skip_special=True) == "the roof"


def test_special_tokens_that_the_model_has_not_are_new_ones(tmp_path):
    config = {"pad_token": "[PAD]", "additional_special_tokens": ["<x>", "<|end|>"]}
    with pytest.warns(UserWarning, match=r"no token '\[PAD\]', which another file names; it is added as id 430"):
        ours = read_folder_tokenizer(write_model(tmp_path, config=config))
    assert (ours.pad_id, ours.vocab_size) == (430, 432)
    assert ours.encode("[PAD]<x>", parse_special=True, add_special=False) == [430, 431]
    assert ours.encode("[PAD]<x>") == of_model().encode("[PAD]<x>")
