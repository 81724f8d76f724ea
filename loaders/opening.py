"""The one way in: from a path or a reference to an open checkpoint, whatever kind of files it is.

| given | what is opened |
|--|--|
| a file | GGUF; of a split set the first file |
| a folder | Hugging Face: config.json, safetensors files, a tokenizer |
| hf:owner/repo, hf:owner/repo@revision | the same, of a repository on the Hugging Face Hub |
| hf:owner/repo:file.gguf, hf:owner/repo@revision:file.gguf | one GGUF file of a repository |

Only this file and ``text.opening`` ask which kind it is.
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
    """A path that is no checkpoint of a kind known here."""


NO_CHECKPOINTS = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".json", ".model", ".onnx", ".h5", ".msgpack")


@dataclass(frozen=True)
class Location:
    """A checkpoint that is on this machine, not opened yet.

    Attributes:
        path: of the file or the folder.
        name: what it is called in displays and reports.
    """

    path: Path
    name: str

    def open(self) -> Checkpoint:
        """Raises as ``open_checkpoint``."""
        return read_safetensors(self.path, name=self.name) if self.path.is_dir() else read_gguf(self.path)


def locate(source: str | os.PathLike[str], *, weights: bool = True) -> Location:
    """Find a checkpoint; one of the Hub is downloaded first.

    Args:
        source: as the table above has it.
        weights: whether they are wanted; without, a download leaves out the weights of a folder.

    Raises:
        UnknownCheckpointError: the path is no checkpoint of a kind known here, or cannot be opened.
        HubError: the download failed.
    """
    try:
        text = os.fsdecode(source)
    except TypeError:
        raise UnknownCheckpointError(
            f"{source!r} ({type(source).__name__}) in place of a path",
            rule="a checkpoint is named by text or a pathlib.Path",
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
    """Open a checkpoint; its header is read and checked, its weights are not.

    Raises:
        UnknownCheckpointError, HubError: as ``locate``.
        GGUFError, HuggingFaceError: the file or folder is damaged or incomplete.
    """
    return locate(source).open()


@contextmanager
def open_headers(source: str | os.PathLike[str]) -> Iterator[Checkpoint]:
    """Like ``open_checkpoint``, for what needs no weights: of the Hub, only headers are fetched.

    ``data`` of such a checkpoint gives zeros, except for rotary factors.
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
    """Refuse what is neither a folder nor a GGUF file; a missing .gguf file is left to its reader."""
    if path.is_dir():
        return
    suffix = path.suffix.lower()
    if suffix in NO_CHECKPOINTS:
        in_folder = "Name its folder" if suffix in (".safetensors", ".json", ".model") else "Use a safetensors folder"
        _refuse(path, "one file of a checkpoint" if path.exists() else "no such file", f"{in_folder}, or a .gguf file")
    if suffix != ".gguf" and path.is_file() and not _is_gguf(path):
        _refuse(path, "neither GGUF nor a folder", "Name a .gguf file, or the folder with config.json")
    if suffix != ".gguf" and not path.exists():
        _refuse(path, "no such file or folder", f"Check the path; a repository of the Hub is {PREFIX}owner/repo")


def _is_gguf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def _refuse(path: Path, found: str, remedy: str) -> NoReturn:
    raise UnknownCheckpointError(
        f"{path}: {found}",
        rule="a checkpoint is a .gguf file or a folder with config.json and safetensors",
        remedy=remedy,
    )
