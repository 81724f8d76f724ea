"""Hugging Face folders: config.json and *.safetensors, presented under GGUF's keys and names.

    with read_safetensors("SmolLM2-135M") as checkpoint:
        checkpoint.metadata["llama.block_count"]
        checkpoint.data("blk.0.attn_q.weight")          # uint8 [rows, bytes of a row], the file's own pages

A safetensors file is a length (8 bytes, little-endian), a JSON header of that length, and the tensors' bytes. The
header says for each tensor its dtype, its shape and its place; the places cover the rest of the file without gap or
overlap. Opening checks all of that and reads no weights, unless two tensors must be compared. Which files count is in
``weight_files``, what the names and numbers mean in ``config``.
"""

from __future__ import annotations

import math
import mmap
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rooflama.kernels.errors import shorten

from .config import EMBEDDING, OUTPUT, family_of, gguf_metadata, gguf_names, is_tied
from .json_files import HuggingFaceError, parse_json, read_json, readable, refuse
from .weight_files import refuse_without_weights, weight_files

LARGEST_HEADER = 100_000_000  # bytes, as in the format's own library
SMALL_HEADER = 2**20  # bytes; a larger one is a small part of its file, since JSON takes up to 50 times that in memory
MOST_DIMENSIONS = 8
ITEMSIZES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2}
ITEMSIZES |= {"U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8}
GGML_TYPES = {"F32": "F32", "F16": "F16", "BF16": "BF16", "F64": "F32"}
"""dtype of the file -> type of what is read; float64 is rounded, since nothing computes in it."""
CHUNK = 2**24  # bytes compared at a time
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
"""Either holds a vocabulary; the first that exists is read."""


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies, and its dtype there: ``start`` is a byte offset in its file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def stored_nbytes(self) -> int:
        return self.n_elements * ITEMSIZES[self.dtype]

    @property
    def ggml_type(self) -> str:
        """Of the bytes that ``data`` gives."""
        return GGML_TYPES[self.dtype]

    @property
    def nbytes(self) -> int:
        """Of the bytes that ``data`` gives."""
        return self.n_elements * ITEMSIZES[self.ggml_type]


class SafetensorsCheckpoint:
    """A Hugging Face folder as a Checkpoint; made by ``read_safetensors``.

    Attributes:
        folder: its path.
        paths: of its safetensors files.
        file_nbytes: bytes of them.
        metadata: the config under GGUF's keys.
        tensors: GGUF's name -> TensorInfo.
        interleaved_rope_rows: False: these files store rotary pairs half-split, or the family itself rotates others.
        norm_offset: of the family, see ``HFFamily``.
    """

    interleaved_rope_rows = False

    format = "Hugging Face safetensors"

    def __init__(
        self,
        folder: Path,
        metadata: Mapping[str, Any],
        tensors: dict[str, TensorInfo],
        maps: dict[Path, np.ndarray],
        norm_offset: float = 0.0,
    ):
        self.folder, self.metadata, self.tensors = folder, metadata, tensors
        self.norm_offset = norm_offset
        self.paths = tuple(maps)
        self.file_nbytes = sum(mapped.nbytes for mapped in maps.values())
        self._maps: dict[Path, np.ndarray] | None = maps

    @property
    def name(self) -> str:
        return self.metadata["general.name"]

    @property
    def tokenizer_kind(self) -> str:
        file = tokenizer_file(self.folder)
        return file.name if file else "no tokenizer"

    def data(self, name: str) -> np.ndarray:
        """The tensor's bytes, uint8 [rows, bytes of a row], read-only; [1, nbytes] for a vector.

        The file's own mapped pages, or of a float64 tensor a copy in float32.

        Raises:
            HuggingFaceError: the checkpoint is closed.
            KeyError: no such tensor.
        """
        if self._maps is None:
            raise HuggingFaceError(
                f"{self.folder} is closed",
                rule="tensors are read while it is open",
                remedy="Read inside the with block, or call read_safetensors again",
            )
        info = self.tensors[name]
        raw = self._maps[info.path][info.start : info.start + info.stored_nbytes]
        if info.dtype == "F64":
            with np.errstate(over="ignore"):
                raw = raw.copy().view("<f8").astype("<f4").view(np.uint8)
            raw.flags.writeable = False
        return raw.reshape(1 if len(info.shape) < 2 else math.prod(info.shape[:-1]), -1)

    def close(self) -> None:
        """Let go of the mappings. Idempotent. A mapping ends when the last array made from it does."""
        self._maps = None

    def __enter__(self) -> SafetensorsCheckpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_safetensors(path: str | Path, *, name: str | None = None) -> SafetensorsCheckpoint:
    """Open a folder that holds config.json and one or more safetensors files.

    Args:
        path: the folder.
        name: what to call the model; None for the folder's own name.

    Raises:
        HuggingFaceError: something is missing, cannot be read, is damaged, or is of a model type or dtype that rooflama
            does not know.
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
    maps: dict[Path, np.ndarray] = {}
    entries: dict[str, TensorInfo] = {}
    for file in weight_files(folder, config):
        maps[file], found = _read_file(file)
        if repeated := [stored for stored in found if stored in entries]:
            _check_repeated([(entries[stored], found[stored]) for stored in repeated], maps)
        entries |= found
    tensors = {}
    names = gguf_names(config, entries)
    for stored, canonical in names.items():
        info = entries[stored]
        if info.dtype not in GGML_TYPES:
            refuse(
                info.path,
                f"tensor {stored!r} has dtype {info.dtype}",
                f"weights are {', '.join(GGML_TYPES)}",
                "Use the unquantised checkpoint, or a GGUF file",
            )
        tensors[canonical] = replace(info, name=canonical)
    if is_tied(config) and OUTPUT in tensors:
        _untie(config, tensors, maps)
    if wide := [stored for stored in names if entries[stored].dtype == "F64"]:
        others = f" and {len(wide) - 1} other tensors" if len(wide) > 1 else ""
        warnings.warn(f"{name}: {shorten(wide[0])}{others}: float64, read as float32", stacklevel=4)
    metadata = gguf_metadata(config, tensors, name=name)
    return SafetensorsCheckpoint(folder, metadata, tensors, maps, family_of(config).norm_offset)


def _check_repeated(pairs: list[tuple[TensorInfo, TensorInfo]], maps: Mapping[Path, np.ndarray]) -> None:
    """A tensor may be stored in two files, as long as it is the same."""
    for first, second in pairs:
        if not _equal(first, second, maps):
            refuse(
                second.path,
                f"tensor {second.name!r} a second time, with other values than in {first.path.name}",
                "a tensor that occurs in two files is the same in both",
                "The files are of different checkpoints: download them again",
            )
    files = f"{pairs[0][0].path.name} and {pairs[0][1].path.name}"
    warnings.warn(f"{files} hold the same {len(pairs)} tensors, of which one copy is read", stacklevel=5)


def _untie(config: Mapping[str, Any], tensors: dict[str, TensorInfo], maps: Mapping[Path, np.ndarray]) -> None:
    """Of a tied model that stores its output too: drop one that equals the embedding, keep another, as transformers."""
    if _equal(tensors[EMBEDDING], tensors[OUTPUT], maps):
        del tensors[OUTPUT]
        return
    warnings.warn(
        "tie_word_embeddings is true, but lm_head.weight is stored and differs from the embedding: it is the output "
        "matrix, as in transformers",
        stacklevel=5,
    )


def _equal(first: TensorInfo, second: TensorInfo, maps: Mapping[Path, np.ndarray]) -> bool:
    """Whether two tensors are stored alike, byte for byte."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    left, right = (maps[info.path][info.start :][: info.stored_nbytes] for info in (first, second))
    return all(np.array_equal(left[i : i + CHUNK], right[i : i + CHUNK]) for i in range(0, len(left), CHUNK))


def _read_file(path: Path) -> tuple[np.ndarray, dict[str, TensorInfo]]:
    """Map one file and check its header."""
    size = path.stat().st_size
    if size < 8:
        refuse(path, f"{size} bytes", "a safetensors file starts with the length of its header")
    with path.open("rb") as file:
        mapped = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=np.uint8)
    header_nbytes = int.from_bytes(bytes(mapped[:8]), "little")
    if header_nbytes > min(LARGEST_HEADER, size - 8):
        refuse(path, f"a header of {header_nbytes} bytes in a file of {size}", "the header lies inside the file")
    if header_nbytes > max(SMALL_HEADER, size // 16):
        rule = f"one of more than {SMALL_HEADER} is at most a sixteenth of its file"
        refuse(path, f"a header of {header_nbytes} bytes in a file of {size}", rule)
    header = parse_json(bytes(mapped[8 : 8 + header_nbytes]), path)
    header.pop("__metadata__", None)
    data_start = 8 + header_nbytes
    infos = {name: _tensor_info(name, entry, data_start, path) for name, entry in header.items()}
    end = data_start
    for info in sorted(infos.values(), key=lambda info: (info.start, info.stored_nbytes)):
        if info.start != end:
            refuse(path, f"tensor {info.name!r} at byte {info.start}", f"tensors follow one another, here at {end}")
        end += info.stored_nbytes
    if end != size:
        refuse(path, f"{size} bytes", f"the tensors end at byte {end}, and the file with them")
    return mapped, infos


def _tensor_info(name: str, entry: Any, data_start: int, path: Path) -> TensorInfo:
    fields: dict[str, Any] = entry if isinstance(entry, dict) else {}
    dtype: Any = fields.get("dtype")
    shape: Any = fields.get("shape")
    offsets: Any = fields.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in ITEMSIZES:
        refuse(path, f"tensor {name!r} has dtype {dtype!r}", f"dtypes are {', '.join(ITEMSIZES)}")
    for what, numbers, fewest, most in (("shape", shape, 0, MOST_DIMENSIONS), ("data_offsets", offsets, 2, 2)):
        if not (
            isinstance(numbers, list)
            and fewest <= len(numbers) <= most
            and all(type(number) is int and number >= 0 for number in numbers)
        ):
            rule = f"{what} is a list of {fewest} to {most} whole numbers"
            refuse(path, f"tensor {name!r} has {what} {numbers!r}", rule)
    nbytes = math.prod(shape) * ITEMSIZES[dtype]
    if offsets[1] - offsets[0] != nbytes:
        refuse(path, f"tensor {name!r} has data_offsets {offsets}", f"{dtype} of shape {shape} takes {nbytes} bytes")
    return TensorInfo(name, dtype, tuple(shape), path, data_start + offsets[0])
