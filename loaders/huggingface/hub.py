"""``hf:`` references: downloading files of the Hugging Face Hub with huggingface_hub (the extra ``hub``).

The library's variables apply: HF_HOME for the cache, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE. A file in the cache is not
downloaded again. For a revision that is a full commit hash, the Hub is not contacted at all.
"""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import NamedTuple, NoReturn, TypeVar

from rooflama.kernels import RooflamaError

from .json_files import HuggingFaceError, read_json
from .weight_files import weight_files

PREFIX = "hf:"
REFERENCE = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^:@]+))?(:(?P<file>[^:]+))?")
FORM = "a reference is hf:owner/repo, hf:owner/repo@revision or hf:owner/repo:file.gguf"

SMALL_FILES = ["*.json", "*.jinja", "tokenizer.model"]
LEFT_OUT = ["[!a]*/*", "a[!d]*/*"]  # folders of other formats (original/, onnx/), but not additional_chat_templates/
Answer = TypeVar("Answer")
SHARD = re.compile(r"(?P<stem>.+)-00001-of-(?P<count>\d{5})\.gguf")


class HubError(RooflamaError, OSError):
    """Files of the Hub that cannot be downloaded."""


class NotOnHubError(HubError):
    """A repository, revision or file that does not exist, or is not visible to this user."""


class HubUnreachableError(HubError):
    """The Hub cannot be reached, and the cache lacks the file."""


class Repository(NamedTuple):
    """The repository that a reference names, at one revision.

    Attributes:
        hub: the library huggingface_hub.
        text: the reference.
        name: owner/repo.
        revision: a branch, tag or commit; None for the main branch.
        file: the GGUF file that the reference names; None for the safetensors.
    """

    hub: ModuleType
    text: str
    name: str
    revision: str | None
    file: str | None

    @classmethod
    def of(cls, text: str) -> Repository:
        """Parse a reference. Raises HubError if ``text`` is not one, or huggingface_hub is not installed."""
        match = REFERENCE.fullmatch(text)
        if match is None:
            raise HubError(f"{text}: not a reference", rule=FORM, remedy="Write it like hf:HuggingFaceTB/SmolLM2-135M")
        file = match["file"]
        if file is not None and (not file.endswith(".gguf") or ".." in file.split("/") or file.startswith("/")):
            raise HubError(f"{text}: file {file!r}", rule=FORM, remedy="Name a .gguf file, or none for the safetensors")
        try:
            import huggingface_hub
            import huggingface_hub.constants
            import huggingface_hub.errors
        except ImportError:
            raise HubError(
                f"{text}: huggingface_hub is not installed",
                rule="it resolves references to the Hub",
                remedy="Run: pip install 'rooflama[hub]'",
            ) from None
        return cls(huggingface_hub, text, match["repo"], match["revision"], file)

    @property
    def title(self) -> str:
        return self.name.split("/")[1]

    def refuse(self, kind: type[HubError], found: str, rule: str, remedy: str) -> NoReturn:
        raise kind(f"{self.text}: {found}", rule=rule, remedy=remedy)

    def download(self, patterns: list[str]) -> Path:
        """Download the files that match ``patterns``; returns their folder, which is named after the commit."""
        options = {"allow_patterns": patterns, "ignore_patterns": LEFT_OUT}
        return Path(self.ask(partial(self.hub.snapshot_download, self.name, revision=self.revision, **options)))

    def files(self) -> list[str]:
        """The names of all files."""
        return self.ask(partial(self.hub.HfApi().list_repo_files, self.name, revision=self.revision))

    def weight_files(self, folder: Path, listed: list[str]) -> list[str]:
        """The files that hold the weights, by the rules for a local folder.

        Args:
            folder: holds config.json and the indices of the repository.
            listed: the names of all files.
        """
        names = [name for name in listed if name.endswith(".safetensors") and "/" not in name]
        if not names:
            files = self._gguf_files()
            self.refuse(
                NotOnHubError,
                "no safetensors in the repository",
                "a reference that names no file means the safetensors",
                f"Its .gguf files are {files}" + (f": name one, as in {self.text}:FILE" if files != "none" else ""),
            )
        with TemporaryDirectory(prefix="rooflama-") as scratch:
            like_it = copy_json(folder, Path(scratch) / folder.name)
            for name in names:
                (like_it / name).touch()
            return _weight_names(like_it)

    def ask(self, request: Callable[[], Answer]) -> Answer:
        """The result of ``request``; errors of the library are raised as HubError."""
        errors = self.hub.errors
        revision = self.revision or "main"
        page = f"https://huggingface.co/{self.name}"
        try:
            return request()
        except errors.GatedRepoError:
            found, rule = "access to the repository is restricted", "its owner grants access on request"
            remedy = f"Request it at {page}, then set HF_TOKEN"
        except errors.RepositoryNotFoundError:
            found, rule = f"no repository {self.name!r}", "the repository exists and is public, or HF_TOKEN may read it"
            remedy = "Check the name; for a private one set HF_TOKEN"
        except errors.RevisionNotFoundError:
            found, rule = f"no revision {revision!r}", "a revision is a branch, a tag or a commit of the repository"
            remedy = f"Look at {page}/commits"
        except errors.LocalEntryNotFoundError as error:
            self._refuse_unreachable(error)
        except errors.EntryNotFoundError:
            found, rule = f"no file {self.file!r}", f"the file is in the repository at revision {revision}"
            remedy = f"Its .gguf files are {self._gguf_files()}"
        except HubError:
            raise
        except errors.HFValidationError as error:
            self.refuse(HubError, str(error).rstrip("."), FORM, "Check the name")
        except Exception as error:  # the HTTP client, and with it its errors, differ between versions of the library
            self._refuse_unreachable(error)
        self.refuse(NotOnHubError, found, rule, remedy)

    def _refuse_unreachable(self, error: Exception) -> NoReturn:
        constants = self.hub.constants
        if constants.HF_HUB_OFFLINE:
            self.refuse(
                HubUnreachableError,
                "not in the cache, and HF_HUB_OFFLINE is set",
                "offline, only files in the cache can be opened",
                "Unset HF_HUB_OFFLINE, or set HF_HOME to a cache that has the file",
            )
        cause = str(error.__cause__ or error).splitlines()[0].rstrip(".")
        self.refuse(
            HubUnreachableError,
            f"not in the cache, and not available from {constants.ENDPOINT} ({cause})",
            "files that are not in the cache are downloaded",
            "Check the network and HF_ENDPOINT, and try again",
        )

    def _gguf_files(self) -> str:
        try:
            files = self.hub.HfApi().list_repo_files(self.name, revision=self.revision)
        except Exception:  # as in ``ask``
            return "unknown, because the Hub cannot be reached"
        return ", ".join(file for file in files if file.endswith(".gguf")) or "none"


def fetch(text: str, *, weights: bool = True) -> tuple[Path, str]:
    """Download the files that a reference names, unless the cache has them.

    Args:
        text: the reference.
        weights: False leaves out the safetensors; a GGUF file is always downloaded whole.

    Returns:
        The file or folder in the cache, and the name of the file or repository.

    Raises:
        NotOnHubError: the repository, revision or file does not exist, or is not accessible.
        HubUnreachableError: the cache lacks a file, and there is no network or HF_HUB_OFFLINE is set.
        HubError: the reference is malformed, huggingface_hub is not installed, or the Hub answers with an error.
    """
    repository = Repository.of(text)
    if repository.file is None:
        folder = repository.download(SMALL_FILES)
        if weights and not has_weights(folder):
            pinned = repository._replace(revision=folder.name)
            pinned.download(pinned.weight_files(folder, pinned.files()))
        return folder, repository.title
    download = partial(repository.hub.hf_hub_download, repository.name, revision=repository.revision)
    paths = [Path(repository.ask(partial(download, name))) for name in split_set(repository.file)]
    return paths[0], paths[0].name


def has_weights(folder: Path) -> bool:
    """Whether a folder in the cache has the files that hold its weights."""
    try:
        return bool(_weight_names(folder))
    except HuggingFaceError:
        return False


def copy_json(folder: Path, target: Path) -> Path:
    """Copy the JSON files of a folder to a new folder."""
    target.mkdir()
    for path in folder.glob("*.json"):
        shutil.copy(path, target)
    return target


def _weight_names(folder: Path) -> list[str]:
    """The weight files of a folder, without warnings: a repository may hold several forms. Raises HuggingFaceError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [path.name for path in weight_files(folder, read_json(folder / "config.json"))]


def split_set(file: str) -> list[str]:
    """All files of a split set if ``file`` is its first, else ``file`` alone."""
    shard = SHARD.fullmatch(file)
    if shard is None:
        return [file]
    return [f"{shard['stem']}-{i + 1:05d}-of-{shard['count']}.gguf" for i in range(int(shard["count"]))]
