"""tokenizer.json: the tokenizers library runs the file's own normaliser, pre-tokeniser, merges and added tokens.

The file is used unchanged. transformers 5 rebuilds some files (class LlamaTokenizer), with other rules for the space
after a special token.

The library's decoders need a whole text, so they are not used: each token has its bytes here, according to the decoder
in the file, and a stream can be decoded token by token.
"""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import models

from ..huggingface.json_files import parse_json
from .bpe import BYTE_ALPHABET, bytes_of_spelling, panics_as_errors, refuse_missing_bytes
from .settings import FLAGS, NAMED, AddedToken, TokenizerSettings, added_token, refuse
from .spm import SPACE
from .token_types import BYTE_TOKENS, MATCHED_WHOLE, TokenType, end_ids
from .tokenizer import Tokenizer
from .vocabulary import Vocabulary

PROBE = "a"  # a text that no normaliser changes
MODEL = "tokenizer.json"  # ``Vocabulary.model`` of this kind


@panics_as_errors()
def read_tokenizer_json(path: Path, settings: TokenizerSettings) -> Tokenizer:
    """The tokenizer of a tokenizer.json and the settings of its folder.

    Raises:
        HuggingFaceError: the file does not hold one JSON object.
        TokenizerError: the kind of the tokenizer is not supported, or the file contradicts the other files.
    """
    text = path.read_bytes()
    stored = parse_json(text, path)
    try:
        library = tokenizers.Tokenizer.from_buffer(text)
    except Exception as error:  # the library raises nothing more specific
        refuse(path, str(error), "the file is one that the tokenizers library can read")
    if not isinstance(library.model, models.BPE):
        refuse(
            path,
            f"a model of type {type(library.model).__name__}",
            "the tokenizers of these families are BPE",
            "Use a model of the Llama, Qwen or Phi-3 families",
        )
    library.no_truncation()
    library.no_padding()
    _add_tokens(library, stored, settings, path)
    _add_named(library, settings, path)
    spelling = _Spelling(library, path)
    before, after = _additions(library, path)
    vocabulary = _vocabulary(library, settings, spelling, before, path)
    for name, added, token_id in (("bos", before, vocabulary.bos_id), ("eos", after, vocabulary.eos_id)):
        if added not in ([], [token_id]):
            refuse(
                path,
                f"post_processor adds {[vocabulary.tokens[i] for i in added]}",
                f"it adds the {name}_token, here {settings.named.get(name)!r}, or nothing",
            )
        said = getattr(settings, f"add_{name}")
        if said is not None and said != bool(added):
            warnings.warn(
                f"{path}: its post_processor {'adds' if added else 'adds no'} {name.upper()}, and "
                f"tokenizer_config.json says add_{name}_token {str(said).lower()}; tokenizer.json is followed, as "
                "transformers does",
                stacklevel=6,
            )
    text_model = JsonText(library, vocabulary, spelling)
    text_model.settle_spelled_controls(settings, path)
    return Tokenizer(
        vocabulary, text_model, add_bos=bool(before), add_eos=bool(after), chat_templates=settings.chat_templates
    )


class JsonText:
    """Encodes text with special tokens to ids, and decodes ids to bytes."""

    unprefixed: Collection[TokenType] = MATCHED_WHOLE

    def __init__(self, library: tokenizers.Tokenizer, vocabulary: Vocabulary, spelling: _Spelling):
        self._library, self._vocabulary, self._spelling = library, vocabulary, spelling
        self._lock = threading.Lock()
        self.add_space_prefix = self._begins_with_space(self.encode(PROBE, parse_special=False))

    @panics_as_errors()
    def encode(self, text: str, *, parse_special: bool) -> list[int]:
        if self._spelling.missing_bytes:
            normalizer = self._library.normalizer
            refuse_missing_bytes(normalizer.normalize_str(text) if normalizer else text, self._spelling.missing_bytes)
        with self._lock:
            self._library.encode_special_tokens = not parse_special
            return self._library.encode(text, add_special_tokens=False).ids

    def token_bytes(self, token_id: int) -> bytes:
        token, kind = self._vocabulary.tokens[token_id], self._vocabulary.types[token_id]
        return self._spelling.to_bytes(token) if kind in (TokenType.NORMAL, TokenType.BYTE) else token.encode()

    def space_follows(self, token_id: int) -> bool:
        """As in ``TextModel``; determined by a trial, since it depends on several settings together."""
        if not self.add_space_prefix or self._vocabulary.types[token_id] not in MATCHED_WHOLE:
            return False
        if token_id == self._vocabulary.bos_id:
            return True
        first, *rest = self.encode(self._vocabulary.tokens[token_id] + PROBE, parse_special=True)
        return first == token_id and self._begins_with_space(rest)

    def _begins_with_space(self, ids: list[int]) -> bool:
        return bool(ids) and self.token_bytes(ids[0]).startswith(b" ")

    def settle_spelled_controls(self, settings: TokenizerSettings, path: Path) -> None:
        """Check that no plain text is encoded as a control token, through a merge or a word of the vocabulary.

        A word that is only the padding or the unknown token becomes a normal token; for any other, TokenizerError.
        """
        for token_id in self._vocabulary.of_type(TokenType.CONTROL):
            text = self._vocabulary.tokens[token_id]
            word = self._spelling.to_bytes(text).decode(errors="ignore")
            if not any(token_id in self.encode(t, parse_special=False) for t in {text, word, word.removeprefix(" ")}):
                continue
            if (role := settings.unused_role(text)) is None:
                refuse(
                    path,
                    f"plain text {text!r} is encoded as the control token of that name",
                    "a control token is not spelled by the vocabulary",
                    "Use the tokenizer of the model's original checkpoint",
                )
            self._vocabulary.types[token_id] = TokenType.NORMAL
            warnings.warn(
                f"{path}: {text!r}, the {role}_token, is a word of the vocabulary; it is shown as text, and where "
                "special tokens are read text is cut around it, as in transformers",
                stacklevel=7,
            )


class _Spelling:
    """How the vocabulary spells bytes, according to the decoder in the file."""

    def __init__(self, library: tokenizers.Tokenizer, path: Path):
        steps = _steps(json.loads(library.decoder.__getstate__()) if library.decoder else {"type": None})
        kinds = [step["type"] for step in steps]
        self._byte_level = kinds == ["ByteLevel"]
        self.byte_tokens = BYTE_TOKENS if "ByteFallback" in kinds else {}
        if not self._byte_level and not all(map(_spells_spaces, steps)):
            refuse(
                path,
                f"a decoder of {', '.join(map(str, kinds))}",
                f"it is ByteLevel, or turns {SPACE} into spaces and byte tokens into bytes",
                "Use a model of the Llama, Qwen or Phi-3 families",
            )
        alphabet = BYTE_ALPHABET if self._byte_level else []
        has_unknown = library.model.unk_token is not None
        self.missing_bytes = frozenset(
            byte for byte, letter in enumerate(alphabet) if not has_unknown and library.token_to_id(letter) is None
        )
        if not self._byte_level and not has_unknown and not library.model.byte_fallback:
            refuse(
                path,
                "neither an unk_token nor byte_fallback",
                "a character without a token is encoded, not dropped",
            )

    def to_bytes(self, token: str) -> bytes:
        if self._byte_level:
            return bytes_of_spelling(token)
        byte = self.byte_tokens.get(token)
        return token.replace(SPACE, " ").encode() if byte is None else bytes([byte])


def _steps(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for inner in decoder["decoders"] for step in _steps(inner)]


def _spells_spaces(step: dict[str, Any]) -> bool:
    match step:
        case {"type": "ByteFallback" | "Fuse"} | {"type": "Metaspace", "replacement": "\u2581"}:
            return True
        case {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}:
            return True
        case {"type": "Strip", "content": " ", "start": 1, "stop": 0}:
            return True
    return False


def _add_tokens(library: tokenizers.Tokenizer, stored: dict[str, Any], settings: TokenizerSettings, path: Path) -> None:
    """Add the tokens that only tokenizer_config.json has, or has with other flags; then compare all ids."""
    own = {entry["id"]: added_token(entry) for entry in stored.get("added_tokens") or []}
    for token_id, token in sorted(settings.added.items()):
        if own.get(token_id) != token:
            library.add_tokens([_as_library(token)])
    for token_id, token in {**own, **settings.added}.items():
        if (given := library.token_to_id(token.content)) != token_id:
            refuse(
                path,
                f"token {token.content!r} has id {given}, and {token_id} as an added token",
                "added tokens follow the vocabulary, and all files agree on their ids",
            )


def _add_named(library: tokenizers.Tokenizer, settings: TokenizerSettings, path: Path) -> None:
    """Make the tokens special that other files name, adding those that are missing, as in transformers."""
    special = {token.content for token in library.get_added_tokens_decoder().values()}
    for text in settings.special_texts:
        if library.token_to_id(text) is None:
            settings.allow_new(text, library.get_vocab_size(), path)
        if text not in special:
            library.add_special_tokens([_as_library(AddedToken(text, special=True, normalized=False))])


def _as_library(token: AddedToken) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(token.content, **{flag: getattr(token, flag) for flag in FLAGS})


def _additions(library: tokenizers.Tokenizer, path: Path) -> tuple[list[int], list[int]]:
    """The ids that the post-processor adds before and after a text."""
    plain = library.encode(PROBE, add_special_tokens=False).ids
    whole = library.encode(PROBE).ids
    for start in range(len(whole) - len(plain), -1, -1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    refuse(path, f"a post_processor that makes {whole} of {plain}", "it only adds tokens before and after a text")


def _vocabulary(
    library: tokenizers.Tokenizer, settings: TokenizerSettings, spelling: _Spelling, before: list[int], path: Path
) -> Vocabulary:
    ids = library.get_vocab(with_added_tokens=True)
    if not ids:
        refuse(path, "an empty vocabulary", "a vocabulary has tokens")
    size = max(ids.values()) + 1
    if size > 2 * len(ids):
        refuse(path, f"id {size - 1} among {len(ids)} tokens", "at most half of the ids may be without a token")
    texts = {token_id: text for text, token_id in ids.items()}
    if len(texts) != len(ids):
        text = next(text for text, token_id in ids.items() if texts[token_id] != text)
        refuse(path, f"{text!r} and {texts[ids[text]]!r} both have id {ids[text]}", "each id is one token")
    gaps = sorted(set(range(size)) - texts.keys())
    texts |= {i: f"<unused id {i}>" for i in gaps}
    tokens = [texts[i] for i in range(size)]
    types = np.full(size, TokenType.NORMAL, dtype=np.int8)
    types[gaps] = TokenType.UNUSED
    for text in spelling.byte_tokens.keys() & ids.keys():
        types[ids[text]] = TokenType.BYTE
    for token_id, token in library.get_added_tokens_decoder().items():
        types[token_id] = TokenType.CONTROL if token.special else TokenType.USER_DEFINED
    named: dict[str, int | None] = {name: ids.get(settings.named.get(name, "")) for name in NAMED}
    if named["bos"] is None:
        named["bos"] = before[0] if before else settings.bos_id
        if named["bos"] is not None and named["bos"] >= size:
            warnings.warn(
                f"{path}: {size} tokens, and bos_token_id {named['bos']} in config.json; it is not used", stacklevel=7
            )
            named["bos"] = None
    unknown = library.model.unk_token
    if named["unk"] is None and unknown is not None:
        named["unk"] = ids.get(unknown)
    if unknown is not None and unknown in ids:
        types[ids[unknown]] = TokenType.UNKNOWN
    eos_ids = settings.eos_ids_within(size, path)
    if named["eos"] is None and eos_ids:
        named["eos"] = min(eos_ids)
    ends = {*eos_ids, named["eos"]} | end_ids(ids, types, named["bos"])
    return Vocabulary(
        tokens=tokens,
        ids=ids,
        types=types,
        model=MODEL,
        arch=settings.arch,
        bos_id=named["bos"],
        eos_id=named["eos"],
        unk_id=named["unk"],
        pad_id=named["pad"],
        eos_ids=frozenset(end for end in ends if end is not None),
    )
