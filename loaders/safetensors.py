"""Hugging Face folders: config.json and *.safetensors, presented under GGUF's keys and names.

    with read_safetensors("SmolLM2-135M") as checkpoint:
        checkpoint.metadata["llama.block_count"]
        checkpoint.data("blk.0.attn_q.weight")          # uint8 [rows, bytes of a row], the file's own pages

A safetensors file is a length (8 bytes, little-endian), a JSON header of that length, and the tensors' bytes. The
header says for each tensor its dtype, its shape and its place; the places cover the rest of the file without gap or
overlap. Opening checks all of that and reads no weights. What the names and numbers mean is in ``hf_config``.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from .hf_config import gguf_metadata, gguf_names
from .hf_json import HuggingFaceError, parse_json, read_json, readable, refuse
from .tokenizer import Tokenizer
from .tokenizer_folder import read_folder_tokenizer, tokenizer_file

LARGEST_HEADER = 100_000_000  # bytes, as in the format's own library
SMALL_HEADER = 2**20  # bytes; a larger one is a small part of its file, since JSON takes up to 50 times that in memory
MOST_DIMENSIONS = 8
ITEMSIZES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2}
ITEMSIZES |= {"U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8}
GGML_TYPES = {"F32": "F32", "F16": "F16", "BF16": "BF16"}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: ``start`` is a byte offset in its file."""

    name: str
    ggml_type: str
    shape: tuple[int, ...]
    nbytes: int
    path: Path
    start: int

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)


class SafetensorsCheckpoint:
    """A Hugging Face folder as a Checkpoint; made by ``read_safetensors``.

    Attributes:
        folder: its path.
        paths: of its safetensors files.
        file_nbytes: bytes of them.
        metadata: the config under GGUF's keys.
        tensors: GGUF's name -> TensorInfo.
        interleaved_rope_rows: False: these files store rotary pairs half-split.
    """

    interleaved_rope_rows = False

    format = "Hugging Face safetensors"

    def __init__(
        self, folder: Path, metadata: Mapping[str, Any], tensors: dict[str, TensorInfo], maps: dict[Path, np.ndarray]
    ):
        self.folder, self.metadata, self.tensors = folder, metadata, tensors
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

    def read_tokenizer(self) -> Tokenizer:
        """The tokenizer of the folder. Raises TokenizerError and HuggingFaceError."""
        return read_folder_tokenizer(self.folder)

    def data(self, name: str) -> np.ndarray:
        """The tensor's bytes, uint8 [rows, bytes of a row], read-only; [1, nbytes] for a vector.

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
        raw = self._maps[info.path][info.start : info.start + info.nbytes]
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


def _read_folder(folder: Path, name: str) -> SafetensorsCheckpoint:
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        _refuse_without_weights(folder)
    config = read_json(folder / "config.json")
    entries: dict[str, TensorInfo] = {}
    maps: dict[Path, np.ndarray] = {}
    for file in _weight_files(folder):
        maps[file], found = _read_file(file)
        for repeated in found.keys() & entries.keys():
            refuse(file, f"tensor {repeated!r} a second time", "a name occurs once in all files")
        entries |= found
    tensors = {}
    for stored, canonical in gguf_names(config, set(entries)).items():
        info = entries[stored]
        if info.ggml_type not in GGML_TYPES:
            refuse(
                info.path,
                f"tensor {stored!r} has dtype {info.ggml_type}",
                f"weights are {', '.join(GGML_TYPES)}",
                "Use the unquantised checkpoint, or a GGUF file",
            )
        tensors[canonical] = TensorInfo(
            canonical, GGML_TYPES[info.ggml_type], info.shape, info.nbytes, info.path, info.start
        )
    metadata = gguf_metadata(config, tensors, name=name)
    return SafetensorsCheckpoint(folder, metadata, tensors, maps)


def _refuse_without_weights(folder: Path) -> NoReturn:
    """Say what the folder holds instead."""
    rule = "a folder holds config.json and model.safetensors"
    names = sorted(file.name for file in folder.iterdir())
    if not names:
        refuse(folder, "an empty folder", rule, "Check the path, and that the download finished")
    if gguf := [name for name in names if name.endswith(".gguf")]:
        refuse(folder, f"a folder of GGUF files ({_some(gguf)})", rule, f"Name the file: {folder / gguf[0]}")
    if pickled := [name for name in names if name.endswith((".bin", ".pth", ".pt", ".ckpt"))]:
        refuse(
            folder,
            f"no safetensors file, but {_some(pickled)}",
            f"{rule}; pickled weights can run any code and are not read",
            "Get the safetensors, or convert: transformers' save_pretrained writes them",
        )
    refuse(folder, "no safetensors file", rule, "Download the weights too")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _weight_files(folder: Path) -> list[Path]:
    """The files that the index names, or without an index all there are."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return sorted(folder.glob("*.safetensors"))
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        refuse(index, "no weight_map", "an index names the file of each tensor")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            refuse(index, f"file {name!r}", "the files lie beside the index", "Distrust this checkpoint")
        if not (folder / name).is_file():
            refuse(index, f"{name} is missing", "every file that the index names is there", "Download it too")
    return [folder / name for name in names]


def _read_file(path: Path) -> tuple[np.ndarray, dict[str, TensorInfo]]:
    """Map one file and check its header; ``ggml_type`` of these infos is still safetensors' own dtype."""
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
    for info in sorted(infos.values(), key=lambda info: (info.start, info.nbytes)):
        if info.start != end:
            refuse(path, f"tensor {info.name!r} at byte {info.start}", f"tensors follow one another, here at {end}")
        end += info.nbytes
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
    return TensorInfo(name, dtype, tuple(shape), nbytes, path, data_start + offsets[0])
