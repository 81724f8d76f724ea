"""The interface of a checkpoint: what the models use, whichever files it comes from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np

MOST_LAYERS = 10_000  # per model: a damaged file must not ask for a table of billions


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies and how it is stored.

    Attributes:
        name: under which the checkpoint lists it.
        ggml_type: the type of the bytes that ``data`` returns.
        shape: rows first, as in NumPy: [out, in] for a matrix. A row is the last dimension.
        nbytes: the number of bytes that ``data`` returns.
        file_index: the file that holds it, an index into ``Checkpoint.paths``.
        offset: the byte of that file at which it starts.
    """

    name: str
    ggml_type: str
    shape: tuple[int, ...]
    nbytes: int
    file_index: int
    offset: int

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def row_nbytes(self) -> int:
        return self.nbytes // max(1, self.rows)


class Checkpoint(Protocol):
    """An open checkpoint: metadata under GGUF's keys, tensors under GGUF's names.

    A Hugging Face folder adds the key ``<architecture>.rope.huggingface``, which holds its rotary parameters unchanged.
    """

    @property
    def name(self) -> str:
        """Name for displays and reports: that of the file, folder or repository."""

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files that hold tensors."""

    @property
    def folder(self) -> Path | None:
        """The folder whose further files describe the tokenizer; None if the metadata describes it."""

    @property
    def file_nbytes(self) -> int:
        """Bytes of all ``paths`` together."""

    @property
    def format(self) -> str:
        """Kind and version of the files, for display."""

    @property
    def tokenizer_kind(self) -> str:
        """How the vocabulary is stored, for display."""

    @property
    def metadata(self) -> Mapping[str, Any]: ...
    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    @property
    def interleaved_rope_rows(self) -> bool:
        """Whether rows of q and k are stored as rotary pairs (2j, 2j+1), as GGUF does for some architectures."""

    @property
    def norm_offset(self) -> float:
        """The number to add to each stored weight of a norm: 1 for a Gemma folder, 0 for GGUF and most folders."""

    def data(self, name: str) -> np.ndarray:
        """The stored bytes of a tensor, uint8 [rows, bytes_per_row]: mapped, not copied."""

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...
