"""Opening a GGUF file or split set: read-only, headers checked, tensors memory-mapped.

    with read_gguf("model.gguf") as file:
        file.metadata["llama.block_count"]
        file.tensors["blk.0.attn_q.weight"].shape          # (out, in)
        file.data("blk.0.attn_q.weight")                   # uint8 [out, row_nbytes], pages of the mapped file

Opening reads only the headers, by the rules in ``parse``. ``data`` returns views of the mapping: a page is read when it
is touched. A file that another process shortens while it is mapped ends this process with SIGBUS, as in any program
that maps files.

``data`` always returns ggml's little-endian bytes; for a big-endian file it returns a swapped copy. ``_WIDE_FIELDS``
lists which bytes of a block are multi-byte numbers. The types that are not listed (Q5_0, Q5_1, IQ1 to IQ3) read packed
bits through native integers; their big-endian form is not defined anywhere, so they are refused.
"""

from __future__ import annotations

import mmap
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NoReturn

import numpy as np

from ..checkpoint import TensorInfo
from .errors import GGUFError, close_names
from .metadata import Metadata
from .parse import DAMAGED, parse_header
from .types import TYPE_SIZES, ByteOrder, Header

_SHARD = re.compile(r"^(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$", re.DOTALL)

# Byte offsets of the 16-bit fields of a block; the rest of the block is single bytes.
_WIDE_FIELDS: dict[str, tuple[int, ...]] = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2),
    "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0, 2), "TQ1_0": (52,), "TQ2_0": (64,), "MXFP4": (), "NVFP4": (),
    "Q1_0": (0,),
}  # fmt: skip
_PLAIN_ITEMSIZE = {name: nbytes for name, (block, nbytes) in TYPE_SIZES.items() if block == 1}
INTERLEAVED = {
    "arcee", "arctic", "baichuan", "bailingmoe", "chameleon", "chatglm", "cohere2", "command-r", "deci", "deepseek",
    "deepseek2", "ernie4_5", "glm4", "granite", "granitehybrid", "granitemoe", "internlm2", "llada", "llama", "llama4",
    "minicpm", "mistral3", "olmo", "plm", "smollm3", "xverse",
}  # fmt: skip
"""Architectures whose rows of q and k are stored as rotary pairs (2j, 2j+1): those that llama.cpp rotates so."""


class GGUFFile:
    """An open GGUF file or split set; made by ``read_gguf``.

    Attributes:
        paths: the files, in split order; ``path`` is the first.
        version: 2 or 3.
        byte_order: "little" or "big".
        metadata: keys and values of the first file.
        tensors: name -> TensorInfo of all files, in file order.

    ``metadata``, ``tensors`` and arrays from ``data`` stay valid after ``close``: each array keeps its mapping alive.
    """

    def __init__(self, paths: list[Path], headers: list[Header], maps: list[np.ndarray]):
        self.paths = tuple(paths)
        self.version = headers[0].version
        self.byte_order: ByteOrder = headers[0].byte_order
        self.metadata = Metadata(headers[0].metadata, headers[0].value_offsets, str(paths[0]))
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(
            {name: info for header in headers for name, info in header.tensors.items()}
        )
        self._maps: list[np.ndarray] | None = maps

    @property
    def path(self) -> Path:
        return self.paths[0]

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def format(self) -> str:
        return f"GGUF version {self.version}, {self.byte_order}-endian"

    @property
    def tokenizer_kind(self) -> str:
        pre = self.metadata.get("tokenizer.ggml.pre")
        return f"{self.metadata.get('tokenizer.ggml.model', 'no tokenizer')}" + (f" ({pre})" if pre else "")

    folder = None  # the metadata describes the tokenizer
    norm_offset = 0.0  # Gemma's converter adds the 1

    @property
    def interleaved_rope_rows(self) -> bool:
        """Whether rows of q and k are rotary pairs (2j, 2j+1), which depends on the architecture."""
        return self.metadata.get("general.architecture") in INTERLEAVED

    @property
    def file_nbytes(self) -> int:
        """Bytes of all files together when they were opened."""
        return sum(m.nbytes for m in self._open_maps())

    def data(self, name: str) -> np.ndarray:
        """The bytes of a tensor, uint8 [rows, row_nbytes], read-only; [1, nbytes] for a vector.

        Dimensions before the last are flattened into rows. The bytes are little-endian: the mapped pages of the file,
        or a swapped copy if the file is big-endian.

        Raises:
            GGUFError: there is no such tensor, the file is closed, or the type has no defined big-endian form.
        """
        maps = self._open_maps()
        info = self._info(name)
        raw = maps[info.file_index][info.offset : info.offset + info.nbytes]
        if self.byte_order == "big":
            raw = self._little_endian(raw, info)
        return raw.reshape(info.rows, info.row_nbytes)

    def close(self) -> None:
        """Drop the mappings. Idempotent. A mapping ends with the last array that was made from it."""
        self._maps = None

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        files = f" in {len(self.paths)} files" if len(self.paths) > 1 else ""
        closed = ", closed" if self._maps is None else ""
        return f"GGUFFile({self.path}, v{self.version}, {len(self.tensors)} tensors{files}{closed})"

    def _open_maps(self) -> list[np.ndarray]:
        if self._maps is None:
            remedy = "Read inside the with block, or call read_gguf again"
            self._refuse("the file is closed", "tensors are read while it is open", remedy)
        return self._maps

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            close = close_names(name, self.tensors)
            remedy = f"Close names are {', '.join(close)}" if close else "Name one of file.tensors"
            self._refuse(f"no tensor {name!r}", "the tensor must be in the file", remedy)
        return self.tensors[name]

    def _little_endian(self, raw: np.ndarray, info: TensorInfo) -> np.ndarray:
        swapped = raw.copy()
        if info.ggml_type in _PLAIN_ITEMSIZE:
            swapped.view(f"u{_PLAIN_ITEMSIZE[info.ggml_type]}").byteswap(inplace=True)
        elif info.ggml_type in _WIDE_FIELDS:
            blocks = swapped.reshape(-1, TYPE_SIZES[info.ggml_type][1])
            for at in _WIDE_FIELDS[info.ggml_type]:
                blocks[:, [at, at + 1]] = blocks[:, [at + 1, at]]
        else:
            rule = f"a defined big-endian form exists for {', '.join([*_PLAIN_ITEMSIZE, *_WIDE_FIELDS])}"
            remedy = "Use the little-endian file of this model"
            self._refuse(f"type {info.ggml_type} in a big-endian file", rule, remedy, info)
        swapped.flags.writeable = False
        return swapped

    def _refuse(self, found: str, rule: str, remedy: str, info: TensorInfo | None = None) -> NoReturn:
        path, offset, reading = self.path, None, None
        if info is not None:
            path, offset, reading = self.paths[info.file_index], info.offset, f"tensor {info.name!r}"
        raise GGUFError(found, rule=rule, remedy=remedy, path=str(path), offset=offset, reading=reading)


def read_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Open a GGUF file, or the whole split set whose first file ``path`` names (``...-00001-of-0000N.gguf``).

    Raises:
        GGUFError: the file is missing, is not GGUF, or breaks a rule of the format. Nothing stays open.
    """
    first = Path(path)
    mapped, header = _open(first, 0)
    paths, maps, headers = [first], [mapped], [header]
    split = Metadata(header.metadata, header.value_offsets, str(first))
    count = split.integer("split.count", 0)
    if count > 1:
        for index, shard in enumerate(_shards(first, split, count)[1:], start=1):
            mapped, header = _open(shard, index)
            _check_shard(shard, header, index, count, headers)
            paths.append(shard)
            maps.append(mapped)
            headers.append(header)
        total, expected = sum(len(h.tensors) for h in headers), split.integer("split.tensors.count")
        if total != expected:
            split.refuse("split.tensors.count", f"{expected}", f"the {count} files hold {total} tensors")
    return GGUFFile(paths, headers, maps)


def _open(path: Path, file_index: int) -> tuple[np.ndarray, Header]:
    """Map one file and check its header."""

    def refuse(found: str, rule: str, remedy: str) -> NoReturn:
        raise GGUFError(found, rule=rule, remedy=remedy, path=str(path))

    try:
        kind = path.stat().st_mode  # before opening: opening a pipe would wait for its writer
        if stat.S_ISDIR(kind):
            refuse("a directory", "the path names one file", "Name the .gguf file inside it")
        if not stat.S_ISREG(kind):
            refuse("not a regular file", "the file is memory-mapped", "Copy it to disk first")
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                refuse("an empty file", "a GGUF file starts with GGUF", "Download it again")
            mapped = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=np.uint8)
    except FileNotFoundError:
        refuse("no such file", "the file must exist", "Check the path, and that the download finished")
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        if isinstance(error, GGUFError):
            raise
        refuse(f"cannot be opened ({error})", "the file must be readable", "Check its permissions and the disk")
    return mapped, parse_header(mapped.data, str(path), file_index)


def _shards(first: Path, split: Metadata, count: int) -> list[Path]:
    """The paths of a split set, from the name and metadata of its first file."""
    match = _SHARD.match(first.name)
    if match is None or int(match["count"]) != count:
        split.refuse(
            "split.count",
            f"{count}",
            f"file 1 of {count} is named like model-00001-of-{count:05d}.gguf",
            "Restore the names under which the files were published",
        )
    shards = [first.with_name(f"{match['stem']}-{i + 1:05d}-of-{count:05d}.gguf") for i in range(count)]
    number = split.integer("split.no")
    if number != 0 or first != shards[0]:
        split.refuse(
            "split.no",
            f"{number} in a file named {first.name}",
            "a split set is opened by its first file",
            f"Open {shards[0]}",
        )
    return shards


def _check_shard(path: Path, header: Header, index: int, count: int, before: list[Header]) -> None:
    """Check that a later file of a split set agrees with the earlier ones and repeats no tensor."""
    metadata = Metadata(header.metadata, header.value_offsets, str(path))
    if metadata.integer("split.no") != index:
        metadata.refuse("split.no", f"{metadata['split.no']}", f"by its name this is file {index} counted from 0")
    if metadata.integer("split.count", count) != count:
        metadata.refuse("split.count", f"{metadata['split.count']}", f"the first file says {count}")
    order = before[0].byte_order
    if header.byte_order != order:
        rule = f"the first file of the set is {order}-endian"
        raise GGUFError(f"{header.byte_order}-endian", rule=rule, remedy=DAMAGED, path=str(path), offset=4)
    for name, info in header.tensors.items():
        if any(name in other.tensors for other in before):
            raise GGUFError(
                f"tensor {name!r} a second time",
                rule="a name occurs once in a split set",
                remedy=DAMAGED,
                path=str(path),
                offset=info.offset,
                reading=f"tensor {name!r}",
            )
