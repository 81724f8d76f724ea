"""What a GPU's first kernel needs, made by a thread while torch is imported: each takes up to a second."""

from __future__ import annotations

import contextlib
import ctypes
import re
import threading

from . import ranks


def begin(device: str) -> None:
    """Make what is needed on Nvidia's GPU that ``device`` names. If that fails, torch and Triton say why."""
    named = re.fullmatch("auto|cuda(?::([0-9]{1,3}))?", device)
    if named and ranks.size() == 1:  # ranks find out later which GPU is theirs
        threading.Thread(target=_make, args=(int(named[1] or 0),), daemon=True).start()


def _make(number: int) -> None:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:  # no driver
        return
    driver.cuInit(0)
    driver.cuDevicePrimaryCtxRetain(ctypes.byref(ctypes.c_void_p()), number)
    with contextlib.suppress(ImportError):
        from triton.runtime.cache import triton_key

        triton_key()  # a hash of the 400 MB of Triton's libraries, which Triton keeps and looks kernels up by
