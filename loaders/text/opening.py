"""The tokenizer of a checkpoint, whichever files hold it."""

from __future__ import annotations

from pathlib import Path

from ..checkpoint import Checkpoint
from ..gguf import read_gguf
from .folder import read_folder_tokenizer
from .tokenizer import Tokenizer


def open_tokenizer(checkpoint: Checkpoint | Path) -> Tokenizer:
    """The tokenizer of a checkpoint.

    Args:
        checkpoint: an open checkpoint, or the path of a GGUF file or a folder; the folder need not hold weights.

    Raises:
        TokenizerError: there is no tokenizer, it is of an unknown kind, or its parts contradict each other.
        GGUFError, HuggingFaceError: a file cannot be read or is damaged.
    """
    if not isinstance(checkpoint, Path):
        folder = checkpoint.folder
        return Tokenizer.from_metadata(checkpoint.metadata) if folder is None else read_folder_tokenizer(folder)
    if checkpoint.is_dir():
        return read_folder_tokenizer(checkpoint)
    with read_gguf(checkpoint) as file:
        return Tokenizer.from_metadata(file.metadata)
