"""``hf:`` references: files of the Hugging Face Hub, through huggingface_hub (the extra ``hub``).

The library's own rules hold: HF_HOME for the cache, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE. What is in the cache is not
downloaded again; a revision that is a full commit hash is not even asked for.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, NoReturn

from rooflama.kernels import RooflamaError

PREFIX = "hf:"
REFERENCE = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^:@]+))?(:(?P<file>[^:]+))?")
FORM = "a reference is hf:owner/repo, hf:owner/repo@revision or hf:owner/repo:file.gguf"

SMALL_FILES = ["*.json", "*.jinja", "tokenizer.model"]
WEIGHTS = ["model*.safetensors"]
LEFT_OUT = ["[!a]*/*", "a[!d]*/*"]  # folders of other formats (original/, onnx/); not additional_chat_templates/
SHARD = re.compile(r"(?P<stem>.+)-00001-of-(?P<count>\d{5})\.gguf")


class HubError(RooflamaError, OSError):
    """Files of the Hub that cannot be had."""


class NotOnHubError(HubError):
    """A repository, revision or file that the Hub does not have, or does not show to this user."""


class HubUnreachableError(HubError):
    """The Hub cannot be asked, and the cache does not have what is asked for."""


class Reference(NamedTuple):
    """The parts of ``hf:repo@revision:file``."""

    repo: str
    revision: str | None
    file: str | None

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Raises HubError for what is no reference."""
        match = REFERENCE.fullmatch(text)
        if match is None:
            _refuse(HubError, text, "no reference", FORM, "Write it like hf:HuggingFaceTB/SmolLM2-135M")
        file = match["file"]
        if file is not None and (not file.endswith(".gguf") or ".." in file.split("/") or file.startswith("/")):
            _refuse(HubError, text, f"file {file!r}", FORM, "Name a .gguf file, or none for the safetensors")
        return cls(match["repo"], match["revision"], file)


def fetch(text: str, *, weights: bool = True) -> tuple[Path, str]:
    """Download what a reference names, unless the cache has it.

    Args:
        text: the reference.
        weights: whether the safetensors are wanted; a GGUF file comes whole.

    Returns:
        The file or folder in the cache, and the name that it goes by: the file's, or the repository's.

    Raises:
        NotOnHubError: no such repository, revision or file, or no access to it.
        HubUnreachableError: no network, or HF_HUB_OFFLINE is set, and the cache does not have it.
        HubError: the reference is malformed, huggingface_hub is not installed, or the Hub answers with an error.
    """
    reference = Reference.parse(text)
    hub = _library(text)
    if reference.file is None:
        patterns = [*SMALL_FILES, *(WEIGHTS if weights else [])]
        download = partial(
            hub.snapshot_download,
            reference.repo,
            revision=reference.revision,
            allow_patterns=patterns,
            ignore_patterns=LEFT_OUT,
        )
        folder = _asked(hub, text, reference, download)
        if weights and not any(folder.glob("*.safetensors")):
            _refuse_without_weights(hub, text, reference)
        return folder, reference.repo.split("/")[1]
    paths = []
    for name in _split_set(reference.file):
        download = partial(hub.hf_hub_download, reference.repo, name, revision=reference.revision)
        paths.append(_asked(hub, text, reference, download))
    return paths[0], paths[0].name


def _split_set(file: str) -> list[str]:
    """The file, or if its name is that of the first of a split set, all of the set."""
    shard = SHARD.fullmatch(file)
    if shard is None:
        return [file]
    return [f"{shard['stem']}-{i + 1:05d}-of-{shard['count']}.gguf" for i in range(int(shard["count"]))]


def _library(text: str) -> ModuleType:
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError:
        _refuse(
            HubError,
            text,
            "huggingface_hub is not installed",
            "references to the Hub are resolved by it",
            "Run: pip install 'rooflama[hub]'",
        )
    return huggingface_hub


def _asked(hub: ModuleType, text: str, reference: Reference, ask: Callable[[], str]) -> Path:
    """What the library answers, its errors as ours."""
    errors = hub.errors
    revision = reference.revision or "main"
    try:
        return Path(ask())
    except errors.GatedRepoError:
        found, rule = "access to the repository is restricted", "its owner grants access to users that ask for it"
        remedy = f"Ask for it at https://huggingface.co/{reference.repo}, then set HF_TOKEN"
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
    except errors.HFValidationError as error:
        _refuse(HubError, text, str(error).rstrip("."), FORM, "Check the name")
    except Exception as error:  # its HTTP client, and so that one's errors, differ from version to version
        _refuse_unreachable(hub, text, error)
    _refuse(NotOnHubError, text, found, rule, remedy)


def _refuse_unreachable(hub: ModuleType, text: str, error: Exception) -> NoReturn:
    if hub.constants.HF_HUB_OFFLINE:
        _refuse(
            HubUnreachableError,
            text,
            "not in the cache, and HF_HUB_OFFLINE is set",
            "offline, only what was downloaded before can be opened",
            "Unset HF_HUB_OFFLINE, or set HF_HOME to the cache that has it",
        )
    cause = str(error.__cause__ or error).splitlines()[0].rstrip(".")
    _refuse(
        HubUnreachableError,
        text,
        f"not in the cache, and {hub.constants.ENDPOINT} does not give it ({cause})",
        "what is not in the cache is downloaded",
        "Check the network and HF_ENDPOINT, and try again",
    )


def _refuse_without_weights(hub: ModuleType, text: str, reference: Reference) -> NoReturn:
    files = _gguf_files(hub, reference)
    _refuse(
        NotOnHubError,
        text,
        "no model*.safetensors in the repository",
        "without a file, a reference means the safetensors",
        f"Its .gguf files are {files}" + (f": name one, as in {text}:FILE" if files != "none" else ""),
    )


def _gguf_files(hub: ModuleType, reference: Reference) -> str:
    try:
        files = hub.HfApi().list_repo_files(reference.repo, revision=reference.revision)
    except Exception:  # as above
        return "not known here, since the Hub cannot be asked"
    return ", ".join(file for file in files if file.endswith(".gguf")) or "none"


def _refuse(kind: type[HubError], text: str, found: str, rule: str, remedy: str) -> NoReturn:
    raise kind(f"{text}: {found}", rule=rule, remedy=remedy)
