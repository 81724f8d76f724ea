"""Opening every kind of checkpoint, and refusing what is not a checkpoint."""

import importlib
import re
from pathlib import Path

import pytest

import rooflama
from rooflama import RooflamaError
from rooflama.loaders.gguf import GGUFFile
from rooflama.loaders.huggingface.folder import SafetensorsCheckpoint
from rooflama.loaders.opening import UnknownCheckpointError, locate, open_checkpoint
from small_checkpoint import Parts
from tiny_checkpoints import write_case


@pytest.mark.parametrize("name", ["small.gguf", "blob-without-suffix"])
@pytest.mark.parametrize("kind", [str, Path])
def test_a_file_is_gguf_whatever_its_name(name, kind, tmp_path):
    path = Parts().write(tmp_path / name)
    with open_checkpoint(kind(path)) as made:
        assert isinstance(made, GGUFFile)
        assert (made.name, made.format, made.paths) == (name, "GGUF version 3, little-endian", (path,))
        assert made.tokenizer_kind == "gpt2 (smollm)"


def test_a_folder_is_safetensors(tmp_path, monkeypatch):
    folder = write_case("llama3", tmp_path, "safetensors")
    monkeypatch.chdir(folder)
    for path in (folder, f"{folder}/", "."):
        with open_checkpoint(path) as made:
            assert isinstance(made, SafetensorsCheckpoint)
            assert (made.name, made.tokenizer_kind) == ("llama3", "no tokenizer")
            assert [file.name for file in made.paths] == ["model.safetensors"]
            assert made.file_nbytes == (folder / "model.safetensors").stat().st_size


def touch(folder, *names):
    for name in names:
        (folder / name).write_bytes(b"some bytes")
    return folder


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: d, "an empty folder: a folder holds config.json and model.safetensors. Check the path"),
        (lambda d: touch(d, "config.json", "pytorch_model.bin"), "no safetensors file, but pytorch_model.bin"),
        (lambda d: touch(d, "consolidated.00.pth", "params.json"), "pickled weights can run any code and are not read"),
        (lambda d: touch(d, "a.gguf", "b.gguf", "config.json"), "a folder of GGUF files (a.gguf, b.gguf)"),
        (lambda d: touch(d, "a.gguf"), "/a.gguf."),
        (lambda d: touch(d, *(f"{i}.bin" for i in range(5))), "but 0.bin, 1.bin, 2.bin and 2 more"),
        (lambda d: touch(d, "README.md"), "no safetensors file: "),
        (lambda d: touch(d, "model.safetensors"), "config.json: no such file"),
        (lambda d: d / "nowhere", "nowhere: no such file or folder: a checkpoint is a .gguf file or a folder"),
        (lambda d: d / "owner/repo", "Check the path; a Hub repository is hf:owner/repo"),
        (lambda d: d / "missing.gguf", "missing.gguf: no such file"),
        (lambda d: touch(d, "model.safetensors") / "model.safetensors", "one file of a checkpoint: "),
        (lambda d: touch(d, "tokenizer.json") / "tokenizer.json", "Name its folder, or a .gguf file"),
        (lambda d: touch(d, "pytorch_model.bin") / "pytorch_model.bin", "Use a safetensors folder, or a .gguf file"),
        (lambda d: touch(d, "notes.txt") / "notes.txt", "notes.txt: neither a GGUF file nor a folder"),
        (lambda d: touch(d, "bad.gguf") / "bad.gguf", "starts with b'some'"),
    ],
)
@pytest.mark.parametrize(
    "ask", [rooflama.load, rooflama.inspect, rooflama.plan_memory, open_checkpoint], ids=lambda ask: ask.__name__
)
def test_what_is_no_checkpoint_is_refused(ask, make, message, tmp_path):
    with pytest.raises(RooflamaError, match=re.escape(message)) as caught:
        ask(make(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_missing_shard_is_named(tmp_path):
    folder = write_case("llama3", tmp_path, "safetensors")
    index = '{"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}'
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(RooflamaError, match=r"model-00002-of-00002\.safetensors is missing"):
        rooflama.inspect(folder)


def test_a_tokenizer_is_read_without_weights(tmp_path):
    Parts(weights={}, types={}).write(tmp_path / "vocabulary.gguf")
    assert rooflama.load_tokenizer(tmp_path / "vocabulary.gguf").vocab_size
    with pytest.raises(RooflamaError, match=r"no tokenizer\.json and no tokenizer\.model"):
        rooflama.load_tokenizer(touch(tmp_path, "config.json"))
    with pytest.raises(UnknownCheckpointError):
        rooflama.load_tokenizer(tmp_path / "nowhere")


def test_a_location_is_not_opened_yet(tmp_path):
    found = locate(touch(tmp_path, "bad.gguf") / "bad.gguf")
    assert (found.path, found.name) == (tmp_path / "bad.gguf", "bad.gguf")


def test_nothing_else_in_the_public_room_asks_for_the_kind():
    readers = re.compile(r"read_gguf|GGUFFile|read_safetensors|SafetensorsCheckpoint|is_dir\(|isinstance\(checkpoint")
    room = Path(__file__).parents[2] / "rooflama"
    assert not [path.name for path in room.glob("*.py") if readers.search(path.read_text())]


@pytest.mark.parametrize(("module", "name"), [("tokenizer", "Tokenizer"), ("chat_template", "ChatTemplate")])
def test_names_are_importable_from_where_they_were(module, name):
    old, new = (importlib.import_module(f"rooflama.loaders.{path}{module}") for path in ("", "text."))
    assert getattr(old, name) is getattr(new, name)
