"""Reading the small files of a Hugging Face folder that describe its tokenizer.

| file | what is read from it |
|--|--|
| tokenizer_config.json | special tokens, tokens added to the vocabulary, add_bos_token, add_eos_token, chat template |
| special_tokens_map.json | special tokens; takes precedence if tokenizer_config.json has no added_tokens_decoder |
| added_tokens.json | tokens added to the vocabulary, if tokenizer_config.json lists none |
| chat_template.jinja | the chat template; takes precedence over tokenizer_config.json |
| additional_chat_templates/NAME.jinja | further chat templates, by name |
| generation_config.json | every id that ends generation; those of config.json if it names none |
| config.json | BOS, if no other file names it |
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ..huggingface.config import FAMILIES
from ..huggingface.json_files import read_json_if_there
from .chat_template import DEFAULT
from .vocabulary import TokenizerError

NAMED = ("bos", "eos", "unk", "pad")
FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")
SURROGATE = re.compile("[\ud800-\udfff]")  # a lone one is not text, and the library fails on it
ID = re.compile("0|[1-9][0-9]{0,9}")  # one spelling per id
REDOWNLOAD = "Download the tokenizer's files again, all of one revision"


@dataclass(frozen=True)
class AddedToken:
    """A token added to a trained vocabulary."""

    content: str
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = True


@dataclass(frozen=True)
class TokenizerSettings:
    """The contents of these files, with types and mutual consistency checked.

    Attributes:
        named: "bos", "eos", "unk", "pad" -> the token's text, if a file names it.
        further: the texts of further special tokens.
        added: id -> token.
        add_bos, add_eos: None if tokenizer_config.json does not say.
        bos_id: as in config.json, the first if it is a list.
        eos_ids: every id that ends generation.
        chat_templates: name -> Jinja source; a template without a name is "default".
        arch: GGUF's name of the model's architecture; "" if unknown.
    """

    named: Mapping[str, str]
    further: tuple[str, ...]
    added: Mapping[int, AddedToken]
    add_bos: bool | None
    add_eos: bool | None
    bos_id: int | None
    eos_ids: frozenset[int]
    chat_templates: Mapping[str, str]
    arch: str

    @property
    def special_texts(self) -> list[str]:
        """The texts of all special tokens that the files name, without repetition."""
        return list(dict.fromkeys((*self.named.values(), *self.further)))

    def allow_new(self, text: str, token_id: int, path: Path) -> None:
        """Warn that a special token is added because the vocabulary lacks it, as in transformers.

        Raises:
            TokenizerError: it is BOS or EOS; a model cannot have learnt one that its vocabulary lacks.
        """
        if text in (self.named.get("bos"), self.named.get("eos")):
            refuse(path, f"no token {text!r}", "the BOS and EOS that other files name must be in the vocabulary")
        warnings.warn(
            f"{path}: no token {text!r}, which another file names; it is added as id {token_id}, as in transformers",
            stacklevel=8,
        )

    def unused_role(self, text: str) -> str | None:
        """The role of a token that the files name only as "pad" or "unk", which has no effect here; else None."""
        roles = {name for name, named in self.named.items() if named == text}
        if text in self.further or not roles or not roles <= {"pad", "unk"}:
            return None
        return min(roles)

    def eos_ids_within(self, size: int, path: Path) -> frozenset[int]:
        """``eos_ids`` within a vocabulary of ``size`` tokens. Warns about ids beyond it, which are not used."""
        if outside := sorted(index for index in self.eos_ids if index >= size):
            shown = ", ".join(map(str, outside))
            warnings.warn(f"{path}: {size} tokens, and eos_token_id {shown} in another file; not used", stacklevel=6)
        return self.eos_ids.difference(outside)

    @classmethod
    def read(cls, folder: Path) -> TokenizerSettings:
        """Read the files of a folder; each of them may be missing.

        Raises:
            HuggingFaceError: a file cannot be read, or does not hold one JSON object.
            TokenizerError: a value has a wrong type, or two files contradict each other.
        """
        path, config, generation = (
            folder / name for name in ("tokenizer_config.json", "config.json", "generation_config.json")
        )
        own, older = read_json_if_there(path), read_json_if_there(folder / "special_tokens_map.json")
        model = read_json_if_there(config)
        named, further = _named(own, older, folder), _further(own, older, path)
        family = FAMILIES.get(str(model.get("model_type")))
        ends = _ids(read_json_if_there(generation).get("eos_token_id"), generation, "eos_token_id")
        return cls(
            named=named,
            further=further,
            added=_added(own, {*named.values(), *further}, folder),
            add_bos=_flag(own, "add_bos_token", path),
            add_eos=_flag(own, "add_eos_token", path),
            bos_id=next(iter(_ids(model.get("bos_token_id"), config, "bos_token_id")), None),
            eos_ids=frozenset(ends or _ids(model.get("eos_token_id"), config, "eos_token_id")),
            chat_templates=_chat_templates(own, folder),
            arch=family.architecture if family else "",
        )


def _named(own: Mapping[str, Any], older: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """The special tokens with a role. If two files differ, the one that transformers follows takes precedence.

    transformers does not open special_tokens_map.json if tokenizer_config.json lists its added tokens. Roles that only
    special_tokens_map.json names are read in any case.
    """
    named = {}
    first_file = "tokenizer_config.json" if own.get("added_tokens_decoder") is not None else "special_tokens_map.json"
    for name in NAMED:
        key = f"{name}_token"
        texts = {
            "tokenizer_config.json": _text(own.get(key), folder / "tokenizer_config.json", key),
            "special_tokens_map.json": _text(older.get(key), folder / "special_tokens_map.json", key),
        }
        found = {file: text for file, text in texts.items() if text is not None}
        if len(set(found.values())) == 2:
            warnings.warn(
                f"{folder}: {key} is {found['tokenizer_config.json']!r} in tokenizer_config.json and "
                f"{found['special_tokens_map.json']!r} in special_tokens_map.json; {first_file} is followed, as "
                "transformers does",
                stacklevel=6,
            )
        if found:
            named[name] = found.get(first_file) or next(iter(found.values()))
    return named


def _further(own: Mapping[str, Any], older: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    found: list[str] = []
    for file in (own, older):
        for key in ("additional_special_tokens", "extra_special_tokens"):
            values = file.get(key) or []
            if not isinstance(values, list | dict):
                refuse(path, f"{key} = {values!r}", "it is a list of tokens' texts")
            texts = [_text(v, path, key) for v in (values.values() if isinstance(values, dict) else values)]
            found += [text for text in texts if text is not None]
    return tuple(dict.fromkeys(found))


def _added(own: Mapping[str, Any], special: set[str], folder: Path) -> dict[int, AddedToken]:
    path, key = folder / "tokenizer_config.json", "added_tokens_decoder"
    entries = own.get(key)
    if entries is None:
        path = folder / "added_tokens.json"
        added = {}
        for text, token_id in read_json_if_there(path).items():
            if type(token_id) is not int or token_id < 0:
                refuse(path, f"{text!r} has id {token_id!r}", "each token has an id, a whole number")
            _text(text, path, "a token")
            added[token_id] = AddedToken(text, special=text in special, normalized=text not in special)
        return added
    if not isinstance(entries, dict):
        refuse(path, f"{key} is a {type(entries).__name__}", "it maps ids to tokens")
    added = {}
    for index, fields in entries.items():
        if not ID.fullmatch(index) or not isinstance(fields, dict) or not isinstance(fields.get("content"), str):
            refuse(path, f"{key}[{index!r}] = {fields!r}", "each entry is an id with a token's content and flags")
        _text(fields, path, f"{key}[{index!r}]")
        added[int(index)] = added_token(fields)
    return added


def added_token(fields: Mapping[str, Any]) -> AddedToken:
    """A token from its JSON in tokenizer_config.json or tokenizer.json."""
    return AddedToken(fields["content"], **{flag: bool(fields[flag]) for flag in FLAGS if flag in fields})


def _text(value: Any, path: Path, key: str) -> str | None:
    """The text of a token, which is stored as a string or as an object with flags."""
    if isinstance(value, dict):
        value = value.get("content")
    if value is not None and (not isinstance(value, str) or not value or SURROGATE.search(value)):
        refuse(path, f"{key} = {value!r}", "it is a token's text")
    return value


def _flag(own: Mapping[str, Any], key: str, path: Path) -> bool | None:
    value = own.get(key)
    if value is not None and not isinstance(value, bool):
        refuse(path, f"{key} = {value!r}", "it is true or false")
    return value


def _ids(value: Any, path: Path, key: str) -> list[int]:
    """The ids of a value that is one id or a list of ids. Warns about negative numbers and null, which are not used."""
    entries = [] if value is None else value if isinstance(value, list) else [value]
    if not all(entry is None or type(entry) is int for entry in entries):
        refuse(path, f"{key} = {value!r}", "it is an id, or a list of ids")
    ids = [entry for entry in entries if entry is not None and entry >= 0]
    if none := [entry for entry in entries if entry not in ids]:
        warnings.warn(f"{path}: {none[0]} in {key} = {value} is not an id and is not used", stacklevel=5)
    return ids


def _chat_templates(own: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """The templates in .jinja files and, without a chat_template.jinja, those in tokenizer_config.json."""
    files = {DEFAULT: folder / "chat_template.jinja"}
    files |= {file.stem: file for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    templates = {name: _template_text(file) for name, file in files.items() if file.is_file()}
    if DEFAULT in templates:
        return templates
    found = own.get("chat_template")
    if isinstance(found, str):
        return {DEFAULT: found, **templates}
    entries = [] if found is None else found
    fields = ("name", "template")
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and all(isinstance(entry.get(field), str) for field in fields) for entry in entries
    ):
        refuse(
            folder / "tokenizer_config.json",
            f"chat_template = {found!r:.80}",
            "it is a string, or a list of objects with name and template",
            "Write the template into chat_template.jinja",
        )
    return {entry["name"]: entry["template"] for entry in entries} | templates


def _template_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        refuse(file, str(error), "it is text in UTF-8")


def refuse(path: Path, found: str, rule: str, remedy: str = REDOWNLOAD) -> NoReturn:
    raise TokenizerError(f"{path}: {found}", rule=rule, remedy=remedy)
