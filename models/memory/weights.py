"""The bytes of a checkpoint's weights in the file and on the device, found without reading them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from rooflama.kernels import LAYOUTS, Weight
from rooflama.loaders.gguf.repack import repack
from rooflama.loaders.gguf.types import TYPE_SIZES, row_nbytes

from ..config import ModelConfig
from ..decoder import Adapter, Decoder
from ..shapes_only import shapes_only
from ..share import ALONE, Cut, Share
from ..weights import WHOLE, CheckpointReader, TensorSource
from .allocator import Segments

Backend = Literal["triton", "numpy"]
OF_VOCABULARY = ("token_embd.weight", "output.weight")
TypeRule = Callable[[str, tuple[int, ...]], str]  # (tensor name, shape) -> ggml type


@dataclass(frozen=True)
class Matrix:
    """A matrix as products read it, after the loader joined tensors and cut a rank's share.

    ggml_type: that of the resident form.
    of_vocabulary: whether its rows are tokens: the embedding or the output.
    """

    ggml_type: str
    rows: int
    columns: int
    of_vocabulary: bool = False


@dataclass(frozen=True)
class WeightBytes:
    """The bytes of a model's weights.

    Attributes:
        stored: ggml type -> bytes in the file.
        resident: ggml type of the file -> bytes on the device, in the form that the backend reads.
        allocations: bytes of each buffer, in the order in which loading makes them.
        matrices: every matrix on the device.
    """

    stored: dict[str, int]
    resident: dict[str, int]
    allocations: tuple[int, ...]
    matrices: tuple[Matrix, ...]

    @cached_property
    def segments(self) -> Segments:
        """The segments that torch's allocator takes for them on a GPU."""
        return Segments(self.allocations)


def plane_shapes(ggml_type: str, rows: int, columns: int) -> list[tuple[tuple[int, int], torch.dtype]]:
    """Shape and dtype of each plane of a matrix, from ``kernels.LAYOUTS``."""
    planes = LAYOUTS[ggml_type].planes
    return [((rows, columns // plane.elements), getattr(torch, plane.dtype)) for plane in planes]


def form_on_device(ggml_type: str, backend: Backend) -> str:
    """How tensors of this type are held on the device, in words."""
    if ggml_type == "F32" or (backend == "triton" and LAYOUTS[ggml_type].is_float):
        return "as they are"
    return "repacked" if backend == "triton" else "as float32"


class DryRunSource(TensorSource):
    """A ``TensorSource`` that makes every check of names, shapes and types, reads nothing and takes no memory.

    Args:
        reader: the one that ``read_config`` used; the tensors that it read count as read.
        backend: decides the resident form: planes for Triton, float32 rows for NumPy.
        share: of the rank.

    Attributes:
        cuts: (columns, those of a quantisation block) of each whole matrix that is cut by columns.
    """

    def __init__(self, reader: CheckpointReader, backend: Backend, share: Share = ALONE):
        CheckpointReader.__init__(self, reader.checkpoint)
        self._taken |= reader._taken
        self.ranks, self.share = None, share
        self.cuts: set[Cut] = set()
        self._progress = lambda num_bytes: None
        self._backend, self.batch_invariant, self.fused = backend, False, True
        self.resident: Counter[str] = Counter()
        self.allocations: list[int] = []
        self.matrices: list[Matrix] = []

    def host_matrix(
        self, name: str, shape: tuple[int, ...], rows: slice | np.ndarray = WHOLE, columns: slice = WHOLE
    ) -> Weight:
        info = self.checked_info(name, shape)
        repack(np.empty((0, row_nbytes(info.ggml_type, shape[-1])), np.uint8), info.ggml_type, shape[-1])  # its checks
        if columns is not WHOLE:
            self.cuts.add((shape[-1], TYPE_SIZES[info.ggml_type][0]))
        taken = (len(range(info.rows)[rows]) if isinstance(rows, slice) else len(rows), len(range(shape[-1])[columns]))
        planes = (torch.empty(s, dtype=d, device="meta") for s, d in plane_shapes(info.ggml_type, *taken))
        return Weight.make(info.ggml_type, planes, taken)

    def host_stack(self, matrices: Sequence[tuple[str, tuple[int, int], slice | np.ndarray]]) -> list[Weight]:
        weights = [self.host_matrix(*matrix) for matrix in matrices]
        return [Weight.concat_rows(list(group)) for _, group in groupby(weights, key=lambda weight: weight.ggml_type)]

    def _upload(self, weight: Weight, label: str) -> Weight:
        stored_type = weight.ggml_type
        if self._backend == "numpy" and stored_type != "F32":
            rows = torch.empty(weight.shape, dtype=torch.float32, device="meta")
            weight = Weight.make("F32", (rows,), weight.shape)
        self.matrices.append(Matrix(weight.ggml_type, *weight.shape, label in OF_VOCABULARY))
        self.resident[stored_type] += weight.nbytes
        self.allocations += [plane.nbytes for plane in weight.planes]
        return weight

    def _place(self, tensor: Tensor, label: str) -> Tensor:
        self.resident["F32"] += tensor.nbytes
        self.allocations.append(tensor.nbytes)
        return tensor


def checkpoint_weights(
    reader: CheckpointReader, config: ModelConfig, adapter: Adapter, backend: Backend, share: Share = ALONE
) -> WeightBytes:
    """The weights of a file, or the ``share`` of one rank, as ``Decoder.load`` would hold them.

    Raises:
        ConfigError: a tensor is missing, misshapen or unused, or so many ranks cannot share the model.
        KernelInputError: a tensor's type cannot be run.
    """
    source = DryRunSource(reader, backend)
    with shapes_only():
        Decoder.load(source, config, adapter)
        if share != ALONE:
            share.check(config, source.cuts)
            source = DryRunSource(reader, backend, share)
            Decoder.load(source, config, adapter)
    stored: Counter[str] = Counter()
    for info in reader.checkpoint.tensors.values():
        stored[info.ggml_type] += info.nbytes
    return WeightBytes(dict(stored), dict(source.resident), tuple(source.allocations), tuple(source.matrices))


def config_weights(config: ModelConfig, type_of: TypeRule, backend: Backend, share: Share = ALONE) -> WeightBytes:
    """The weights that a config implies, or the ``share`` of one rank, with no matrices joined.

    Vectors are F32, as converters store them. ``stored`` counts the bytes of the share.

    Raises:
        ConfigError: so many ranks cannot share the model.
    """
    cuts = {
        (shape[1], TYPE_SIZES[type_of(name, shape)][0])
        for name, shape in config_tensors(config)
        if name.endswith(("attn_output.weight", "ffn_down.weight"))
    }
    share.check(config, cuts)
    vocabulary = share.part(config.vocab_size)
    stored: Counter[str] = Counter()
    resident: Counter[str] = Counter()
    allocations: list[int] = []
    matrices: list[Matrix] = []
    for name, shape in config_tensors(share.of(config)):
        ggml_type = type_of(name, shape) if len(shape) == 2 else "F32"
        rows, columns = shape if len(shape) == 2 else (1, *shape)
        if name in OF_VOCABULARY:
            rows = vocabulary.stop - vocabulary.start
        stored[ggml_type] += rows * row_nbytes(ggml_type, columns)
        resident_type = "F32" if backend == "numpy" else ggml_type
        sizes = [rows * c * dtype.itemsize for (rows, c), dtype in plane_shapes(resident_type, rows, columns)]
        resident[ggml_type] += sum(sizes)
        allocations += sizes
        if len(shape) == 2:
            matrices.append(Matrix(resident_type, rows, columns, name in OF_VOCABULARY))
    return WeightBytes(dict(stored), dict(resident), tuple(allocations), tuple(matrices))


def config_tensors(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes, with q, k, v, gate and up apart; joining them changes no bytes."""
    hidden, width = config.hidden_size, config.intermediate_size
    q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    yield "token_embd.weight", (config.vocab_size, hidden)
    for i in range(config.num_layers):
        prefix = f"blk.{i}."
        yield prefix + "attn_norm.weight", (hidden,)
        for name, rows in (("attn_q", q_rows), ("attn_k", kv_rows), ("attn_v", kv_rows)):
            yield f"{prefix}{name}.weight", (rows, hidden)
            if config.qkv_bias:
                yield f"{prefix}{name}.bias", (rows,)
        if config.qk_norm:
            yield prefix + "attn_q_norm.weight", (config.head_dim,)
            yield prefix + "attn_k_norm.weight", (config.head_dim,)
        yield prefix + "attn_output.weight", (hidden, q_rows)
        if config.output_bias:
            yield prefix + "attn_output.bias", (hidden,)
        yield prefix + "ffn_norm.weight", (hidden,)
        if config.post_norms:
            yield prefix + "post_attention_norm.weight", (hidden,)
            yield prefix + "post_ffw_norm.weight", (hidden,)
        for name, rows, columns in (("gate", width, hidden), ("up", width, hidden), ("down", hidden, width)):
            yield f"{prefix}ffn_{name}.weight", (rows, columns)
            if config.ffn_bias:
                yield f"{prefix}ffn_{name}.bias", (rows,)
    yield "output_norm.weight", (hidden,)
    if not config.tied_embeddings:
        yield "output.weight", (config.vocab_size, hidden)
