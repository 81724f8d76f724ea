"""What the tests have each rank of a world do (``worlds.py``). Functions are picklable by name."""

from __future__ import annotations

import io
import os
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

import rooflama
from rooflama.cli import main
from rooflama.kernels import RooflamaError, use_backend
from rooflama.kernels.launch import override
from rooflama.loaders.device import open_device
from rooflama.loaders.gguf import read_gguf
from rooflama.models.parallel import RankFailed, Ranks
from rooflama.results import Generation
from running_models import decode_logits, prefill_logits, running

PROMPT = 20  # tokens; the rest of a text is decoded


def invariant_logits(path: Path, sequences: list[list[int]], chunk: int) -> list[Tensor]:
    """Logits of sequences that run together, by the interpreted kernels with ``batch_invariant``, in such passes."""
    ranks = Ranks(dist.group.WORLD, batch_invariant=True)
    with (
        use_backend("triton"),
        read_gguf(path) as file,
        running(file, ranks=ranks, num_seqs=len(sequences), batch_invariant=True) as runner,
    ):
        return prefill_logits(runner, sequences, chunk)


def by_definition(options: Mapping[str, Any]) -> AbstractContextManager[None]:
    return nullcontext() if options.get("device", "cpu").startswith("cuda") else use_backend("numpy")


def logits_alone(path: Path, tokens: list[int], ranks: Ranks | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    """Logits of a prefilled text, and of its decoded part; on a CPU by the definitions."""
    with by_definition(options), read_gguf(path) as file, running(file, ranks=ranks, **options) as runner:
        (prefilled,) = prefill_logits(runner, [tokens], 7)
        (decoded,) = decode_logits(runner, [tokens], [PROMPT])
    return prefilled, decoded


def logits(path: Path, tokens: list[int], options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """``logits_alone`` by all ranks together."""
    return logits_alone(path, tokens, Ranks(dist.group.WORLD), **options)


def generate(path: Path, prompts: list[str], load_options: dict[str, Any], options: dict[str, Any]) -> list[Generation]:
    """Texts of a model that all ranks load."""
    load_options = load_options | {"tensor_parallel": True, "progress": False}
    with by_definition(load_options), rooflama.load(path, **load_options) as model:
        return model.generate(prompts, **options)


def sum_by(gather_bytes: int, addends: Tensor, bias: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """This rank's sum of ``addends`` [ranks, n, columns], gathered up to so many bytes; and columns put together."""
    ranks = Ranks(dist.group.WORLD)
    with override("all_reduce", ONE_SHOT_BYTES=0, GATHER_BYTES=gather_bytes), use_backend("numpy"):
        total = ranks.total(addends[ranks.share.rank].clone(), bias, residual)
        return total, ranks.joined(residual[:, ranks.share.part(residual.shape[1])], residual.shape[1])


def same_sums(rounds: int, dtype: torch.dtype) -> list[int]:
    """Rounds in which a sum through mapped memory differs from one of gathered addends, or that repeat themselves."""
    wrong = []
    with open_device("cuda") as device:
        ranks, gathering = Ranks(dist.group.WORLD), Ranks(dist.group.WORLD)
        ranks.connect(device, dtype, 1 << 20)
        assert ranks._peers is not None
        sizes = [(1, 48), (1, 4096), (7, 4096), (64, 8192), (3, 1000)]
        for number in range(rounds):
            generator = torch.Generator("cuda").manual_seed(1000 * number + ranks.share.rank)
            addend = torch.randn(sizes[number % len(sizes)], generator=generator, device="cuda").to(dtype)
            residual = torch.ones_like(addend)
            if not torch.equal(ranks.total(addend, None, residual), gathering.total(addend, None, residual)):
                wrong.append(number)
    return wrong


def error_of_loading(path: Path, fails_on: int) -> str:
    """What a rank raises if the device of rank ``fails_on`` has no memory for one of the weights."""

    def operate(operation: str, label: str, nbytes: int) -> None:
        if operation == "allocate" and dist.get_rank() == fails_on and "keys" in label:
            raise MemoryError

    with use_backend("numpy"), mock.patch("rooflama.loaders.device.raw.before_operation", operate):
        try:
            rooflama.load(path, device="cpu", tensor_parallel=True, progress=False).close()
        except RooflamaError as error:
            return f"{type(error).__name__}: {error}" if error.known_to_all else "known here alone"
    return "none"


def command(arguments: list[str], typed: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of ``rooflama`` with these arguments, as under torchrun."""
    rank = dist.get_rank()
    environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(dist.get_world_size())}
    out, err = io.StringIO(), io.StringIO()
    status = 0
    with (
        mock.patch.dict("os.environ", environment | {"MASTER_ADDR": "localhost"}),
        mock.patch.object(sys, "argv", ["rooflama", *arguments]),
        mock.patch.object(sys, "stdin", io.StringIO(typed)),
        redirect_stdout(out),
        redirect_stderr(err),
        use_backend("numpy"),
        mock.patch("rooflama.cli.ranks._leave"),  # the world goes on
    ):
        try:
            main()
        except SystemExit as done:
            status = done.code or 0
    return status, out.getvalue(), err.getvalue()


def vanish(rank: int, path: Path, tokens: list[int]) -> tuple[str, float]:
    """One rank is killed as soon as all have begun; the error of another, and the seconds until it was raised."""
    ranks = Ranks(dist.group.WORLD)
    ranks.exchange(None)
    started = time.monotonic()
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        for _ in range(1000):
            logits_alone(path, tokens, ranks)
    except RankFailed as error:
        return str(error), time.monotonic() - started
    return "", time.monotonic() - started
