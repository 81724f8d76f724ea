"""The tokenizer of a Hugging Face folder, from tokenizer.json or, if it is missing, from tokenizer.model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..huggingface.folder import tokenizer_file
from ..huggingface.json_files import readable
from .gguf_text import MODELS, GGUFText
from .sentencepiece_model import sentencepiece_metadata
from .settings import TokenizerSettings, refuse
from .tokenizer import Tokenizer
from .tokenizer_json import read_tokenizer_json
from .vocabulary import Vocabulary


def read_folder_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a folder; the folder need not hold weights.

    Raises:
        HuggingFaceError: a file cannot be read, or does not hold one JSON object.
        TokenizerError: there is no tokenizer, its kind is not supported, or its files contradict each other.
    """
    with readable(folder):
        return _read_tokenizer(folder)


def _read_tokenizer(folder: Path) -> Tokenizer:
    path = tokenizer_file(folder)
    if path is None:
        refuse(
            folder,
            "no tokenizer.json and no tokenizer.model",
            "a folder holds one of them",
            "Download the tokenizer's files too, or save them with tokenizer.save_pretrained",
        )
    settings = TokenizerSettings.read(folder)
    if path.name == "tokenizer.json":
        return read_tokenizer_json(path, settings)
    metadata = sentencepiece_metadata(path, settings)
    vocabulary = Vocabulary.from_metadata(metadata, models=MODELS)
    eos_ids = vocabulary.eos_ids | settings.eos_ids_within(len(vocabulary.tokens), path)
    text_model = GGUFText(vocabulary, metadata)
    return Tokenizer(
        replace(vocabulary, eos_ids=eos_ids),
        text_model,
        add_bos=text_model.add_bos if settings.add_bos is None else settings.add_bos,
        add_eos=bool(settings.add_eos),
        chat_templates=settings.chat_templates,
    )
