"""A weight matrix kept in the bits of its file, as planes of codes and scales (``reference/quant_layouts.py``)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from .backend import as_array, backend_for
from .bound import Bindable
from .checks import check
from .errors import KernelInputError
from .facts import Facts
from .reference.quant_layouts import LAYOUTS, QuantLayout

__all__ = ["LAYOUTS", "QuantLayout", "Weight", "check_weight", "resident_form"]

MOST_CODES = 2**28 - 1  # in a row: kernels count its bits, up to 8 per code, in int32
_DTYPES = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16", "int32", "int8", "uint8")}


class _Fields(NamedTuple):
    ggml_type: str
    planes: tuple[Tensor, ...]
    shape: tuple[int, int]


class Weight(_Fields, Bindable, Facts):
    """A matrix [rows, columns] as planes. Make one with ``Weight.make``, which checks them.

    ggml_type: "Q4_1", "F16", ...: a key of ``LAYOUTS``.
    planes: in the order of ``LAYOUTS[ggml_type].planes``; plane p is [rows, columns / p.elements], contiguous. Kernels
        remember where a plane lies: write other numbers into it, but give it no other memory (``.data``, ``set_``).
    shape: (rows, columns) in weights.
    """

    @staticmethod
    def make(ggml_type: str, planes: Iterable[Tensor], shape: Sequence[int]) -> Weight:
        """A weight whose planes are known to fit its type.

        Raises:
            KernelInputError: unknown type, columns not whole blocks, or a plane of the wrong shape, dtype or strides.
        """
        rows, columns = shape
        weight = Weight(ggml_type, tuple(planes), (rows, columns))
        check_weight("a weight", weight)
        return weight

    @property
    def layout(self) -> QuantLayout:
        return LAYOUTS[self.ggml_type]

    @property
    def device(self) -> torch.device:
        return self.planes[0].device

    @property
    def nbytes(self) -> int:
        return sum(plane.numel() * plane.element_size() for plane in self.planes)

    def rows(self) -> list[tuple[str, str]]:
        """The facts, as (label, value)."""
        rows, columns = self.shape
        planes = zip(self.layout.planes, self.planes, strict=True)
        return [
            ("weight", f"{self.ggml_type} [{rows}, {columns}] on {self.device}"),
            ("bytes", f"{self.nbytes:,}, {8 * self.nbytes / max(1, rows * columns):.3g} bits per weight"),
            *(
                (f"plane {p.name}", f"{list(held.shape)} {str(held.dtype).removeprefix('torch.')}")
                for p, held in planes
            ),
        ]

    def to(self, device: torch.device | str) -> Weight:
        return self._replace(planes=tuple(plane.to(device) for plane in self.planes))

    def numpy(self) -> Weight:
        """The planes as NumPy arrays, which is what ``kernels.reference`` takes."""
        planes: Any = tuple(as_array(plane) for plane in self.planes)
        return self._replace(planes=planes)

    def slice_rows(self, start: int, stop: int) -> Weight:
        """Rows ``start`` to ``stop``, or to the last, as views. The same rows are the same object each time."""
        slices = self.__dict__.setdefault("slices", {})
        if (start, stop) not in slices:
            planes = tuple(plane[start:stop] for plane in self.planes)
            slices[start, stop] = self._replace(planes=planes, shape=(len(planes[0]), self.shape[1]))
        return slices[start, stop]

    def take_rows(self, index: Tensor) -> Weight:
        """Rows gathered, repeated or permuted: index [n] int64 -> [n, columns]."""
        planes = tuple(plane.index_select(0, index) for plane in self.planes)
        return self._replace(planes=planes, shape=(len(index), self.shape[1]))

    @staticmethod
    def concat_rows(weights: Sequence[Weight]) -> Weight:
        """One matrix below the other; all of one type and width.

        Raises:
            KernelInputError: types or numbers of columns differ.
        """
        kinds = sorted({f"{w.ggml_type} with {w.shape[1]} columns" for w in weights})
        check(
            len(kinds) == 1,
            f"rows of {' and '.join(kinds) or 'nothing'}",
            "rows that are joined have one type and one width",
            "Keep these matrices apart",
        )
        planes = tuple(torch.cat(parts) for parts in zip(*(w.planes for w in weights), strict=True))
        return Weight(weights[0].ggml_type, planes, (sum(w.shape[0] for w in weights), weights[0].shape[1]))


def check_weight(name: str, weight: Weight) -> None:
    """Raise KernelInputError unless ``weight`` is a Weight of a known type whose planes fit it."""
    if not isinstance(weight, Weight):
        raise KernelInputError(
            f"{name} is a {type(weight).__name__}",
            rule=f"{name} must be a Weight; plain numbers are of type F32, F16 or BF16",
            remedy="Wrap it: Weight.make('F32', (tensor,), tensor.shape)",
        )
    ggml_type, planes, (rows, columns) = weight
    layout = LAYOUTS.get(ggml_type)
    if layout is None:
        raise KernelInputError(
            f"{name} has type {ggml_type!r}",
            rule=f"a type is one of {', '.join(LAYOUTS)}",
            remedy="Dequantise it first",
        )
    if columns > MOST_CODES and not layout.is_float:
        raise KernelInputError(
            f"{name} has {columns} columns",
            rule=f"a row of {ggml_type} has at most {MOST_CODES} columns",
            remedy="Split the matrix by columns",
        )
    if columns % layout.quant_block:
        raise KernelInputError(
            f"{name} has {columns} columns",
            rule=f"{ggml_type} comes in whole blocks of {layout.quant_block} columns",
            remedy="Choose a type with smaller blocks",
        )
    expected = [(rows, columns // plane.elements) for plane in layout.planes]
    dtypes = [_DTYPES[plane.dtype] for plane in layout.planes]
    if (
        [tuple(plane.shape) for plane in planes] != expected
        or [plane.dtype for plane in planes] != dtypes
        or not all(plane.is_contiguous() for plane in planes)
        or any(plane.device != planes[0].device for plane in planes)
    ):
        raise KernelInputError(
            f"{name} has planes "
            + ", ".join(f"{list(p.shape)} {p.dtype} strides {p.stride()} on {p.device}" for p in planes),
            rule=f"{ggml_type} [{rows}, {columns}] has contiguous planes on one device, "
            + ", ".join(f"{p.name} {list(s)} {p.dtype}" for p, s in zip(layout.planes, expected, strict=True)),
            remedy="Make it with rooflama.loaders.gguf.repack",
        )


def resident_form(weight: Weight, device: torch.device | str) -> Weight:
    """``weight`` in the form that the backend of ``device`` reads fastest. Nothing moves: the caller uploads it.

    The Triton kernels read the planes as they are. The NumPy definitions get float32 rows, dequantised once, so that a
    decode step on a CPU is a plain float32 matrix product; this costs 4 bytes per weight.
    """
    if backend_for(torch.device(device)) == "triton" or weight.ggml_type == "F32":
        return weight
    rows = torch.from_numpy(reference.dequantize(weight.numpy()))
    return Weight.make("F32", (rows,), weight.shape)
