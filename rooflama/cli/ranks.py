"""Commands that torchrun started on several ranks: all compute, the first one reads and speaks.

    torchrun --nproc-per-node 2 -m rooflama run MODEL PROMPT

torchrun ends all ranks within a second after one has ended with an error.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

from .output import error as show_error

T = TypeVar("T")

TIMEOUT = timedelta(minutes=2)  # of a rank's tensors for the others'; a first run compiles kernels meanwhile
GRACE_S = 5  # for torchrun to end a rank that has lost another, before it speaks of that


def size() -> int:
    """How many ranks run this command."""
    launched = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()
    return int(os.environ["WORLD_SIZE"]) if launched else 1


def _rank() -> int:
    return int(os.environ["RANK"]) if size() > 1 else 0


def is_first() -> bool:
    return _rank() == 0


def joined() -> bool:
    """Form the default process group if there are several ranks. Whether there are.

    Raises:
        ArgumentError: there are more ranks than GPUs.
    """
    if size() == 1:
        return False
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        return True
    backend, local = "gloo", int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        if local >= (gpus := torch.cuda.device_count()):
            from rooflama.models import ArgumentError

            raise ArgumentError(
                f"rank {local} on a host with {gpus} GPUs",
                rule="each rank has a GPU of its own",
                remedy=f"Start {gpus} ranks per host",
            )
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=TIMEOUT)
    return True


def from_first(make: Callable[[], T]) -> T:
    """What ``make`` returns on the first rank, on every rank. An error of it is raised on every rank."""
    if not joined():
        return make()
    from rooflama.models.parallel import ranks_of

    ranks = ranks_of(True)
    assert ranks is not None
    made = None
    with ranks.together():
        if ranks.share.rank == 0:
            made = make()
    return ranks.exchange(made)[0]


def say_error(error: Exception) -> None:
    """Print an error once: by the first rank if all have it, else by the rank that has it."""
    from rooflama.models.parallel import RankFailed

    if size() == 1:
        show_error(str(error))
    elif getattr(error, "known_to_all", False):
        show_error(str(error))  # only the first rank is heard
        time.sleep(0 if is_first() else 1)  # torchrun ends all ranks as soon as one has ended
    else:
        if isinstance(error, RankFailed):
            time.sleep(GRACE_S)  # the rank at fault speaks for itself
        sys.stderr = sys.__stderr__
        show_error(f"rank {_rank()}: {error}")


@contextmanager
def one_voice() -> Iterator[None]:
    """Let only the first rank write to standard output and error, and leave the process group at the end."""
    if size() == 1:
        yield
        return
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w") as nowhere:
        if not is_first():
            sys.stdout = sys.stderr = nowhere
        try:
            yield
        except SystemExit as done:
            _leave(done.code)
            raise
        finally:
            sys.stdout, sys.stderr = before


def _leave(status: object) -> None:
    """Leave the process group. After an error, when the others may never answer: end at once."""
    import torch.distributed as dist

    if status not in (None, 0, 1):  # 1: a plan that does not fit, or warnings of a check, on every rank
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 1)
    if dist.is_initialized():
        dist.destroy_process_group()
