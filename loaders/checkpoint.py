"""What every checkpoint looks like to the models, whichever files it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

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


class Checkpoint(Protocol):
    """Metadata under GGUF's keys, tensors under GGUF's names.

    A Hugging Face folder adds the key ``<architecture>.rope.huggingface``: its rotary parameters, whole.
    """

    @property
    def metadata(self) -> Mapping[str, Any]: ...
    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    @property
    def interleaved_rope_rows(self) -> bool:
        """Whether q and k rows of architecture ``llama`` are stored as rotary pairs (2j, 2j+1), as GGUF does."""

    def data(self, name: str) -> np.ndarray:
        """The tensor's stored bytes, uint8 [rows, bytes_per_row], mapped and not copied."""

    def close(self) -> None: ...
