"""From a checkpoint's tensors to a model's weights on a device. Every tensor of the checkpoint must be used."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from rooflama.kernels import Weight, geglu, quantized_matmul, quantized_matmul_pair, resident_form, rms_norm, swiglu
from rooflama.loaders.gguf.repack import repack, repack_stack
from rooflama.loaders.gguf.types import row_nbytes

from .errors import ConfigError
from .share import ALONE

if TYPE_CHECKING:
    from rooflama.loaders.checkpoint import Checkpoint, TensorInfo
    from rooflama.loaders.device import Device

    from .config import ModelConfig
    from .parallel import Ranks


WHOLE = slice(None)
GATED = {"silu": swiglu, "gelu_tanh": geglu}  # activation -> the kernel for activation(gate) * up


class Projection:
    """y = x Wᵀ + bias. W is a stack of parts, which differ in ggml type; most projections have one part.

    Args:
        parts, bias: the weights, and the bias of all of them.
        batch_invariant: as for ``quantized_matmul``.
        fused: False to run the norm, the activation and the residual's addition as kernels of their own, each of which
            rounds its result.
        summed_over: the ranks among which W's columns are cut, so that y is the sum of their products; None if W is
            whole, or cut by rows.
    """

    def __init__(
        self,
        parts: list[Weight],
        bias: Tensor | None,
        *,
        batch_invariant: bool = False,
        fused: bool = True,
        summed_over: Ranks | None = None,
    ):
        self.parts, self.batch_invariant, self.fused, self.summed_over = parts, batch_invariant, fused, summed_over
        self.bias = bias
        added = None if summed_over is not None else bias  # else once, to the sum
        self.biases = [None] * len(parts) if added is None else added.split([part.shape[0] for part in parts])

    def unfused(self) -> Projection:
        """The same weights with ``fused=False``."""
        other = copy.copy(self)
        other.fused = False
        return other

    def __call__(
        self,
        x: Tensor,
        *,
        residual: Tensor | None = None,
        norm_weight: Tensor | None = None,
        eps: float = 0.0,
        gate: str | None = None,
    ) -> Tensor:
        """x [num_tokens, columns] -> [num_tokens, rows], or with a gate [num_tokens, rows / 2].

        Args:
            x, residual, norm_weight, eps: as for ``quantized_matmul``.
            gate: activation of the first half of the rows; the result is its product with the second half.
        """
        if norm_weight is not None and not self.fused:
            x, norm_weight = rms_norm(x, norm_weight, eps), None
        options = self._options(norm_weight, eps)
        if self.summed_over is not None:
            return self._sum_over(self.summed_over, x, residual, options)
        if self.fused and len(self.parts) == 1 and gate in (None, "silu"):
            gated = gate is not None
            return quantized_matmul(x, self.parts[0], self.biases[0], residual=residual, swiglu=gated, **options)
        products = self._products(x, options)
        y = products[0] if len(products) == 1 else torch.cat(products, -1)
        if gate is not None:
            y = GATED[gate](*y.chunk(2, dim=-1))
        return y if residual is None else y + residual

    def apart(self, x: Tensor, *, norm_weight: Tensor | None = None, eps: float = 0.0) -> list[Tensor]:
        """The product of each part, which together are the columns of ``self(x)``: joining them would copy them all."""
        if norm_weight is not None and not self.fused:
            x, norm_weight = rms_norm(x, norm_weight, eps), None
        return self._products(x, self._options(norm_weight, eps))

    def _options(self, norm_weight: Tensor | None, eps: float) -> dict[str, Any]:
        """Of each product. Weights are resident: they were uploaded long before any step."""
        return {
            "norm_weight": norm_weight,
            "eps": eps,
            "batch_invariant": self.batch_invariant,
            "resident": True,
        }

    def _products(self, x: Tensor, options: dict[str, Any]) -> list[Tensor]:
        """The product of each part. For a few tokens two parts are one launch."""
        if self.fused and len(self.parts) == 2:
            (first, second), (first_bias, second_bias) = self.parts, self.biases
            return list(quantized_matmul_pair(x, first, second, first_bias, second_bias, **options))
        pairs = zip(self.parts, self.biases, strict=True)
        return [quantized_matmul(x, part, bias, **options) for part, bias in pairs]

    def _sum_over(self, ranks: Ranks, x: Tensor, residual: Tensor | None, options: dict[str, Any]) -> Tensor:
        """x [num_tokens, columns of this rank] -> [num_tokens, rows], the same on every rank."""
        (weight,) = self.parts
        addend = quantized_matmul(x, weight, **options)
        if self.fused or residual is None:
            return ranks.total(addend, self.bias, residual)
        return ranks.total(addend, self.bias) + residual


def unpair_rows(num_heads: int, head_dim: int, rotary_dim: int) -> np.ndarray:
    """Row order that turns interleaved rotary pairs (2j, 2j+1) into half-split pairs (j, j + rotary_dim/2).

    llama.cpp's converter interleaves the q and k rows of architecture ``llama``. Whole rows can be moved back without
    touching quantised bytes. Returns int64 [num_heads * head_dim]: new row i is old row order[i].
    """
    head = np.concatenate([np.arange(0, rotary_dim, 2), np.arange(1, rotary_dim, 2), np.arange(rotary_dim, head_dim)])
    return (np.arange(num_heads)[:, None] * head_dim + head).reshape(-1)


class CheckpointReader:
    """Reads a checkpoint's tensors into host memory, with their shapes checked, and records which were read."""

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint
        self._taken: set[str] = set()

    def has(self, name: str) -> bool:
        return name in self.checkpoint.tensors

    def checked_info(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
        """The entry of a tensor, which counts as read. Raises ConfigError if it is missing or has another shape."""
        if name not in self.checkpoint.tensors:
            raise ConfigError(
                f"tensor {name} is missing",
                rule=f"this architecture needs it with shape {list(shape)}",
                remedy="The file is incomplete or of another architecture; download or convert it again",
            )
        info = self.checkpoint.tensors[name]
        if tuple(info.shape) != shape:
            raise ConfigError(
                f"tensor {name} has shape {list(info.shape)}",
                rule=f"the metadata asks for {list(shape)}",
                remedy="The file's metadata and tensors disagree; convert it again",
            )
        self._taken.add(name)
        return info

    def host_matrix(
        self, name: str, shape: tuple[int, ...], rows: slice | np.ndarray = WHOLE, columns: slice = WHOLE
    ) -> Weight:
        """Some rows and columns of a tensor in plane layout, in host memory. Only these are read from the file.

        Args:
            name, shape: of the whole tensor.
            rows: int64 row numbers in any order, or a slice.
            columns: a slice of whole quantisation blocks.

        Raises:
            ConfigError: as ``checked_info`` does.
        """
        info = self.checked_info(name, shape)
        start, stop, _ = columns.indices(shape[-1])
        in_bytes = slice(*(row_nbytes(info.ggml_type, column) for column in (start, stop)))
        return repack(self.checkpoint.data(name)[rows][:, in_bytes], info.ggml_type, stop - start)

    def host_stack(self, matrices: Sequence[tuple[str, tuple[int, int], slice | np.ndarray]]) -> list[Weight]:
        """Matrices of one width, each below the one before, in host memory; neighbours of one ggml type are one matrix.

        They are repacked into their places, because joining them later would copy every weight once more.

        Args:
            matrices: name, shape of the whole tensor and rows of each, as for ``host_matrix``.

        Raises:
            ConfigError: as ``checked_info`` does.
        """
        types = {name: self.checked_info(name, shape).ggml_type for name, shape, _ in matrices}
        return [
            repack_stack([self.checkpoint.data(name)[rows] for name, _, rows in group], ggml_type, matrices[0][1][1])
            for ggml_type, group in groupby(matrices, key=lambda matrix: types[matrix[0]])
        ]

    def host_vector(self, name: str, size: int) -> Tensor:
        """A norm's weight, a bias or RoPE factors: float32 [size] in host memory."""
        weight = self.host_matrix(name, (size,))
        if weight.ggml_type not in ("F32", "F16", "BF16"):
            raise ConfigError(
                f"tensor {name} is {weight.ggml_type}",
                rule="one-dimensional tensors are F32, F16 or BF16",
                remedy="Convert the checkpoint again",
            )
        return weight.planes[0].reshape(-1).float()

    def refuse_untaken(self) -> None:
        """Raise ConfigError if a tensor of the file was not read: without it the result would be another."""
        left = sorted(set(self.checkpoint.tensors) - self._taken)
        if left:
            shown = ", ".join(left[:5]) + (f" and {len(left) - 5} more" if len(left) > 5 else "")
            raise ConfigError(
                f"tensors {shown} are in the file",
                rule="this architecture's adapter has no place for them, and drops nothing silently",
                remedy="The file is of another architecture or variant; report it",
            )


class TensorSource(CheckpointReader):
    """Uploads the weights that an adapter asks for, in the form that kernels read.

    Args:
        checkpoint: what to read.
        device: where weights go.
        progress: called after each upload with the number of bytes that its tensors take in the file.
        batch_invariant, fused: as for ``Projection``.
        ranks: the ranks that share the model; None for this one alone.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: Device,
        progress: Callable[[int], None] | None = None,
        *,
        batch_invariant: bool = False,
        fused: bool = True,
        ranks: Ranks | None = None,
    ):
        super().__init__(checkpoint)
        self.device, self.batch_invariant, self.fused = device, batch_invariant, fused
        self.ranks, self.share = ranks, ALONE if ranks is None else ranks.share
        self._progress = progress or (lambda num_bytes: None)

    def _upload(self, weight: Weight, label: str) -> Weight:
        resident = resident_form(weight, self.device.torch_device)
        planes = tuple(self._place(plane, label) for plane in resident.planes)
        return Weight.make(resident.ggml_type, planes, resident.shape)

    def _place(self, tensor: Tensor, label: str) -> Tensor:
        """Upload a tensor. On the CPU the tensor itself is used: the source holds its only reference."""
        on_host = self.device.torch_device.type == "cpu"
        return self.device.upload(tensor, label=label, borrow=on_host).tensor

    def _done(self, *names: str) -> None:
        self._progress(sum(self.checkpoint.tensors[name].nbytes for name in names))

    def vector(self, name: str, size: int) -> Tensor:
        """A norm's weight, float32 [size], with the checkpoint's ``norm_offset`` added."""
        vector = self._place(self.host_vector(name, size).add_(self.checkpoint.norm_offset), name)
        self._done(name)
        return vector

    def vocabulary(self, name: str, config: ModelConfig) -> Weight:
        """This rank's rows of a matrix [vocab_size, hidden_size], in the ggml type of the file."""
        shape = (config.vocab_size, config.hidden_size)
        weight = self._upload(self.host_matrix(name, shape, self.share.part(config.vocab_size)), name)
        self._done(name)
        return weight

    def projection(
        self,
        prefix: str,
        rows: dict[str, int],
        columns: int,
        *,
        bias: bool | dict[str, int] = False,
        taken: np.ndarray | None = None,
    ) -> Projection:
        """Projections of one input, stacked along their outputs in the order of ``rows``.

        Args:
            prefix: of the tensors ``<prefix><name>.weight`` [rows, columns] and ``<prefix><name>.bias`` [rows].
            rows: name -> number of rows.
            columns: of every tensor.
            bias: whether each has a bias; or name -> size, if the biases have other names than the weights.
            taken: int64: row i of the result is row taken[i] of the stack. Rows of one tensor stay behind those of the
                tensor before. None takes all rows, on every rank.
        """
        weight_names = [f"{prefix}{name}.weight" for name in rows]
        bias_sizes = {f"{prefix}{name}.bias": size for name, size in (rows if bias is True else bias or {}).items()}
        matrices: list[tuple[str, tuple[int, int], slice | np.ndarray]] = []
        start = 0
        for name, num_rows in zip(weight_names, rows.values(), strict=True):
            matrices.append((name, (num_rows, columns), _rows_between(taken, start, start + num_rows)))
            start += num_rows
        parts = self.host_stack(matrices)
        label = f"{prefix}{{{','.join(rows)}}}"
        stacked_bias = None
        if bias_sizes:
            biases = torch.cat([self.host_vector(name, size) for name, size in bias_sizes.items()])
            if taken is not None:
                biases = biases.index_select(0, torch.from_numpy(taken))
            stacked_bias = self._place(biases, label)
        uploaded = [self._upload(part, label) for part in parts]
        projection = Projection(uploaded, stacked_bias, batch_invariant=self.batch_invariant, fused=self.fused)
        self._done(*weight_names, *bias_sizes)
        return projection

    def output_projection(self, prefix: str, name: str, rows: int, columns: int, *, bias: bool = False) -> Projection:
        """The projection back into the residual stream, from attention's heads or from the feed-forward's width.

        Each rank reads its share of the ``columns``, and the result is the sum of the ranks' products.

        Args:
            prefix, name: of the tensors ``<prefix><name>.weight`` [rows, columns] and ``<prefix><name>.bias`` [rows].
            bias: whether there is one.
        """
        weight_name, bias_name = f"{prefix}{name}.weight", f"{prefix}{name}.bias"
        part = self.host_matrix(weight_name, (rows, columns), columns=self.share.part(columns))
        added = self._place(self.host_vector(bias_name, rows), bias_name) if bias else None
        projection = Projection(
            [self._upload(part, weight_name)],
            added,
            batch_invariant=self.batch_invariant,
            fused=self.fused,
            summed_over=self.ranks,
        )
        self._done(weight_name, *([bias_name] if bias else []))
        return projection

    def qkv(self, prefix: str, config: ModelConfig) -> Projection:
        """Queries, keys and values: ``attn_q``, ``attn_k`` and ``attn_v``, or ``attn_qkv`` if the file has that.

        Interleaved rotary pairs become half-split ones, unless ``config.rope_interleaved``.
        """
        head_dim = config.head_dim
        sizes = {
            "attn_q": config.num_heads * head_dim,
            "attn_k": config.num_kv_heads * head_dim,
            "attn_v": config.num_kv_heads * head_dim,
        }
        fused = {"attn_qkv": sum(sizes.values())}
        taken = self.share.qkv_rows(config)
        if self.checkpoint.interleaved_rope_rows and not config.rope_interleaved:
            if config.qk_norm:
                raise ConfigError(
                    "a norm on each head of q and k, whose rows are stored as interleaved pairs",
                    rule="the norms' weights have the order of the rows, so these stay as they are",
                    remedy="Declare rope_interleaved in the adapter",
                )
            order = np.arange(fused["attn_qkv"])
            rotated = unpair_rows(config.num_heads + config.num_kv_heads, head_dim, head_dim)  # whole heads rotate
            order[: len(rotated)] = rotated
            taken = order[taken]
        rows = fused if self.has(f"{prefix}attn_qkv.weight") else sizes
        biases = fused if self.has(f"{prefix}attn_qkv.bias") else sizes
        return self.projection(prefix, rows, config.hidden_size, bias=biases if config.qkv_bias else False, taken=taken)

    def gate_up(self, prefix: str, config: ModelConfig) -> Projection:
        """The feed-forward's gate and up projections: ``ffn_gate`` and ``ffn_up``, or ``ffn_up`` if it holds both."""
        inner = config.intermediate_size
        separate = {"ffn_gate": inner, "ffn_up": inner}
        rows = separate if self.has(f"{prefix}ffn_gate.weight") else {"ffn_up": 2 * inner}
        taken = self.share.gate_up_rows(config)
        return self.projection(prefix, rows, config.hidden_size, bias=config.ffn_bias, taken=taken)


def _rows_between(taken: np.ndarray | None, start: int, stop: int) -> slice | np.ndarray:
    """Which of the rows ``start`` to ``stop`` of a stack are taken, counted from ``start``; a slice if it is a run."""
    if taken is None:
        return WHOLE
    rows = taken[(start <= taken) & (taken < stop)] - start
    is_run = len(rows) > 0 and bool((np.diff(rows) == 1).all())
    return slice(int(rows[0]), int(rows[-1]) + 1) if is_run else rows
