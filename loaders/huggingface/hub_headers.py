"""Fetching only the headers of files on the Hub, for ``inspect`` and ``plan``.

A header is fetched by HTTP ranges and written to a hollow copy: a sparse file of the full length, in which the weights
are holes. The usual readers open such a copy, and check its header against its length.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ..gguf.errors import GGUFError
from ..gguf.parse import parse_header
from .folder import TOKENIZER_FILES
from .hub import HubError, Repository, copy_json, has_weights, split_set
from .safetensors import LENGTH_BYTES, header_nbytes

Piece = tuple[int, bytes]  # an offset in a file, and the bytes there
FIRST_BYTES = 2**14  # of the first request for a GGUF file; each further request doubles what has been read
MOST_BYTES = 2**26  # per header; a vocabulary of 256,000 tokens takes 2^23
ROPE_FACTORS = "rope_"  # prefix of the tensors that the config needs: one number per rotary pair
MOST_FACTOR_BYTES = 2**16
AT_ONCE = 8  # shards whose headers are fetched concurrently


class RemoteFile(NamedTuple):
    """A file in one commit of a repository."""

    repository: Repository
    name: str

    def read(self, start: int, stop: int) -> tuple[bytes, int]:
        """The bytes from ``start`` to ``stop`` or the end of the file, and its length. Raises HubError."""
        return self.repository.ask(partial(self._read, start, stop))

    def _read(self, start: int, stop: int) -> tuple[bytes, int]:
        hub = self.repository.hub
        url = hub.hf_hub_url(self.repository.name, self.name, revision=self.repository.revision)
        wanted = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        headers = {**hub.utils.build_hf_headers(), **wanted}
        with hub.utils.get_session().stream("GET", url, headers=headers) as response:
            if response.status_code != 200:  # a whole file stays unread
                response.read()
            hub.utils.hf_raise_for_status(response)
            if response.status_code != 206:
                self.repository.refuse(
                    HubError,
                    f"{self.name} is sent whole in answer to a request for its header",
                    "headers are read by HTTP ranges",
                    "Download the model: rooflama.load, or the command run",
                )
            return response.content, int(response.headers["Content-Range"].rpartition("/")[2])

    def hollow(self, path: Path) -> None:
        """Write a hollow copy to ``path``: the header, and the rotary factors of a GGUF file."""
        pieces, size = self._gguf() if self.name.endswith(".gguf") else self._safetensors()
        try:
            lay_out(path, size, pieces)
        except OSError as error:
            self.repository.refuse(
                HubError,
                f"no room for {self.name}, of {size} bytes, in {path.parent} ({error.strerror})",
                "its header is written to a sparse file of the same length",
                "Set TMPDIR to a folder on a file system with sparse files",
            )

    def _safetensors(self) -> tuple[list[Piece], int]:
        """The header of a safetensors file. If its length is implausible, the reader will refuse the copy."""
        head, size = self.read(0, LENGTH_BYTES)
        stop = LENGTH_BYTES + header_nbytes(head)
        if not LENGTH_BYTES < stop <= min(size, MOST_BYTES):
            return [(0, head)], size
        return [(0, head), (LENGTH_BYTES, self.read(LENGTH_BYTES, stop)[0])], size

    def _gguf(self) -> tuple[list[Piece], int]:
        """The header of a GGUF file, found by parsing a growing part of it. The reader will refuse a damaged one."""
        head, size = self.read(0, FIRST_BYTES)
        while True:
            try:
                header = parse_header(memoryview(head), self.name, size=size)
            except GGUFError:
                if not head.startswith(b"GGUF") or len(head) >= min(size, MOST_BYTES):
                    return [(0, head)], size
                head += self.read(len(head), 2 * len(head))[0]
            else:
                factors = [info for info in header.tensors.values() if info.name.startswith(ROPE_FACTORS)]
                ends = [(info.offset, info.offset + min(info.nbytes, MOST_FACTOR_BYTES)) for info in factors]
                return [(0, head), *((start, self.read(start, stop)[0]) for start, stop in ends)], size


def lay_out(path: Path, size: int, pieces: Iterable[Piece]) -> None:
    """Write a sparse file of ``size`` bytes that holds the pieces, each at its offset."""
    with path.open("wb") as file:
        file.truncate(size)
        for start, content in pieces:
            file.seek(start)
            file.write(content)


def fetch_headers(text: str, scratch: Path) -> tuple[Path, str]:
    """Like ``fetch``, but weights that are not in the cache are replaced by hollow copies.

    Args:
        text: the reference.
        scratch: an empty folder for the hollow copies, which must exist while they are read.

    Returns:
        As ``fetch``: the file or folder, and the name of the file or repository.

    Raises:
        NotOnHubError, HubUnreachableError, HubError: as for ``fetch``.
        HuggingFaceError: config.json or the index is damaged.
    """
    repository = Repository.of(text)
    snapshot = repository.download(["config.json", "*.safetensors.index.json"])
    pinned = repository._replace(revision=snapshot.name)
    if repository.file is not None:
        names = split_set(repository.file)
        folder = snapshot if all((snapshot / name).is_file() for name in names) else scratch
        if folder is scratch:
            for name in names:
                (scratch / name).parent.mkdir(parents=True, exist_ok=True)
                RemoteFile(pinned, name).hollow(scratch / name)
        return folder / names[0], Path(names[0]).name
    if has_weights(snapshot):
        return snapshot, repository.title
    folder = copy_json(snapshot, scratch / repository.title)
    listed = pinned.files()
    files = [RemoteFile(pinned, name) for name in pinned.weight_files(snapshot, listed)]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(lambda file: file.hollow(folder / file.name), files))
    for name in TOKENIZER_FILES:
        if name in listed:
            (folder / name).touch()
    return folder, repository.title
