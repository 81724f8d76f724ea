"""The terms of a memory plan: one function each, its formula first.

Letters: L layers, E hidden size, F feed-forward width, Hq and Hkv query and key/value heads, D head size, d rotary
size, V vocabulary, T tokens of context per sequence, S sequences, P tokens per page, n tokens of a prefill pass, b
bytes per activation, c bytes per stored element of keys and values, R ranks. All results are in bytes, of one rank: L,
F, Hq and Hkv are those of its share, V and E are whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from rooflama.kernels import LAYOUTS
from rooflama.kernels.all_reduce import most_bytes
from rooflama.kernels.attention_decode import most_splits
from rooflama.kernels.launch import configuration
from rooflama.kernels.quantized_matmul import most_tokens, rows_per_pass
from rooflama.kernels.quantized_wgmma_ends import has_blocks, scratch_bytes
from rooflama.kernels.reference.attention import ROWS
from rooflama.kernels.sampling import CHUNK
from rooflama.kernels.sampling_filters import LEVELS

from ..config import ModelConfig
from ..decoder import LOGITS_ROWS
from ..kv_cache import is_scaled, ring_pages
from ..serving.passes import MOST_SEQUENCES
from .weights import Matrix

DIGIT_BITS = 32 // LEVELS
ANY_GPU = torch.device("cpu")  # the launch table's rows for products are the same on all GPUs where they matter here
WORKSPACE_BYTES = configuration("matmul", ANY_GPU)["WORKSPACE_BYTES"]

Moment = Mapping[str, int]  # name of a term -> bytes alive at one moment

FORMULAS = {
    "prefill activations": "n b (3 E + 2 (Hq + Hkv) D + 3 F)",
    "dequantised rows": f"b rows columns, {WORKSPACE_BYTES >> 20} MiB at most",
    "products in parts": "4 splits n rows, if several, + 2.125 n columns",
    "gathered keys and values": "2 x 4 T Hkv D",
    "attention scores": f"3 x 4 Hq min(n, {ROWS}) T",
    "logits and sampling": f"4 max(S, min(n, {LOGITS_ROWS})) (1.125 V + E)",
    "penalties and log probabilities": "8 S V",
    "split-KV partials": "4 S Hq splits (D + 1)",
    "decode activations": "S b (3 E + 2 (Hq + Hkv) D + 3 F)",
    "matmul library": "cuBLAS's workspace, allocated through torch",
    "sums over ranks": "n b E (1 + R)",
    "logits of all ranks": "4 S V (1 + 1 / R)",
    "captured prompt passes": "the terms above for the largest captured pass",
    "captured results": "n b E of the largest captured pass",
}
"""The formula of each term of a moment; if moments differ, that of the most common one."""

ROTARY_FORMULAS = {
    "default": "2 x 4 x tokens x rotary_dim / 2",
    "longrope": "2 x 4 x tokens x rotary_dim / 2, for each factor set",
    "dynamic": "32 x tokens of a pass and a step x rotary_dim / 2",
}
"""By the kind of scaling; other kinds have the default's."""


def rotary_formula(config: ModelConfig) -> str:
    """The formula of ``rope_table_bytes``."""
    formula = ROTARY_FORMULAS.get(config.rope.kind, ROTARY_FORMULAS["default"])
    return formula + (
        "" if config.local_rope is None else ", and 2 x 4 x tokens x rotary_dim / 2 for layers with a window"
    )


def kv_token_bytes(config: ModelConfig, kv_dtype: torch.dtype) -> int:
    """2 L Hkv (D c + 4): keys and values of one token in all layers; the 4 bytes are the scale of int8 and fp8."""
    head = config.head_dim * kv_dtype.itemsize + (4 if is_scaled(kv_dtype) else 0)
    return 2 * config.num_layers * config.num_kv_heads * head


def pages_per_sequence(config: ModelConfig, context: int, page_size: int, max_append: int) -> int:
    """ceil(T / P), and at most ``kv_cache.ring_pages``."""
    return min(-(-context // page_size), ring_pages(config, page_size, max_append))


def kv_allocations(config: ModelConfig, kv_dtype: torch.dtype, num_pages: int, page_size: int) -> list[int]:
    """The size of each pool, in ``PagedKVCache``'s order: keys and values of each layer, then their scales."""
    elements = num_pages * page_size * config.num_kv_heads
    pools = [elements * config.head_dim * kv_dtype.itemsize] * (2 * config.num_layers)
    return pools + [elements * 4] * (2 * config.num_layers) * is_scaled(kv_dtype)


def rope_table_bytes(config: ModelConfig, context: int, pass_tokens: int, sequences: int) -> int:
    """2 x 4 T d / 2 (cos and sin in float32), twice that for LongRoPE's two lists, and once more for a local rotation.

    Dynamic scaling has no tables and takes 32 (n + S) d / 2 at any context: cos and sin of the tokens of a pass and of
    a step, and the float64 angles that they are computed from.
    """
    pairs = config.rope.rotary_dim // 2
    local = 2 * 4 * context * (config.local_rope.rotary_dim // 2) if config.local_rope is not None else 0
    if config.rope.kind == "dynamic":
        return 32 * (pass_tokens + sequences) * pairs + local
    return 2 * 4 * (2 if config.rope.kind == "longrope" else 1) * context * pairs + local


def block_table_bytes(context: int, sequences: int, page_size: int) -> int:
    """4 (2 S + 32) ceil(T / P): int32, one table each for a prefill pass, a decode step and captured passes."""
    return 4 * (2 * sequences + MOST_SEQUENCES) * -(-context // page_size)


def logits_bytes(config: ModelConfig, sequences: int) -> int:
    """4 S V (1 + 1/8) + 4 S E: float32 logits of each sequence's last token, the sums over them for top-k and top-p,
    and the float32 row of the residual stream that they are computed from.
    """
    search = LEVELS * 2**DIGIT_BITS / CHUNK
    return 4 * sequences * (int(config.vocab_size * (1 + search)) + config.hidden_size)


def split_kv_bytes(config: ModelConfig, context: int, sequences: int) -> int:
    """4 S Hq (splits (D + 1) + 1): attention's partial values and log-sums, and the counters of the decode slots."""
    splits = most_splits(context, config.num_kv_heads)
    return 4 * sequences * config.num_heads * (splits * (config.head_dim + 1) + 1)


def carried_bytes(config: ModelConfig, tokens: int, itemsize: int) -> int:
    """n b (2 E + 2 (Hq + Hkv) D): the tensors that live throughout a layer: the residual stream before and after
    attention, q, k, v, and the output of attention.
    """
    heads = 2 * (config.num_heads + config.num_kv_heads) * config.head_dim
    return tokens * itemsize * (2 * config.hidden_size + heads)


def dequantised_bytes(
    matrices: Iterable[Matrix], tokens: int, dtype: torch.dtype, batch_invariant: bool = False
) -> int:
    """b rows columns: the run of rows that a product of many tokens dequantises at a time, at most WORKSPACE_BYTES.

    0 for products that are batch-invariant or of few tokens, and for weights in the dtype of the activations.
    """
    worst = 0
    if batch_invariant:
        return worst
    for matrix in matrices:
        layout = LAYOUTS[matrix.ggml_type]
        few = tokens <= most_tokens(layout, ANY_GPU)["dot"]
        if few or (layout.is_float and getattr(torch, layout.planes[0].dtype) == dtype):
            continue
        rows = min(matrix.rows, rows_per_pass(matrix.columns, dtype.itemsize, ANY_GPU))
        worst = max(worst, rows * matrix.columns * dtype.itemsize)
    return worst


def rank_sum_bytes(config: ModelConfig, tokens: int, itemsize: int, ranks: int) -> int:
    """n b E (1 + R): a rank's addend, and the addends gathered from all. n b E where the vendor's library reduces."""
    if ranks == 1:
        return 0
    addend = tokens * itemsize * config.hidden_size
    gathered = addend <= most_bytes(ranks, ANY_GPU)["GATHER_BYTES"]
    return addend * (1 + ranks * gathered)


def rank_logits_bytes(config: ModelConfig, sequences: int, ranks: int) -> int:
    """4 S V (1 + 1 / R): float32 logits of the rank's own tokens, and those gathered, before they stand in order."""
    return 0 if ranks == 1 else 4 * sequences * (config.vocab_size + -(-config.vocab_size // ranks))


def product_scratch_bytes(matrices: Iterable[Matrix], tokens: int, batch_invariant: bool = False) -> int:
    """4 splits N rows + 2.125 N columns: the partial sums and arranged activations of a product of 3 to 64 tokens.

    A product that is not split has no partial sums. N is the next of 8, 16, 32, 64; for the output matrix twice that,
    since its normed activations are not rounded. Batch-invariant products of any number of tokens take as much for the
    tokens of a slice. Planned on every GPU, though only Hopper computes products this way.
    """
    worst = 0
    for m in matrices:
        layout = LAYOUTS[m.ggml_type]
        most = most_tokens(layout, ANY_GPU)
        served = batch_invariant or most["fixed_point"] < tokens <= most["wgmma"]
        if served and has_blocks(layout, m.columns):
            worst = max(worst, scratch_bytes(m.rows, m.columns, tokens, 1 + m.of_vocabulary, layout, None))
    return worst


def prefill_moments(
    config: ModelConfig,
    matrices: Iterable[Matrix],
    tokens: int,
    sequences: int,
    dtype: torch.dtype,
    ranks: int,
    batch_invariant: bool = False,
) -> list[Moment]:
    """The terms of the widest moments of a prefill pass of n tokens, on Triton kernels:

    gate and up  carried + n b (E + 3 F) + dequantised rows: gate, up and the result of SwiGLU
    down         carried + n b (E + F) + dequantised rows
    ranks meet   carried + n b E + the addends of all ranks

    With 3 to 64 tokens, or batch-invariant products, ``product_scratch_bytes`` instead of dequantised rows.
    """
    matrices = list(matrices)
    layer = [matrix for matrix in matrices if not matrix.of_vocabulary]
    output = [matrix for matrix in matrices if matrix.of_vocabulary]
    carried, unit = carried_bytes(config, tokens, dtype.itemsize), tokens * dtype.itemsize
    narrow = [matrix for matrix in layer if matrix.columns == config.hidden_size]
    wide = [matrix for matrix in layer if matrix.columns == config.intermediate_size]
    hidden, width = config.hidden_size, config.intermediate_size
    return [
        {
            "prefill activations": carried + unit * (hidden + 3 * width),
            "dequantised rows": dequantised_bytes(narrow, tokens, dtype, batch_invariant),
            "products in parts": product_scratch_bytes(narrow, tokens, batch_invariant),
        },
        {
            "prefill activations": carried + unit * (hidden + width),
            "dequantised rows": dequantised_bytes(wide, tokens, dtype, batch_invariant),
            "products in parts": product_scratch_bytes(wide, tokens, batch_invariant),
        },
        _meeting(config, carried, tokens, dtype.itemsize, ranks),
        _scoring(config, output, tokens, sequences, ranks, batch_invariant),
    ]


def _meeting(config: ModelConfig, carried: int, tokens: int, itemsize: int, ranks: int) -> Moment:
    return {
        "prefill activations": carried + tokens * itemsize * config.hidden_size,
        "sums over ranks": rank_sum_bytes(config, tokens, itemsize, ranks),
    }


def _scoring(
    config: ModelConfig,
    output: Iterable[Matrix],
    tokens: int,
    sequences: int,
    ranks: int,
    batch_invariant: bool = False,
) -> Moment:
    rows = max(sequences, min(tokens, LOGITS_ROWS))
    return {
        "logits and sampling": logits_bytes(config, rows),
        "products in parts": product_scratch_bytes(output, rows, batch_invariant),
        "logits of all ranks": rank_logits_bytes(config, rows, ranks),
    }


def definition_moments(
    config: ModelConfig, tokens: int, context: int, sequences: int, itemsize: int, ranks: int
) -> list[Moment]:
    """The same on the NumPy definitions, which read weights as float32 rows and store attention scores:

    attention    carried + 2 n b Hq D + keys and values 2 x 4 T Hkv D + scores 3 x 4 Hq min(n, 256) T
    feed-forward carried + n b (E + 5 F)
    """
    carried, unit = carried_bytes(config, tokens, itemsize), tokens * itemsize
    heads = config.num_heads * config.head_dim
    return [
        {
            "prefill activations": carried + 2 * unit * heads,
            "gathered keys and values": 2 * 4 * context * config.num_kv_heads * config.head_dim,
            "attention scores": 3 * 4 * config.num_heads * min(tokens, ROWS) * context,
        },
        {"prefill activations": carried + unit * (config.hidden_size + 5 * config.intermediate_size)},
        _meeting(config, carried, tokens, itemsize, ranks),
        _scoring(config, [], tokens, sequences, ranks),
    ]


def decode_moment(config: ModelConfig, context: int, sequences: int, dtype: torch.dtype, ranks: int) -> Moment:
    """A decode step of S tokens: activations S b (3 E + 2 (Hq + Hkv) D + 3 F), split-KV partials, logits.

    8 S V more are planned for penalties and log probabilities, whether or not a request uses them: int32 counts, and a
    second row of logits.
    """
    unit = sequences * dtype.itemsize
    return {
        "decode activations": carried_bytes(config, sequences, dtype.itemsize)
        + unit * (config.hidden_size + 3 * config.intermediate_size),
        "split-KV partials": split_kv_bytes(config, context, sequences),
        "logits and sampling": logits_bytes(config, sequences),
        "penalties and log probabilities": 8 * sequences * config.vocab_size,
        "sums over ranks": rank_sum_bytes(config, sequences, dtype.itemsize, ranks),
        "logits of all ranks": rank_logits_bytes(config, sequences, ranks),
    }
