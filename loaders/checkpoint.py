"""What every checkpoint looks like to the models, whichever files it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np


class TensorInfo(Protocol):
    """Where a tensor lies and how it is stored. ``shape`` is in torch's order, rows first."""

    @property
    def name(self) -> str: ...
    @property
    def ggml_type(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def n_elements(self) -> int: ...


class Checkpoint(Protocol):
    """Metadata under GGUF's keys, tensors under GGUF's names.

    A Hugging Face folder adds the key ``<architecture>.rope.huggingface``: its rotary parameters, whole.
    """

    @property
    def name(self) -> str:
        """What displays and reports call it: the name of the file, folder or repository."""

    @property
    def paths(self) -> tuple[Path, ...]:
        """Every file that was opened."""

    @property
    def folder(self) -> Path | None:
        """The folder whose further files describe the tokenizer; None if the metadata describes it."""

    @property
    def file_nbytes(self) -> int:
        """Bytes of all of them."""

    @property
    def format(self) -> str:
        """The kind and version of the files, in words."""

    @property
    def tokenizer_kind(self) -> str:
        """What the vocabulary is stored as, in words."""

    @property
    def metadata(self) -> Mapping[str, Any]: ...
    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    @property
    def interleaved_rope_rows(self) -> bool:
        """Whether q and k rows are stored as rotary pairs (2j, 2j+1), as GGUF does for some architectures."""

    @property
    def norm_offset(self) -> float:
        """What is to be added to each stored weight of a norm: 1 in a Gemma folder, 0 in GGUF and in most folders."""

    def data(self, name: str) -> np.ndarray:
        """The tensor's stored bytes, uint8 [rows, bytes_per_row], mapped and not copied."""

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...
