"""The tokenizer of a model, from the metadata of a GGUF file or from a Hugging Face folder.

``gguf_text`` and ``tokenizer_json`` encode text. What they share is here: adding BOS and EOS as the file says, decoding
ids to text, and rendering the chat template.
"""

from __future__ import annotations

import codecs
import operator
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from .chat_template import DEFAULT, ChatTemplates
from .gguf_text import MODELS, GGUFText
from .token_types import TokenType
from .vocabulary import Metadata, TokenizerError, Vocabulary, read_flag, read_string


class TextModel(Protocol):
    """Encodes text to ids without BOS and EOS, and decodes ids to bytes.

    Attributes:
        add_space_prefix: whether a text is encoded with a space before it.
        unprefixed: types of tokens that never start with that space.
    """

    add_space_prefix: bool
    unprefixed: Collection[TokenType]

    def encode(self, text: str, *, parse_special: bool) -> list[int]: ...

    def token_bytes(self, token_id: int) -> bytes: ...

    def space_follows(self, token_id: int) -> bool:
        """Whether text after this token is encoded with a space before it."""


_SKIPPED = (TokenType.UNKNOWN, TokenType.CONTROL, TokenType.UNUSED)


class Piece(NamedTuple):
    """The contribution of one id to the text."""

    data: bytes
    special: bool  # ends generation, or is a control, unknown or unused token; skip_special leaves it out
    unprefixed: bool  # never starts with the space that is added before a text
    space_follows: bool  # text after it is encoded with a space before it, as in SentencePiece


class Tokenizer:
    """Encodes text to token ids, and decodes ids to text.

    Attributes:
        tokens: the text of each id, as the file stores it.
        vocab_size: the number of tokens; the model's embedding may have more rows, as padding.
        bos_id, eos_id, unk_id, pad_id: None if the file names none.
        eos_ids: every id that ends generation.
        add_bos, add_eos: whether ``encode`` adds BOS and EOS.
        add_space_prefix: whether a text is encoded with a space before it.
        chat_templates: name -> Jinja source; a template without a name is "default".
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        text_model: TextModel,
        *,
        add_bos: bool,
        add_eos: bool,
        chat_templates: Mapping[str, str],
    ):
        self._vocabulary = vocabulary
        self._text_model = text_model
        self.tokens: Sequence[str] = vocabulary.tokens
        self.vocab_size = len(vocabulary.tokens)
        self.bos_id, self.eos_id = vocabulary.bos_id, vocabulary.eos_id
        self.unk_id, self.pad_id = vocabulary.unk_id, vocabulary.pad_id
        self.eos_ids = vocabulary.eos_ids
        self.add_space_prefix = text_model.add_space_prefix
        self.add_bos, self.add_eos = add_bos, add_eos
        self._bos = _addition("bos", add_bos, self.bos_id)
        self._eos = _addition("eos", add_eos, self.eos_id)
        self._pieces: dict[int, Piece] = {}
        self._chat_templates = ChatTemplates(chat_templates)
        self.chat_templates = self._chat_templates.sources

    @classmethod
    def from_metadata(cls, metadata: Metadata) -> Tokenizer:
        """The tokenizer that the metadata of a GGUF file describes.

        Args:
            metadata: key -> value; string arrays are sequences of str, arrays of numbers are NumPy arrays.

        Raises:
            TokenizerError: the metadata contradicts itself, or asks for something unsupported.
        """
        vocabulary = Vocabulary.from_metadata(metadata, models=MODELS)
        text_model = GGUFText(vocabulary, metadata)
        return cls(
            vocabulary,
            text_model,
            add_bos=read_flag(metadata, "tokenizer.ggml.add_bos_token", text_model.add_bos),
            add_eos=read_flag(metadata, "tokenizer.ggml.add_eos_token", False),
            chat_templates=_gguf_templates(metadata),
        )

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """Encode a text to ids.

        Args:
            text: any text; user-defined tokens in it are always found.
            add_special: add BOS and EOS as the file says; a text that begins with BOS gets no second one.
            parse_special: encode control tokens such as "<|im_start|>" as single ids, only for text that you trust.
                Otherwise they are encoded as plain characters.

        Raises:
            TokenizerError: ``text`` is not a str, contains a lone surrogate, or has a character that the vocabulary
                cannot encode.
        """
        if not isinstance(text, str):
            found = f"text of type {type(text).__name__}"
            raise TokenizerError(found, rule="encode takes one str", remedy="Encode texts one by one")
        _refuse_surrogates(text)
        ids = self._text_model.encode(text, parse_special=parse_special)
        if add_special:
            ids = self._begun(ids)
            ids += self._eos if ids[-1:] != self._eos else []
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Decode ids to text; bytes that are not UTF-8 become U+FFFD.

        Args:
            ids: ids of the vocabulary.
            skip_special: leave out end tokens, and control, unknown and unused tokens.

        Raises:
            TokenizerError: ``ids`` are not token ids, or an id is not in the vocabulary.
        """
        stream = self.stream(skip_special=skip_special)
        return "".join([stream.feed(token_id) for token_id in _each(ids)]) + stream.flush()

    def stream(self, *, skip_special: bool = True, after: int | None = None) -> StreamDecoder:
        """A decoder that takes ids one by one as they are generated.

        Args:
            skip_special: leave out end tokens, and control, unknown and unused tokens.
            after: the id before the stream, usually the prompt's last; None at the start of a text.
        """
        return StreamDecoder(self, skip_special=skip_special, after=after)

    def piece(self, token_id: int) -> Piece:
        """The contribution of one id to the text."""
        try:
            piece = self._pieces.get(token_id)
            index = operator.index(token_id) if piece is None else 0
        except TypeError:
            raise _no_ids(token_id) from None
        if piece is None:
            if not 0 <= index < self.vocab_size:
                raise TokenizerError(
                    f"token id {index}",
                    rule=f"ids of this vocabulary are 0 to {self.vocab_size - 1}",
                    remedy="Rows of the embedding beyond the vocabulary are padding: mask them when sampling",
                )
            kind = self._vocabulary.types[index]
            data = self._text_model.token_bytes(index)
            piece = self._pieces[index] = Piece(
                data,
                special=kind in _SKIPPED or index in self.eos_ids,
                unprefixed=kind in self._text_model.unprefixed,
                space_follows=self._text_model.space_follows(index),
            )
        return piece

    @property
    def chat_template(self) -> str | None:
        """The Jinja source of the default chat template; None if there is none."""
        return self.chat_templates.get(DEFAULT)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """Render a conversation as the prompt that the model was trained on, as transformers does.

        Args:
            messages: dictionaries with "role" and "content"; content is text, or a list of parts such as
                {"type": "text", "text": ...} if the template accepts them.
            chat_template: name of the template; None selects "tool_use" if it exists and tools are given, else
                "default".
            add_generation_prompt: end with the start of the assistant's turn.
            variables: further variables of the template, such as ``tools``, ``documents`` or ``enable_thinking``. A
                warning names those that it does not use.

        Raises:
            ChatTemplateError: there is no template, messages or variables have a wrong type, or the template refuses
                them, violates the sandbox or exceeds a bound.
        """
        named = {"bos_token": self.bos_id, "eos_token": self.eos_id, "unk_token": self.unk_id, "pad_token": self.pad_id}
        tokens = {name: self.tokens[token_id] for name, token_id in named.items() if token_id is not None}
        return self._chat_templates.render(
            messages,
            name=chat_template,
            standard={**tokens, "add_generation_prompt": add_generation_prompt},
            variables=variables,
        )

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> list[int]:
        """Encode a conversation: the rendered template after one BOS, if the model uses it, and without EOS.

        A control token spelled in the content of a message is encoded as that token.

        Arguments and errors are those of ``apply_chat_template``.
        """
        text = self.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, **variables)
        ids = self.encode(text, add_special=False, parse_special=True)
        return self._begun(ids)

    def _begun(self, ids: list[int]) -> list[int]:
        return ids if ids[:1] == self._bos else [*self._bos, *ids]

    def __repr__(self) -> str:
        return f"Tokenizer(model={self._vocabulary.model!r}, vocab_size={self.vocab_size})"


class StreamDecoder:
    """Decodes a stream of ids. The strings that it returns, joined, equal the text of all ids decoded at once.

    Bytes of an incomplete character are held back until the rest arrives; bytes that are not UTF-8 become U+FFFD. The
    space that SentencePiece's encoder adds before a text and after a special token is removed. ``after`` is the id
    before the stream, usually the prompt's last; None at the start of a text.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool, after: int | None = None):
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._at_boundary = tokenizer.add_space_prefix if after is None else tokenizer.piece(after).space_follows
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_id: int) -> str:
        """The text that ``token_id`` completes; it may be empty.

        Raises:
            TokenizerError: the id is not in the vocabulary.
        """
        data, special, unprefixed, space_follows = self._tokenizer.piece(token_id)
        if self._at_boundary and not unprefixed:
            data = data.removeprefix(b" ")
        self._at_boundary = space_follows
        if special and self._skip_special:
            return ""
        return self._decoder.decode(data)

    def flush(self) -> str:
        """U+FFFD if the stream ended within a character, else an empty string."""
        return self._decoder.decode(b"", final=True)


def _gguf_templates(metadata: Metadata) -> dict[str, str]:
    """`tokenizer.chat_template`, and each `tokenizer.chat_template.NAME` under its name."""
    key = "tokenizer.chat_template"
    named = {name: read_string(metadata, name) for name in metadata if name == key or name.startswith(f"{key}.")}
    return {
        name.removeprefix(f"{key}.") if name != key else DEFAULT: source
        for name, source in named.items()
        if source is not None
    }


def _addition(name: str, added: bool, token_id: int | None) -> list[int]:
    """The ids that ``encode`` adds for BOS or EOS: one or none."""
    if not added:
        return []
    if token_id is None:
        raise TokenizerError(
            f"{name}_token_id is missing, or is not in the vocabulary",
            rule=f"a tokenizer that adds {name.upper()} must name it",
            remedy=f"Set it, or set add_{name}_token to false, in the file's tokenizer metadata",
        )
    return [token_id]


def _each(ids: Iterable[int]) -> Iterable[int]:
    if isinstance(ids, str | bytes) or not isinstance(ids, Iterable) or getattr(ids, "ndim", 1) == 0:
        raise _no_ids(ids)
    return ids


def _no_ids(value: Any) -> TokenizerError:
    found = f"{value!r:.80} ({type(value).__name__}) instead of token ids"
    return TokenizerError(found, rule="token ids are whole numbers", remedy="Pass a list of them, such as [1, 2]")


def _refuse_surrogates(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"character {error.start} of the text is {text[error.start]!r}",
            rule="a lone surrogate is not a character and has no UTF-8",
            remedy='Decode the input as UTF-8 with errors="replace"',
        ) from None
