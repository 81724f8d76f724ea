"""Opening a checkpoint: from a path or a Hub reference to an open checkpoint, whatever its kind.

| source | what is opened |
|--|--|
| a file | GGUF; for a split set, its first file |
| a folder | Hugging Face: config.json, safetensors files, a tokenizer |
| hf:owner/repo, hf:owner/repo@revision | such a folder, from a repository on the Hugging Face Hub |
| hf:owner/repo:file.gguf, hf:owner/repo@revision:file.gguf | a GGUF file from a repository |

Only this module and ``text.opening`` distinguish the kinds.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NoReturn

from rooflama.kernels import RooflamaError

from .checkpoint import Checkpoint
from .gguf.file import read_gguf
from .huggingface.folder import read_safetensors
from .huggingface.hub import PREFIX, fetch
from .huggingface.hub_headers import fetch_headers


class UnknownCheckpointError(RooflamaError, ValueError):
    """A path that is not a checkpoint of a supported kind."""


NO_CHECKPOINTS = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".json", ".model", ".onnx", ".h5", ".msgpack")


@dataclass(frozen=True)
class Location:
    """A checkpoint on this machine that is not open yet.

    Attributes:
        path: the file or folder.
        name: its name in displays and reports.
    """

    path: Path
    name: str

    def open(self) -> Checkpoint:
        """Open it. Raises the errors of ``open_checkpoint``."""
        return read_safetensors(self.path, name=self.name) if self.path.is_dir() else read_gguf(self.path)


def locate(source: str | os.PathLike[str], *, weights: bool = True) -> Location:
    """Find a checkpoint; a Hub reference is downloaded first.

    Args:
        source: a path or reference, as in the table above.
        weights: False downloads a folder without its weights.

    Raises:
        UnknownCheckpointError: the path is not a checkpoint of a supported kind, or cannot be opened.
        HubError: the download failed.
    """
    try:
        text = os.fsdecode(source)
    except TypeError:
        raise UnknownCheckpointError(
            f"source {source!r} of type {type(source).__name__}",
            rule="a source is a str or a pathlib.Path",
            remedy="Give a file, a folder, or hf:owner/repo",
        ) from None
    if text.startswith(PREFIX):
        path, name = fetch(text, weights=weights)
    else:
        path, name = Path(text), ""
    try:
        _check_kind(path)
        return Location(path, name or (path.resolve().name if path.is_dir() else path.name))
    except OSError as error:
        _refuse(
            path, f"cannot be opened ({error.strerror})", "Check the path, and the permissions on it and its folders"
        )


def open_checkpoint(source: str | os.PathLike[str]) -> Checkpoint:
    """Open a checkpoint: read and check its headers, but no weights.

    Raises:
        UnknownCheckpointError, HubError: as for ``locate``.
        GGUFError, HuggingFaceError: the file or folder is damaged or incomplete.
    """
    return locate(source).open()


@contextmanager
def open_headers(source: str | os.PathLike[str]) -> Iterator[Checkpoint]:
    """Like ``open_checkpoint``, but fetches only headers from the Hub.

    For a Hub reference that is not in the cache, ``data`` returns zeros for every tensor but the rotary factors.
    """
    text = os.fspath(source)
    if not text.startswith(PREFIX):
        with open_checkpoint(source) as checkpoint:
            yield checkpoint
        return
    with TemporaryDirectory(prefix="rooflama-") as scratch:
        path, name = fetch_headers(text, Path(scratch))
        with Location(path, name).open() as checkpoint:
            yield checkpoint


def _check_kind(path: Path) -> None:
    """Refuse a path that is neither a folder nor a GGUF file. A missing .gguf file is refused when it is opened."""
    if path.is_dir():
        return
    suffix = path.suffix.lower()
    if suffix in NO_CHECKPOINTS:
        in_folder = "Name its folder" if suffix in (".safetensors", ".json", ".model") else "Use a safetensors folder"
        _refuse(path, "one file of a checkpoint" if path.exists() else "no such file", f"{in_folder}, or a .gguf file")
    if suffix != ".gguf" and path.is_file() and not _is_gguf(path):
        _refuse(path, "neither a GGUF file nor a folder", "Name a .gguf file, or the folder with config.json")
    if suffix != ".gguf" and not path.exists():
        _refuse(path, "no such file or folder", f"Check the path; a Hub repository is {PREFIX}owner/repo")


def _is_gguf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def _refuse(path: Path, found: str, remedy: str) -> NoReturn:
    raise UnknownCheckpointError(
        f"{path}: {found}",
        rule="a checkpoint is a .gguf file or a folder with config.json and safetensors",
        remedy=remedy,
    )
