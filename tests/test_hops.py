"""How many files a newcomer opens to follow one tensor from file to product, or one token from prompt to text.

A file of ours is on the path if one of its functions takes, holds or returns the tensor or the token, in any form:

    the tensor    its header entry, its bytes, and what is made of them: planes, weight, projection
    the token     its text, its id, and its row of the activations

A list, tuple or dictionary of it counts as it does. A record that carries it among other things, such as a layer or a
sequence, counts where it is put in or taken out: files that only pass the record on, count, place or time never look at
it. Kernels are left out: each is a file of its own, with its checks and its definition.

Both paths are measured, by a profiler that looks at every local variable of every call while a checkpoint is loaded and
answers. The tensor's numbers are all alike, and the token is a word that occurs nowhere else, so either is recognised
in whatever form it takes.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import rooflama
from rooflama.loaders.checkpoint import TensorInfo
from rooflama.models.weights import Projection
from small_checkpoint import SPECIAL, VOCABULARY, Parts
from speaking_checkpoint import speaking

ROOT = Path(__file__).parents[1]
ROOMS = ("loaders", "models", "rooflama")
FILES = {str(path): str(path.relative_to(ROOT)) for room in ROOMS for path in (ROOT / room).rglob("*.py")}
MOST_FILES = 12

TENSOR, VALUE = "blk.1.ffn_down.weight", 0.0127  # every weight of the tensor; Q8_0 stores it as 127 times a scale
WORD, WORD_ID, PROMPT_TOKENS = "qj", VOCABULARY, 7


def is_the_tensor(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.device.type == "cpu" and is_the_tensor(value.detach().numpy())
    if isinstance(value, np.ndarray):
        if value.dtype.kind == "f":
            return value.size > 0 and np.allclose(value, VALUE, rtol=1e-3, atol=0)
        return value.dtype.itemsize == 1 and value.size > 0 and bool(np.mean(value.view(np.uint8) == 127) > 0.9)
    if isinstance(value, TensorInfo):
        return value.name == TENSOR
    if isinstance(value, Projection):
        return is_the_tensor(vars(value).get("parts"))  # not there yet while it is made
    return any(is_the_tensor(item) for item in contents(value))


def is_the_token(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return is_the_token(value.detach().numpy())
    if isinstance(value, np.ndarray):
        if value.dtype.kind == "f":  # no other tensor has as many rows as the prompt has tokens, or as many logits
            return value.ndim > 1 and (value.shape[0] == PROMPT_TOKENS or value.shape == (1, VOCABULARY + 1))
        return bool((value == WORD_ID).any())
    if isinstance(value, str | bytes):
        return (WORD if isinstance(value, str) else WORD.encode()) in value
    return (type(value) is int and value == WORD_ID) or any(is_the_token(item) for item in contents(value))


def contents(value: Any) -> list:
    if isinstance(value, dict):
        return list(value.values())
    return list(value) if isinstance(value, list | tuple) else []


def files_that_see(is_it: Callable[[Any], bool], run: Callable[[], Any]) -> set[str]:
    """The files with a function that takes, holds or returns what ``is_it`` recognises while ``run`` runs."""
    unseen, seen = set(FILES), set()

    def look(frame, event, returned):
        file = frame.f_code.co_filename
        if file in unseen and event in ("call", "return") and is_it([*frame.f_locals.values(), returned]):
            unseen.remove(file)
            seen.add(FILES[file])

    before = sys.getprofile()
    sys.setprofile(look)
    try:
        run()
    finally:
        sys.setprofile(before)
    return seen


def assert_few(files: set[str], what: str):
    listed = "".join(f"\n    {file}" for file in sorted(files))
    assert len(files) <= MOST_FILES, f"{what} goes through {len(files)} files; the limit is {MOST_FILES}:{listed}"


@pytest.mark.usefixtures("numpy_backend")
def test_a_tensor_from_file_to_product(tmp_path):
    parts = Parts()
    parts.weights[TENSOR] = np.full_like(parts.weights[TENSOR], VALUE)
    parts.types[TENSOR] = "Q8_0"
    path = parts.write(tmp_path / "alike.gguf")

    def load_and_answer():
        with rooflama.load(path, device="cpu", progress=False) as model:
            model.generate("ab", max_new_tokens=1)

    files = files_that_see(is_the_tensor, load_and_answer)
    ends = {"loaders/gguf/parse.py", "loaders/gguf/repack.py", "loaders/device/raw.py", "models/weights.py"}
    assert ends <= files, "the profiler lost the tensor"
    assert_few(files, "a tensor")


@pytest.mark.usefixtures("numpy_backend")
def test_a_token_from_prompt_to_text(tmp_path):
    types = [3] * len(SPECIAL) + [1] * (VOCABULARY + 1 - len(SPECIAL))
    vocabulary = {"tokenizer.ggml.token_type": types, "tokenizer.ggml.merges": ["a b", " ".join(WORD)]}
    with rooflama.load(speaking(tmp_path / "word.gguf", WORD, **vocabulary), device="cpu", progress=False) as model:
        prompt = WORD * PROMPT_TOKENS
        assert model.tokenizer.encode(prompt) == [WORD_ID] * PROMPT_TOKENS
        answers = []
        files = files_that_see(is_the_token, lambda: answers.append(model.generate(prompt, max_new_tokens=1).text))
    assert answers == [WORD]
    ends = {"rooflama/model.py", "loaders/text/bpe.py", "models/decoder.py", "models/weights.py", "rooflama/results.py"}
    assert ends <= files, "the profiler lost the token"
    assert_few(files, "a token")
