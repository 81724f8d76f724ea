"""A checkpoint's forward pass in float64 from the bytes of its file, for comparison with the running model.

The gguf package dequantises the weights, and their rows keep the file's order: interleaved rotary pairs are rotated as
interleaved pairs. So the model under test shares no repacking, joining, row order, upload or kernel with it. Both share
the configuration, the rotary tables and the formulas of ``kernels.reference``.
"""

from __future__ import annotations

import gguf
import numpy as np

from rooflama.kernels import reference
from rooflama.loaders.checkpoint import Checkpoint
from rooflama.models import ModelConfig, rope_tables
from rooflama.models.rope.spec import RopeSpec, choose_factor_set

ROWS = 4096  # of a matrix, dequantised at a time


class Definition:
    """Layers and logits of one checkpoint, for a sequence that starts at position 0.

    Args:
        checkpoint: open; its tensors are read as they are needed.
        config: as the adapter read it.
        num_tokens: of the sequence.
    """

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig, num_tokens: int):
        self.checkpoint, self.config = checkpoint, config
        self.tables = {spec: _tables(spec, num_tokens) for spec in (config.rope, config.local_rope) if spec is not None}
        self.positions = np.arange(num_tokens)

    def vector(self, name: str) -> np.ndarray:
        return self._rows(name, 0, 1).reshape(-1)

    def _rows(self, name: str, start: int, stop: int) -> np.ndarray:
        kind = gguf.GGMLQuantizationType[self.checkpoint.tensors[name].ggml_type]
        return gguf.quants.dequantize(self.checkpoint.data(name)[start:stop], kind).astype(np.float64)

    def product(self, x: np.ndarray, stem: str) -> np.ndarray:
        """x [n, columns] -> x Wᵀ + bias [n, rows]."""
        name, bias = f"{stem}.weight", f"{stem}.bias"
        total = self.checkpoint.tensors[name].shape[0]
        parts = [x @ self._rows(name, start, min(start + ROWS, total)).T for start in range(0, total, ROWS)]
        y = np.concatenate(parts, axis=-1)
        return y + self.vector(bias) if bias in self.checkpoint.tensors else y

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        return reference.rms_norm(x, self.vector(name) + self.checkpoint.norm_offset, self.config.rms_norm_eps)

    def embed(self, token_ids: list[int]) -> np.ndarray:
        """float64 [num_tokens, hidden_size]."""
        rows = [self._rows("token_embd.weight", token, token + 1) for token in token_ids]
        return np.concatenate(rows) * self.config.embedding_scale

    def layer(self, index: int, hidden: np.ndarray) -> np.ndarray:
        """Layer ``index``, applied to hidden [num_tokens, hidden_size]."""
        prefix = f"blk.{index}."
        attended = self.attention(index, self.norm(hidden, prefix + "attn_norm.weight"))
        hidden = self.added(hidden, attended, prefix + "post_attention_norm.weight")
        normed = self.norm(hidden, prefix + "ffn_norm.weight")
        up = self.product(normed, prefix + "ffn_up")
        if prefix + "ffn_gate.weight" in self.checkpoint.tensors:
            gate = self.product(normed, prefix + "ffn_gate")
        else:
            gate, up = np.split(up, 2, axis=-1)
        gated = {"silu": reference.swiglu, "gelu_tanh": reference.geglu}[self.config.activation](gate, up)
        return self.added(hidden, self.product(gated, prefix + "ffn_down"), prefix + "post_ffw_norm.weight")

    def added(self, hidden: np.ndarray, values: np.ndarray, norm: str) -> np.ndarray:
        """The residual stream plus ``values``, which are normed and scaled if the config says so."""
        return hidden + self.config.residual_scale * (self.norm(values, norm) if self.config.post_norms else values)

    def attention(self, index: int, normed: np.ndarray) -> np.ndarray:
        config, prefix, num_tokens = self.config, f"blk.{index}.", len(normed)
        if prefix + "attn_qkv.weight" in self.checkpoint.tensors:
            qkv = self.product(normed, prefix + "attn_qkv")
        else:
            qkv = np.concatenate([self.product(normed, prefix + f"attn_{part}") for part in "qkv"], axis=-1)
        heads = qkv.reshape(num_tokens, -1, config.head_dim)
        q, k, v = np.split(heads, [config.num_heads, config.num_heads + config.num_kv_heads], axis=1)
        if config.qk_norm:
            q, k = self.norm(q, prefix + "attn_q_norm.weight"), self.norm(k, prefix + "attn_k_norm.weight")
        if (spec := config.rope_of(index)) is not None:
            interleaved = self.checkpoint.interleaved_rope_rows or config.rope_interleaved
            q, k = (reference.rope(x, *self.tables[spec], self.positions, interleaved=interleaved) for x in (q, k))
        out, _ = reference.attention_prefill(
            q,
            k[None],  # one page as long as the sequence
            v[None],
            np.zeros((1, 1), np.int64),
            np.array([num_tokens]),
            np.array([0, num_tokens]),
            softmax_scale=config.softmax_scale,
            sliding_window=config.sliding_windows[index],
            softcap=config.attention_softcap,
        )
        return self.product(out.reshape(num_tokens, -1), prefix + "attn_output")

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        """[num_tokens, vocab_size], from hidden after the last layer."""
        stem = "token_embd" if self.config.tied_embeddings else "output"
        logits = self.product(self.norm(hidden, "output_norm.weight"), stem) * self.config.logit_scale
        cap = self.config.logit_softcap
        return cap * np.tanh(logits / cap) if cap else logits


def _tables(spec: RopeSpec, num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin for a sequence of ``num_tokens`` tokens."""
    return rope_tables(
        spec,
        num_tokens,
        factor_set=choose_factor_set(spec, num_tokens),
        seq_len=num_tokens if spec.kind == "dynamic" else None,
    )
