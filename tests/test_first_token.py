"""From the start of a process to its first token: nothing is imported that it does not need."""

import subprocess
import sys

from small_checkpoint import write_small
from tiny_checkpoints import write_case

PROGRAM = """
import sys, rooflama
running, *planned = sys.argv[1:]
for path in planned:
    rooflama.plan_memory(path)
with rooflama.load(running, progress=False) as model:
    model.generate("a", max_new_tokens=1)
print(*sys.modules)
"""


def test_the_first_token_imports_no_compiler_of_torch(tmp_path):
    """torch._dynamo takes a second to import. Some of torch's operators on the meta device, which plan, import it."""
    names = ("llama-biases", "qwen2-fused-qkv", "qwen3", "phi3-4k")
    paths = [write_small(tmp_path / "small.gguf"), *(write_case(name, tmp_path, "gguf") for name in names)]
    command = [sys.executable, "-c", PROGRAM, *map(str, paths)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "rooflama.models" in result.stdout.split()
    assert not {"torch._dynamo", "torch._inductor", "sympy"} & set(result.stdout.split())
