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


class Reference(NamedTuple):
    """The parts of ``hf:repo@revision:file``."""

    repo: str
    revision: str | None
    file: str | None

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Parse a reference. Raises HubError if ``text`` is not one."""
        match = REFERENCE.fullmatch(text)
        if match is None:
            refuse(HubError, text, "not a reference", FORM, "Write it like hf:HuggingFaceTB/SmolLM2-135M")
        file = match["file"]
        if file is not None and (not file.endswith(".gguf") or ".." in file.split("/") or file.startswith("/")):
            refuse(HubError, text, f"file {file!r}", FORM, "Name a .gguf file, or none for the safetensors")
        return cls(match["repo"], match["revision"], file)


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
    reference = Reference.parse(text)
    hub = library(text)
    if reference.file is None:
        folder = download(hub, text, reference, SMALL_FILES)
        if weights and not has_weights(folder):
            pinned = reference._replace(revision=folder.name)
            listed = repository_files(hub, text, pinned)
            download(hub, text, pinned, chosen_weights(hub, text, pinned, folder, listed))
        return folder, reference.repo.split("/")[1]
    paths = []
    for name in split_set(reference.file):
        ask = partial(hub.hf_hub_download, reference.repo, name, revision=reference.revision)
        paths.append(Path(asked(hub, text, reference, ask)))
    return paths[0], paths[0].name


def download(hub: ModuleType, text: str, reference: Reference, patterns: list[str]) -> Path:
    """Download the files of a repository that match ``patterns``; returns their folder, named after the commit."""
    ask = partial(
        hub.snapshot_download,
        reference.repo,
        revision=reference.revision,
        allow_patterns=patterns,
        ignore_patterns=LEFT_OUT,
    )
    return Path(asked(hub, text, reference, ask))


def repository_files(hub: ModuleType, text: str, reference: Reference) -> list[str]:
    """The names of all files of a repository."""
    return asked(
        hub, text, reference, partial(hub.HfApi().list_repo_files, reference.repo, revision=reference.revision)
    )


def has_weights(folder: Path) -> bool:
    """Whether a folder in the cache has the files that hold its weights."""
    try:
        return bool(_weight_names(folder))
    except HuggingFaceError:
        return False


def chosen_weights(hub: ModuleType, text: str, reference: Reference, folder: Path, listed: list[str]) -> list[str]:
    """The files of a repository that hold the weights, by the rules for a local folder.

    Args:
        hub, text, reference: the library, the reference as text, and parsed.
        folder: holds config.json and the indices of the repository.
        listed: the names of all files of the repository.
    """
    names = [name for name in listed if name.endswith(".safetensors") and "/" not in name]
    if not names:
        refuse_without_weights(hub, text, reference)
    with TemporaryDirectory(prefix="rooflama-") as scratch:
        like_it = copy_json(folder, Path(scratch) / folder.name)
        for name in names:
            (like_it / name).touch()
        return _weight_names(like_it)


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


def library(text: str) -> ModuleType:
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError:
        refuse(
            HubError,
            text,
            "huggingface_hub is not installed",
            "it resolves references to the Hub",
            "Run: pip install 'rooflama[hub]'",
        )
    return huggingface_hub


def asked(hub: ModuleType, text: str, reference: Reference, ask: Callable[[], Answer]) -> Answer:
    """The result of ``ask``; errors of the library are raised as HubError."""
    errors = hub.errors
    revision = reference.revision or "main"
    try:
        return ask()
    except errors.GatedRepoError:
        found, rule = "access to the repository is restricted", "its owner grants access on request"
        remedy = f"Request it at https://huggingface.co/{reference.repo}, then set HF_TOKEN"
    except errors.RepositoryNotFoundError:
        found, rule = (
            f"no repository {reference.repo!r}",
            "the repository exists and is public, or HF_TOKEN may read it",
        )
        remedy = "Check the name; for a private one set HF_TOKEN"
    except errors.RevisionNotFoundError:
        found, rule = f"no revision {revision!r}", "a revision is a branch, a tag or a commit of the repository"
        remedy = f"Look at https://huggingface.co/{reference.repo}/commits"
    except errors.LocalEntryNotFoundError as error:
        _refuse_unreachable(hub, text, error)
    except errors.EntryNotFoundError:
        found, rule = f"no file {reference.file!r}", f"the file is in the repository at revision {revision}"
        remedy = f"Its .gguf files are {_gguf_files(hub, reference)}"
    except HubError:
        raise
    except errors.HFValidationError as error:
        refuse(HubError, text, str(error).rstrip("."), FORM, "Check the name")
    except Exception as error:  # the HTTP client, and with it its errors, differ between versions of the library
        _refuse_unreachable(hub, text, error)
    refuse(NotOnHubError, text, found, rule, remedy)


def _refuse_unreachable(hub: ModuleType, text: str, error: Exception) -> NoReturn:
    if hub.constants.HF_HUB_OFFLINE:
        refuse(
            HubUnreachableError,
            text,
            "not in the cache, and HF_HUB_OFFLINE is set",
            "offline, only files in the cache can be opened",
            "Unset HF_HUB_OFFLINE, or set HF_HOME to a cache that has the file",
        )
    cause = str(error.__cause__ or error).splitlines()[0].rstrip(".")
    refuse(
        HubUnreachableError,
        text,
        f"not in the cache, and not available from {hub.constants.ENDPOINT} ({cause})",
        "files that are not in the cache are downloaded",
        "Check the network and HF_ENDPOINT, and try again",
    )


def refuse_without_weights(hub: ModuleType, text: str, reference: Reference) -> NoReturn:
    files = _gguf_files(hub, reference)
    refuse(
        NotOnHubError,
        text,
        "no safetensors in the repository",
        "a reference that names no file means the safetensors",
        f"Its .gguf files are {files}" + (f": name one, as in {text}:FILE" if files != "none" else ""),
    )


def _gguf_files(hub: ModuleType, reference: Reference) -> str:
    try:
        files = hub.HfApi().list_repo_files(reference.repo, revision=reference.revision)
    except Exception:  # as in ``asked``
        return "unknown, because the Hub cannot be reached"
    return ", ".join(file for file in files if file.endswith(".gguf")) or "none"


def refuse(kind: type[HubError], text: str, found: str, rule: str, remedy: str) -> NoReturn:
    raise kind(f"{text}: {found}", rule=rule, remedy=remedy)
