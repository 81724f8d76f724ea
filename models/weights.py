"""From a checkpoint's tensors to a model's weights on a device, each tensor read once and none left over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from rooflama.kernels import Weight, geglu, quantized_matmul, resident_form, rms_norm, swiglu
from rooflama.loaders.gguf.metadata import place
from rooflama.loaders.gguf.repack import repack

from .errors import ConfigError
from .hyperparameters import Hyperparameters

if TYPE_CHECKING:
    from rooflama.loaders.checkpoint import Checkpoint, TensorInfo
    from rooflama.loaders.device import Device

    from .config import ModelConfig


GATED = {"silu": swiglu, "gelu_tanh": geglu}  # the activation of a gate -> its product with up


class Projection:
    """y = x Wᵀ + bias, where W may be stacked from parts whose quantisations differ.

    Neighbouring parts of one ggml type were joined at load, so that most projections are one launch.
    ``batch_invariant`` is that of ``quantized_matmul``. With ``fused`` False, the norm, the activation and the addition
    of the residual run on their own, each rounding its result.
    """

    def __init__(self, parts: list[Weight], bias: Tensor | None, *, batch_invariant: bool = False, fused: bool = True):
        self.parts, self.batch_invariant, self.fused = parts, batch_invariant, fused
        self.biases = [None] * len(parts) if bias is None else bias.split([part.shape[0] for part in parts])

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
            gate: activation of the first half of the rows, whose product with the second half is returned.
        """
        if norm_weight is not None and not self.fused:
            x, norm_weight = rms_norm(x, norm_weight, eps), None
        norm: dict[str, Any] = {"norm_weight": norm_weight, "eps": eps, "batch_invariant": self.batch_invariant}
        norm["resident"] = True  # uploaded long before any step
        if self.fused and len(self.parts) == 1 and gate in (None, "silu"):
            gated = gate is not None
            return quantized_matmul(x, self.parts[0], self.biases[0], residual=residual, swiglu=gated, **norm)
        parts = [quantized_matmul(x, part, bias, **norm) for part, bias in zip(self.parts, self.biases, strict=True)]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        if gate is not None:
            y = GATED[gate](*y.chunk(2, dim=-1))
        return y if residual is None else y + residual


def unpair_rows(num_heads: int, head_dim: int, rotary_dim: int) -> np.ndarray:
    """Row order that turns interleaved rotary pairs (2j, 2j+1) into half-split pairs (j, j + rotary_dim/2).

    llama.cpp's converter interleaves the q and k rows of architecture ``llama``; moving whole rows back is legal on
    quantised bytes. Returns int64 [num_heads * head_dim]: new row i is old row order[i].
    """
    head = np.concatenate([np.arange(0, rotary_dim, 2), np.arange(1, rotary_dim, 2), np.arange(rotary_dim, head_dim)])
    return (np.arange(num_heads)[:, None] * head_dim + head).reshape(-1)


class CheckpointReader:
    """Reads a checkpoint's tensors on the host, checked against the shapes asked for; remembers which were taken."""

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint
        self._taken: set[str] = set()

    def has(self, name: str) -> bool:
        return name in self.checkpoint.tensors

    def vocab_size(self, keys: Hyperparameters) -> int:
        """Rows of the token embedding; the metadata's own number and the vocabulary, where given, must fit."""
        info = self.checkpoint.tensors.get("token_embd.weight")
        rows = info.shape[0] if info is not None else keys.integer("vocab_size")
        tokens = self.checkpoint.metadata.get(key := "tokenizer.ggml.tokens", ())
        if isinstance(tokens, str) or not isinstance(tokens, Sequence):
            raise ConfigError(
                f"{place(self.checkpoint.metadata, key)}{key} is {tokens!r}",
                rule="it must be an array of strings, one for each token",
                remedy="The file is damaged or was converted wrongly; convert it again",
            )
        num_tokens = len(tokens)
        if keys.integer("vocab_size", rows) != rows or num_tokens > rows:
            keys.refuse(
                "vocab_size",
                f"vocab_size {keys.integer('vocab_size', rows)} and {num_tokens} tokens, with {rows} embedding rows",
                "there are vocab_size rows, and one for every token; more are padding",
                "The file's metadata and tensors disagree; convert it again",
            )
        return rows

    def checked_info(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
        """Where a tensor lies, now taken. Raises ConfigError if it is missing or misshapen."""
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

    def host_matrix(self, name: str, shape: tuple[int, ...]) -> Weight:
        """A tensor in plane layout, in host memory. Raises ConfigError if it is missing or misshapen."""
        info = self.checked_info(name, shape)
        return repack(self.checkpoint.data(name), info.ggml_type, shape[-1])

    def host_vector(self, name: str, size: int) -> Tensor:
        """A norm's weight, a bias or RoPE factors, float32 [size], in host memory."""
        weight = self.host_matrix(name, (size,))
        if weight.ggml_type not in ("F32", "F16", "BF16"):
            raise ConfigError(
                f"tensor {name} is {weight.ggml_type}",
                rule="one-dimensional tensors are F32, F16 or BF16",
                remedy="Convert the checkpoint again",
            )
        return weight.planes[0].reshape(-1).float()

    def refuse_untaken(self) -> None:
        """Raise if the file holds a tensor that no one asked for: it would change the result and be dropped."""
        left = sorted(set(self.checkpoint.tensors) - self._taken)
        if left:
            shown = ", ".join(left[:5]) + (f" and {len(left) - 5} more" if len(left) > 5 else "")
            raise ConfigError(
                f"tensors {shown} are in the file",
                rule="this architecture's adapter has no place for them, and drops nothing silently",
                remedy="The file is of another architecture or variant; report it",
            )


class TensorSource(CheckpointReader):
    """Hands an adapter its weights on a device, repacked so that a kernel can load them 16 bytes at a time.

    Args:
        checkpoint: what to read.
        device: where weights go.
        progress: called with the number of the file's bytes that each upload finished.
        batch_invariant: whether the model's products are to be.
        fused: whether norms, activations and additions run within the products.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: Device,
        progress: Callable[[int], None] | None = None,
        *,
        batch_invariant: bool = False,
        fused: bool = True,
    ):
        super().__init__(checkpoint)
        self.device, self.batch_invariant, self.fused = device, batch_invariant, fused
        self._progress = progress or (lambda num_bytes: None)

    def _upload(self, weight: Weight, label: str) -> Weight:
        resident = resident_form(weight, self.device.torch_device)
        planes = tuple(self._place(plane, label) for plane in resident.planes)
        return Weight(resident.ggml_type, planes, resident.shape)

    def _place(self, tensor: Tensor, label: str) -> Tensor:
        """On the CPU the repacked planes stay where they are: nobody else holds them."""
        on_host = self.device.torch_device.type == "cpu"
        return self.device.upload(tensor, label=label, borrow=on_host).tensor

    def _done(self, *names: str) -> None:
        self._progress(sum(self.checkpoint.tensors[name].nbytes for name in names))

    def vector(self, name: str, size: int) -> Tensor:
        """A norm's weight, float32 [size], with 1 added where the file stores weights less 1."""
        vector = self._place(self.host_vector(name, size) + self.checkpoint.norm_offset, name)
        self._done(name)
        return vector

    def matrix(self, name: str, rows: int, columns: int) -> Weight:
        """A weight [rows, columns], as quantised as it was stored."""
        weight = self._upload(self.host_matrix(name, (rows, columns)), name)
        self._done(name)
        return weight

    def projection(
        self,
        prefix: str,
        rows: dict[str, int],
        columns: int,
        *,
        bias: bool | dict[str, int] = False,
        row_order: np.ndarray | None = None,
    ) -> Projection:
        """Projections of one input stacked along their outputs, in the order of ``rows``: name -> number of rows.

        Args:
            prefix: of the tensors ``<prefix><name>.weight`` [rows, columns] and ``<prefix><name>.bias`` [rows].
            rows, columns: the shapes.
            bias: whether each has one; or their own names and sizes, where those are not the weights'.
            row_order: int64 [all rows], which stored row comes where; it moves no row out of its tensor.
        """
        weight_names = [f"{prefix}{name}.weight" for name in rows]
        bias_sizes = {f"{prefix}{name}.bias": size for name, size in (rows if bias is True else bias or {}).items()}
        parts: list[Weight] = []
        start = 0
        for name, num_rows in zip(weight_names, rows.values(), strict=True):
            part = self.host_matrix(name, (num_rows, columns))
            if row_order is not None:
                part = part.take_rows(torch.from_numpy(row_order[start : start + num_rows] - start))
            start += num_rows
            if parts and parts[-1].ggml_type == part.ggml_type:
                parts[-1] = Weight.concat_rows([parts[-1], part])
            else:
                parts.append(part)
        label = f"{prefix}{{{','.join(rows)}}}"
        stacked_bias = None
        if bias_sizes:
            biases = torch.cat([self.host_vector(name, size) for name, size in bias_sizes.items()])
            stacked_bias = self._place(biases if row_order is None else biases[torch.from_numpy(row_order)], label)
        uploaded = [self._upload(part, label) for part in parts]
        projection = Projection(uploaded, stacked_bias, batch_invariant=self.batch_invariant, fused=self.fused)
        self._done(*weight_names, *bias_sizes)
        return projection

    def qkv(self, prefix: str, config: ModelConfig) -> Projection:
        """Queries, keys and values, from ``attn_q``, ``attn_k``, ``attn_v`` or from ``attn_qkv``, as the file has them.

        Rows that the file stores as interleaved rotary pairs come out half-split, unless they are rotated as they are.
        """
        head_dim = config.head_dim
        sizes = {
            "attn_q": config.num_heads * head_dim,
            "attn_k": config.num_kv_heads * head_dim,
            "attn_v": config.num_kv_heads * head_dim,
        }
        fused = {"attn_qkv": sum(sizes.values())}
        row_order = None
        if self.checkpoint.interleaved_rope_rows and not config.rope_interleaved:
            if config.qk_norm:
                raise ConfigError(
                    "a norm on each head of q and k, whose rows are stored as interleaved pairs",
                    rule="the norms' weights have the order of the rows, so these stay as they are",
                    remedy="Declare rope_interleaved in the adapter",
                )
            row_order = np.arange(fused["attn_qkv"])
            rotated = unpair_rows(config.num_heads + config.num_kv_heads, head_dim, head_dim)  # such files rotate all
            row_order[: len(rotated)] = rotated
        rows = fused if self.has(f"{prefix}attn_qkv.weight") else sizes
        biases = fused if self.has(f"{prefix}attn_qkv.bias") else sizes
        return self.projection(
            prefix, rows, config.hidden_size, bias=biases if config.qkv_bias else False, row_order=row_order
        )

    def gate_up(self, prefix: str, config: ModelConfig) -> Projection:
        """The feed-forward's gate, then its up projection: from ``ffn_gate`` and ``ffn_up``, or both in ``ffn_up``."""
        inner = config.intermediate_size
        separate = {"ffn_gate": inner, "ffn_up": inner}
        rows = separate if self.has(f"{prefix}ffn_gate.weight") else {"ffn_up": 2 * inner}
        return self.projection(prefix, rows, config.hidden_size, bias=config.ffn_bias)
