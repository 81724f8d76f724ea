"""A model on another GPU than the current one, as ``device="cuda:1"`` asks for."""

import pytest
import torch

import rooflama
from rooflama.loaders.device import open_device
from small_checkpoint import write_small

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


def text(path, device, **options):
    with rooflama.load(path, device=device, dtype="float16", max_context=96, progress=False) as model:
        assert model.device.torch_device.index == int(device.rpartition(":")[2])
        return model.generate("ab ab", max_new_tokens=24, **options).text


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_k": 40, "seed": 3}], ids=["greedy", "sampled"])
def test_the_text_is_that_of_the_first(tmp_path, options):
    path = write_small(tmp_path / "small.gguf")
    for current in (0, 1):
        with torch.cuda.device(current):
            assert text(path, "cuda:1", **options) == text(path, "cuda:0", **options)


def test_cuda_without_a_number_is_the_current_one():
    for current in (0, 1):
        with torch.cuda.device(current), open_device("cuda") as device:
            assert device.torch_device == torch.device("cuda", current)
