"""Processes that form a process group of torch.distributed, and run functions of the tests on every rank."""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PATIENCE_S = 180  # of a rank for the others, and of a test for its ranks; the first run on a GPU compiles

# Forked from a server that has imported what takes seconds, but has started no thread.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed", "rooflama.kernels", "rooflama.models", "rank_work"])


class World:
    """``size`` processes, each a rank of one group. Made by ``world``."""

    def __init__(self, size: int, backend: str, meeting_place: Path):
        self.size, self.pipes, self.processes = size, [], []
        for rank in range(size):
            mine, theirs = _context.Pipe()
            process = _context.Process(target=_serve, args=(theirs, rank, size, backend, meeting_place), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(mine)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What ``function(*args)`` returns on each rank. It must be picklable by name."""
        answers = self.attempt(function, *args)
        failed = [f"rank {rank}: {said}" for rank, (ok, said) in enumerate(answers) if not ok]
        assert not failed, "\n".join(failed)
        return [value for _, value in answers]

    def attempt(self, function: Callable[..., Any], *args: Any) -> list[tuple[bool, Any]]:
        """The same, as (True, result) or (False, traceback) of each rank; (False, "ended") of one that ended."""
        for pipe in self.pipes:
            pipe.send((function, args))
        answers = []
        for pipe in self.pipes:
            try:
                answers.append(pipe.recv() if pipe.poll(PATIENCE_S) else (False, "no answer"))
            except (EOFError, ConnectionError):
                answers.append((False, "ended"))
        return answers

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                process.kill()


@contextmanager
def world(size: int, backend: str = "gloo") -> Iterator[World]:
    """A group of ``size`` processes on this machine, ended at the end of the block."""
    with tempfile.TemporaryDirectory() as folder:
        made = World(size, backend, Path(folder) / "store")
        try:
            yield made
        finally:
            made.close()


def _serve(pipe: Connection, rank: int, size: int, backend: str, meeting_place: Path) -> None:
    torch.set_num_threads(1)
    if backend != "gloo":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend,
        init_method=f"file://{meeting_place}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=PATIENCE_S),
    )
    while True:
        try:
            function, args = pipe.recv()
        except (EOFError, ConnectionError):
            break
        try:
            answer = (True, function(*args))
        except Exception:
            answer = (False, traceback.format_exc())
        pipe.send(answer)
    dist.destroy_process_group()
