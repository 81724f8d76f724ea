"""Unreadable paths: each raises one typed error that names the path and the reason, never an OSError."""

import errno
import io
import os
import re
from pathlib import Path

import pytest

import rooflama
from rooflama import RooflamaError
from rooflama.loaders.huggingface.folder import read_safetensors
from rooflama.loaders.text.folder import read_folder_tokenizer
from small_checkpoint import Parts
from whole_checkpoints import write_folder

DENIED = "(Permission denied)"


@pytest.fixture
def deny(monkeypatch):
    """A function that makes a path unreadable, even for root."""
    denied = set()

    def guarded(real):
        def call(path, *arguments, **options):
            if isinstance(path, str | os.PathLike) and Path(path) in denied:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(path))
            return real(path, *arguments, **options)

        return call

    for module, name in ((io, "open"), (os, "stat"), (os, "listdir"), (os, "scandir")):
        monkeypatch.setattr(module, name, guarded(getattr(module, name)))
    return denied.add


@pytest.fixture
def folder(tmp_path):
    return write_folder("llama3", tmp_path / "llama3")


@pytest.mark.parametrize("ask", [rooflama.inspect, rooflama.plan_memory, rooflama.load_tokenizer])
@pytest.mark.parametrize("name", ["blob", "small.gguf"])
def test_unreadable_files(ask, name, tmp_path, deny):
    path = Parts().write(tmp_path / name)
    ask(path)
    deny(path)
    with pytest.raises(RooflamaError, match=rf"{name}: cannot be opened .*Permission denied"):
        ask(path)


@pytest.mark.parametrize("name", ["x" * 300, f"{'x' * 300}.gguf", f"{'x' * 300}.json", f"{'x' * 300}/model.gguf"])
def test_names_that_are_too_long(name, tmp_path):
    with pytest.raises(RooflamaError, match=r"xxx.*: cannot be opened \(File name too long\)"):
        rooflama.inspect(tmp_path / name)


@pytest.mark.parametrize(
    "name",
    ["", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"],
)
def test_unreadable_files_of_a_folder(name, folder, deny):
    (folder / "chat_template.jinja").write_text("{{ bos_token }}")

    def ask():
        read_safetensors(folder).close()
        read_folder_tokenizer(folder)

    ask()
    deny(folder / name)
    with pytest.raises(RooflamaError, match=re.escape(f"{folder / name}: cannot be read {DENIED}: the files of")):
        ask()


def test_a_tokenizer_model_that_is_unreadable(tmp_path, deny):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"")
    deny(path)
    with pytest.raises(RooflamaError, match=re.escape(DENIED)):
        read_folder_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("put", "why"),
    [
        (lambda path: path.mkdir(), "Is a directory"),
        (lambda path: path.symlink_to("nowhere"), "No such file or directory"),
    ],
    ids=["directory", "dangling link"],
)
def test_weights_that_are_no_file(put, why, folder):
    path = folder / "model.safetensors"
    path.unlink()
    put(path)
    with pytest.raises(RooflamaError, match=re.escape(f"{path}: cannot be read ({why})")):
        read_safetensors(folder)


def test_an_index_that_names_a_file_too_long(folder):
    name = f"{'x' * 300}.safetensors"
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(f'{{"weight_map": {{"a": "{name}"}}}}')
    with pytest.raises(RooflamaError, match=rf"{name}: cannot be read \(File name too long\)"):
        read_safetensors(folder)
