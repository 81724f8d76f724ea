"""Amounts as text: bytes and counts for displays, and bytes as people write them."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from math import ceil

from ..errors import ArgumentError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def size(nbytes: int, rounded: Callable[[Fraction], int] = round) -> str:
    """Bytes in GiB, MiB or KiB with two decimals. Use ``ceil`` for bytes needed, and ``floor`` for bytes free."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if nbytes >= unit:
            return f"{rounded(Fraction(100 * nbytes, unit)) / 100:.2f} {name}"
    return f"{nbytes} B"


def count(number: int, noun: str, form: str = ",") -> str:
    return f"{number:{form}} {noun}{'s' * (number != 1)}"


def parse_bytes(text: str) -> int:
    """``24GiB``, ``512 MiB``, ``8e9`` or ``80GB`` in whole bytes, rounded up.

    Raises ArgumentError for anything else, zero and less.
    """
    number = text.strip().rstrip("BbGgIiKkMm ")
    unit = text.strip()[len(number) :].strip().upper()
    try:
        nbytes = ceil(float(number) * _UNITS[unit])
    except (KeyError, ValueError, OverflowError):
        nbytes = 0
    if nbytes <= 0:
        raise ArgumentError(
            f"{text!r} as an amount of memory",
            rule="an amount is a positive number with B, KB, MB, GB, KiB, MiB or GiB",
            remedy="Write it like 24GiB",
        )
    return nbytes
