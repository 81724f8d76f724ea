"""The model's own tokenizer, from the metadata of its GGUF file or from a Hugging Face folder.

How text is encoded differs (``gguf_text``, ``tokenizer_json``). What all share lives here: BOS and EOS are added
as the file says, ids become text again, and the chat template is rendered.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from .chat_template import DEFAULT, ChatTemplates
from .detokenizer import Piece, StreamDecoder
from .gguf_text import MODELS, GGUFText
from .token_types import MATCHED_WHOLE, TokenType
from .vocabulary import Metadata, TokenizerError, Vocabulary, read_flag, read_string


class TextModel(Protocol):
    """Text to ids and ids to bytes; BOS and EOS are added elsewhere.

    Attributes:
        add_space_prefix: whether a text is encoded with a space before it.
    """

    add_space_prefix: bool

    def encode(self, text: str, *, parse_special: bool) -> list[int]: ...

    def token_bytes(self, token_id: int) -> bytes: ...

    def space_follows(self, token_id: int) -> bool:
        """Whether text that follows this token is encoded with a space before it."""


_SKIPPED = (TokenType.UNKNOWN, TokenType.CONTROL, TokenType.UNUSED)


class Tokenizer:
    """Text to token ids and back.

    Attributes:
        tokens: each id's text as the file stores it.
        vocab_size: how many there are; the model's embedding may have more rows, as padding.
        bos_id, eos_id, unk_id, pad_id: None where the file names none.
        eos_ids: every id that ends generation.
        add_bos, add_eos: what ``encode`` adds.
        add_space_prefix: whether a text is encoded with a space before it.
        chat_templates: name -> Jinja source; the one without a name is "default".
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
        """The tokenizer that a GGUF file's key/value pairs describe.

        Args:
            metadata: the file's keys with their values; string arrays as sequences of str, numbers as numpy arrays.

        Raises:
            TokenizerError: the metadata contradicts itself or asks for something not known here.
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
        """Ids of a text.

        Args:
            text: any text; user-defined tokens in it are always found.
            add_special: add BOS and EOS as the file says; a text that already begins with BOS gets no second one.
            parse_special: read control tokens such as "<|im_start|>" as what they are. Only for text whose source you
                trust: in plain text they are plain characters.

        Raises:
            TokenizerError: no text, a lone surrogate in it, or a character that the vocabulary cannot spell.
        """
        if not isinstance(text, str):
            found = f"{type(text).__name__} in place of a text"
            raise TokenizerError(found, rule="a tokenizer encodes one str", remedy="Encode texts one by one")
        _refuse_surrogates(text)
        ids = self._text_model.encode(text, parse_special=parse_special)
        if add_special:
            ids = self._begun(ids)
            ids += self._eos if ids[-1:] != self._eos else []
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Text of ids; bytes that are no UTF-8 become U+FFFD.

        Args:
            ids: any integers of the vocabulary.
            skip_special: leave end tokens, and control, unknown and unused ones, out.

        Raises:
            TokenizerError: no ids, or one that is not in the vocabulary.
        """
        stream = self.stream(skip_special=skip_special)
        return "".join([stream.feed(token_id) for token_id in _each(ids)]) + stream.flush()

    def stream(self, *, skip_special: bool = True, after: int | None = None) -> StreamDecoder:
        """A decoder to feed ids one by one as they are generated.

        Args:
            skip_special: leave end tokens, and control, unknown and unused ones, out.
            after: the id that the stream continues from, usually the prompt's last; None at the start of a text.
        """
        return StreamDecoder(self, skip_special=skip_special, after=after)

    def piece(self, token_id: int) -> Piece:
        """What one id contributes to the text."""
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
                whole=kind in MATCHED_WHOLE,
                space_follows=self._text_model.space_follows(index),
            )
        return piece

    @property
    def chat_template(self) -> str | None:
        """The file's default chat template, Jinja source; None where it carries none."""
        return self.chat_templates.get(DEFAULT)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt that the model was trained to see for a conversation, as transformers renders it.

        Args:
            messages: dictionaries with "role" and "content"; content is text, or a list of parts such as
                {"type": "text", "text": ...} for a template that takes them.
            chat_template: name of the template; None takes "tool_use" where there is one and tools are given, else
                "default".
            add_generation_prompt: end with the opening of the assistant's turn.
            variables: whatever else the template knows, such as ``tools``, ``documents`` or ``enable_thinking``. A
                warning names those that it does not use.

        Raises:
            ChatTemplateError: there is no template, messages or variables are of another type than they must be, the
                template refuses them, or it breaks the sandbox or its bounds.
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
        """Ids of a conversation: the rendered template, with one BOS before it where the model uses one, no EOS after.

        The messages' contents are part of the rendered text, so a control token spelled in one is read as one.

        Args and errors: as ``apply_chat_template``.
        """
        text = self.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, **variables)
        ids = self.encode(text, add_special=False, parse_special=True)
        return self._begun(ids)

    def _begun(self, ids: list[int]) -> list[int]:
        return ids if ids[:1] == self._bos else [*self._bos, *ids]

    def __repr__(self) -> str:
        return f"Tokenizer(model={self._vocabulary.model!r}, vocab_size={self.vocab_size})"


def _gguf_templates(metadata: Metadata) -> dict[str, str]:
    """`tokenizer.chat_template` and, by their names, `tokenizer.chat_template.NAME`."""
    key = "tokenizer.chat_template"
    named = {name: read_string(metadata, name) for name in metadata if name == key or name.startswith(f"{key}.")}
    return {
        name.removeprefix(f"{key}.") if name != key else DEFAULT: source
        for name, source in named.items()
        if source is not None
    }


def _addition(name: str, added: bool, token_id: int | None) -> list[int]:
    """The ids that ``encode`` adds: the one, or none."""
    if not added:
        return []
    if token_id is None:
        raise TokenizerError(
            f"{name}_token_id is missing, or is no id of the vocabulary",
            rule=f"a tokenizer that adds {name.upper()} must name it",
            remedy=f"Set it, or set add_{name}_token to false, in the file's tokenizer metadata",
        )
    return [token_id]


def _each(ids: Iterable[int]) -> Iterable[int]:
    if isinstance(ids, str | bytes) or not isinstance(ids, Iterable) or getattr(ids, "ndim", 1) == 0:
        raise _no_ids(ids)
    return ids


def _no_ids(value: Any) -> TokenizerError:
    found = f"{value!r:.80} ({type(value).__name__}) in place of token ids"
    return TokenizerError(found, rule="token ids are whole numbers", remedy="Pass a list of them, such as [1, 2]")


def _refuse_surrogates(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"character {error.start} of the text is {text[error.start]!r}",
            rule="a lone surrogate is no character and has no UTF-8",
            remedy='Decode the input as UTF-8 with errors="replace"',
        ) from None
