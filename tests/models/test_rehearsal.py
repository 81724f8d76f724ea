"""What a rehearsal finds: exactly the kernels that a model launches when it runs."""

import pytest
from torch import Tensor

import rooflama
from compiled_kernels import compiled
from rooflama.kernels import INTERPRETED
from rooflama.kernels import kernel as kernels
from rooflama.loaders.gguf import read_gguf
from rooflama.models import CheckpointReader, adapter_for
from rooflama.models.serving import rehearsal as module
from rooflama.models.serving.rehearsal import rehearse
from small_checkpoint import write_small
from tiny_checkpoints import random_tokens
from whole_checkpoints import FAMILIES, write_file

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="records the launches of Triton's interpreter")

LENGTH = 16  # of the prompt; a whole number of the tiles that depend on it


def assert_rehearsed(path, monkeypatch, **options):
    """Compare a rehearsal with greedy and sampled answers to a prompt of LENGTH tokens."""
    monkeypatch.setattr("rooflama.planning.PREFILL_CHUNK", LENGTH)
    monkeypatch.setattr(module, "captured_sizes", lambda config: (LENGTH,))
    launched = []

    def record(one):
        """Write zeros instead of running, which takes seconds in the interpreter."""
        launched.append(one)
        for tensor in one.args:
            if isinstance(tensor, Tensor):
                tensor.zero_()

    monkeypatch.setattr(kernels, "run", record)
    settings = {"dtype": "float16", "max_context": 64, "device": "cpu", "progress": False} | options
    with rooflama.load(path, **settings) as model:
        model.tokens.end_ids = model.tokenizer.eos_ids = frozenset()  # 0 is drawn each time, which may be one
        prompt = random_tokens(LENGTH, model.config.vocab_size)
        for sampling in ({}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.5}):
            model.generate(prompt, max_new_tokens=2, **sampling)
            model.tokens.forget_prefixes()
        plan, num_tokens = model.plan, model.runner.num_tokens
    with read_gguf(path) as checkpoint:
        reader, adapter = CheckpointReader(checkpoint), adapter_for(checkpoint.metadata["general.architecture"])
        adapter.read_config(reader)
        fused = settings.get("fused", True)
        found = rehearse(reader, plan.config, adapter, plan, None, num_tokens=num_tokens, fused=fused)
    assert len(launched) > 10
    assert compiled(found) == compiled(launched)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_launches_what_was_rehearsed(name, tmp_path, monkeypatch):
    assert_rehearsed(write_file(name, tmp_path / "tiny.gguf"), monkeypatch)


@pytest.mark.parametrize("options", [{}, {"kv_dtype": "int8"}, {"fused": False}, {"batch_invariant": True}])
def test_quantised_weights_launch_what_was_rehearsed(options, tmp_path, monkeypatch):
    assert_rehearsed(write_small(tmp_path / "small.gguf"), monkeypatch, **options)
