"""What is compiled ahead: by ``rooflama.warm`` all that a model needs, by ``load`` what a first answer needs."""

import os
import subprocess
import sys

import pytest

from whole_checkpoints import write_file

pytestmark = pytest.mark.gpu

WARM = "import sys, rooflama; print(rooflama.warm(sys.argv[1], max_sequences=2).compiled)"
RUN = """
import sys, triton, rooflama
from rooflama.models.serving import runner

def listen(*, src, cache_hit, **_):
    if not cache_hit:
        compiled.append(src.name)

compiled = []
triton.knobs.compilation.listener = listen
runner.captured_sizes = lambda config: (8, 128)  # the passes of 250 tokens are not captured
with rooflama.load(sys.argv[1], max_sequences=2, progress=False) as model:
    for length in (1, 3, 8, 100, 250):
        prompt = [1 + i % 50 for i in range(length)]
        for options in ({}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.5}):
            model.generate([prompt, prompt[:1]], max_new_tokens=4, **options)
            model.generate(prompt, max_new_tokens=4, **options)
print("compiled:", *compiled)
"""
FIRST = """
import sys, triton, rooflama

compiled = []
triton.knobs.compilation.listener = lambda *, src, **_: compiled.append(src.name)
with rooflama.load(sys.argv[1], progress=False) as model:
    ahead = len(compiled)
    for length in (3, 60):
        model.generate([1 + i % 50 for i in range(length)], max_new_tokens=3)
print(ahead > 10, "compiled later:", *compiled[ahead:])
"""


def printed_by(program, path, folder):
    """By a process that keeps its kernels in ``folder``."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder / "cache")}
    command = [sys.executable, "-c", program, str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["llama3", "qwen3", "phi3-128k"])
def test_a_warm_process_compiles_nothing(name, tmp_path):
    path = write_file(name, tmp_path / "tiny.gguf")
    assert int(printed_by(WARM, path, tmp_path)) > 10
    assert printed_by(RUN, path, tmp_path) == "compiled:\n"


def test_after_loading_a_first_answer_compiles_nothing(tmp_path):
    path = write_file("llama3", tmp_path / "tiny.gguf")
    assert printed_by(FIRST, path, tmp_path) == "True compiled later:\n"
