"""Hugging Face folders: config.json and *.safetensors, presented under GGUF's keys and names.

    with read_safetensors("SmolLM2-135M") as checkpoint:
        checkpoint.metadata["llama.block_count"]
        checkpoint.data("blk.0.attn_q.weight")          # uint8 [rows, row_nbytes], pages of the mapped file

Opening reads headers; it reads weights only if two tensors must be compared. ``weight_files`` chooses the files,
``safetensors`` reads one of them, and ``config`` translates names and hyperparameters.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rooflama.kernels.errors import shorten

from ..checkpoint import TensorInfo
from .config import EMBEDDING, OUTPUT, family_of, gguf_metadata, gguf_names, is_tied
from .json_files import HuggingFaceError, read_json, readable, refuse
from .safetensors import StoredTensor, read_safetensors_file
from .weight_files import refuse_without_weights, weight_files

DTYPES = {"F32": ("F32", 4), "F16": ("F16", 2), "BF16": ("BF16", 2), "F64": ("F32", 4)}
"""dtype in the file -> ggml type of what ``data`` returns, and its bytes per number. float64 is rounded to float32."""
CHUNK = 2**24  # bytes per step of a comparison
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
"""Files that hold a vocabulary; the first that exists is read."""


class SafetensorsCheckpoint:
    """A Hugging Face folder as a Checkpoint; made by ``read_safetensors``.

    Attributes:
        folder: its path.
        paths: its safetensors files that hold the weights.
        file_nbytes: bytes of ``paths`` together.
        metadata: the config under GGUF's keys.
        tensors: GGUF's name -> TensorInfo.
        interleaved_rope_rows: False: folders store rotary pairs as the model rotates them.
        norm_offset: as in ``HFFamily``.
    """

    interleaved_rope_rows = False

    format = "Hugging Face safetensors"

    def __init__(
        self,
        folder: Path,
        paths: list[Path],
        metadata: Mapping[str, Any],
        stored: Mapping[str, StoredTensor],
        norm_offset: float,
    ):
        self.folder, self.paths, self.metadata, self.norm_offset = folder, tuple(paths), metadata, norm_offset
        self.file_nbytes = sum(path.stat().st_size for path in paths)
        self.tensors = {name: _tensor_info(name, tensor, paths) for name, tensor in stored.items()}
        self._stored: Mapping[str, StoredTensor] | None = stored

    @property
    def name(self) -> str:
        return self.metadata["general.name"]

    @property
    def tokenizer_kind(self) -> str:
        file = tokenizer_file(self.folder)
        return file.name if file else "no tokenizer"

    def data(self, name: str) -> np.ndarray:
        """The bytes of a tensor, uint8 [rows, row_nbytes], read-only; [1, nbytes] for a vector.

        They are the mapped pages of the file, or for a float64 tensor a copy in float32.

        Raises:
            HuggingFaceError: the checkpoint is closed.
            KeyError: there is no such tensor.
        """
        if self._stored is None:
            raise HuggingFaceError(
                f"{self.folder} is closed",
                rule="tensors are read while it is open",
                remedy="Read inside the with block, or call read_safetensors again",
            )
        info, raw = self.tensors[name], self._stored[name].data
        if self._stored[name].dtype == "F64":
            with np.errstate(over="ignore"):
                raw = raw.copy().view("<f8").astype("<f4").view(np.uint8)
            raw.flags.writeable = False
        return raw.reshape(info.rows, info.row_nbytes)

    def close(self) -> None:
        """Drop the mappings. Idempotent. A mapping ends with the last array that was made from it."""
        self._stored = None

    def __enter__(self) -> SafetensorsCheckpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_safetensors(path: str | Path, *, name: str | None = None) -> SafetensorsCheckpoint:
    """Open a folder that holds config.json and one or more safetensors files.

    Args:
        path: the folder.
        name: the model's name; None for the name of the folder.

    Raises:
        HuggingFaceError: a file is missing, unreadable or damaged, or the model type or a dtype is not supported.
    """
    folder = Path(path)
    with readable(folder):
        return _read_folder(folder, name or folder.resolve().name)


def tokenizer_file(folder: Path) -> Path | None:
    """The file that holds the vocabulary; None if there is none."""
    return next((folder / name for name in TOKENIZER_FILES if (folder / name).is_file()), None)


def _read_folder(folder: Path, name: str) -> SafetensorsCheckpoint:
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        refuse_without_weights(folder)
    config = read_json(folder / "config.json")
    paths = weight_files(folder, config)
    entries: dict[str, StoredTensor] = {}
    for path in paths:
        found = read_safetensors_file(path)
        if repeated := [stored for stored in found if stored in entries]:
            _check_repeated([(stored, entries[stored], found[stored]) for stored in repeated])
        entries |= found
    names = gguf_names(config, entries)
    tensors = {canonical: entries[stored] for stored, canonical in names.items()}
    for stored, canonical in names.items():
        if (dtype := tensors[canonical].dtype) not in DTYPES:
            refuse(
                tensors[canonical].path,
                f"tensor {stored!r} has dtype {dtype}",
                f"weights are {', '.join(DTYPES)}",
                "Use the unquantised checkpoint, or a GGUF file",
            )
    if is_tied(config) and OUTPUT in tensors:
        _untie(tensors)
    if wide := [stored for stored in names if entries[stored].dtype == "F64"]:
        others = f" and {len(wide) - 1} other tensors" if len(wide) > 1 else ""
        warnings.warn(f"{name}: {shorten(wide[0])}{others}: float64, read as float32", stacklevel=4)
    metadata = gguf_metadata(config, tensors, name=name)
    return SafetensorsCheckpoint(folder, paths, metadata, tensors, family_of(config).norm_offset)


def _tensor_info(name: str, tensor: StoredTensor, paths: list[Path]) -> TensorInfo:
    ggml_type, itemsize = DTYPES[tensor.dtype]
    nbytes = math.prod(tensor.shape) * itemsize
    return TensorInfo(name, ggml_type, tensor.shape, nbytes, paths.index(tensor.path), tensor.offset)


def _check_repeated(repeated: list[tuple[str, StoredTensor, StoredTensor]]) -> None:
    """Check that tensors which two files hold are the same in both."""
    for name, first, second in repeated:
        if not _equal(first, second):
            refuse(
                second.path,
                f"tensor {name!r} a second time, with other values than in {first.path.name}",
                "a tensor that occurs in two files is the same in both",
                "The files are of different checkpoints: download them again",
            )
    _, first, second = repeated[0]
    files = f"{first.path.name} and {second.path.name}"
    warnings.warn(f"{files} hold the same {len(repeated)} tensors, of which one copy is read", stacklevel=5)


def _untie(tensors: dict[str, StoredTensor]) -> None:
    """Drop a tied model's stored output matrix if it equals the embedding; otherwise keep it, as transformers does."""
    if _equal(tensors[EMBEDDING], tensors[OUTPUT]):
        del tensors[OUTPUT]
        return
    warnings.warn(
        "tie_word_embeddings is true, but lm_head.weight is stored and differs from the embedding: it is the output "
        "matrix, as in transformers",
        stacklevel=5,
    )


def _equal(first: StoredTensor, second: StoredTensor) -> bool:
    """Whether two tensors are equal in dtype, shape and bytes."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    left, right = first.data, second.data
    return all(np.array_equal(left[i : i + CHUNK], right[i : i + CHUNK]) for i in range(0, len(left), CHUNK))
