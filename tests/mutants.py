"""Does the suite notice? Plants one bug at a time in a copy of the kernels and runs the tests that should fail.

    python tests/mutants.py                every mutant
    python tests/mutants.py norm rope      those of these groups: what stands before the colon of a mutant's name

First every test file named must pass as it is. Then each mutant must make its own fail: exit status 1 if one survives,
runs out of time, or if the text it replaces is no longer there exactly once. Nothing is changed in place.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Mutant(NamedTuple):
    """A bug: in ``file``, ``old`` (there exactly once) becomes ``new``. ``tests``, a file or one test, must fail."""

    name: str  # "group: what is wrong"
    file: str
    old: str
    new: str
    tests: str

    @property
    def group(self) -> str:
        return self.name.partition(":")[0]


MIXED = "tests/kernels/test_sampling_filters.py::test_a_mixture_of_rows_keeps_and_draws_what_the_definition_does"

MUTANTS = [
    Mutant(
        "norm: eps left out",
        "kernels/norm.py",
        "tl.sqrt(tl.sum(x * x, axis=0) / hidden + eps)",
        "tl.sqrt(tl.sum(x * x, axis=0) / hidden)",
        "tests/kernels/test_norm.py",
    ),
    Mutant(
        "norm: mask one short",
        "kernels/norm.py",
        "mask = offs < hidden\n",
        "mask = offs < hidden - 1\n",
        "tests/kernels/test_norm.py",
    ),
    Mutant(
        "norm: row offset in 32 bits",
        "kernels/norm.py",
        "row = tl.program_id(0).to(tl.int64)",
        "row = tl.program_id(0)",
        "tests/kernels/test_norm.py",
    ),
    Mutant(
        "norm: the residual read by the stride of x",
        "kernels/norm.py",
        "residual_ptr + row * residual_stride",
        "residual_ptr + row * x_stride",
        "tests/kernels/test_norm.py",
    ),
    Mutant(
        "norm: the residual's row offset in 32 bits",
        "kernels/norm.py",
        "residual_ptr + row * residual_stride",
        "residual_ptr + row.to(tl.int32) * residual_stride",
        "tests/kernels/test_norm.py",
    ),
    Mutant(
        "norm: the sum stored by the stride of x",
        "kernels/norm.py",
        "total_ptr + row * hidden",
        "total_ptr + row * x_stride",
        "tests/kernels/test_norm.py",
    ),
    Mutant(
        "norm: eps of the definition fifty times too large",
        "kernels/reference/norm.py",
        "dtype.type(eps)",
        "dtype.type(50 * eps)",
        "tests/kernels/test_norm.py",
    ),
    Mutant(
        "norm: the definition's mean over one column too many",
        "kernels/reference/norm.py",
        "np.mean(x * x, axis=-1, keepdims=True)",
        "np.sum(x * x, axis=-1, keepdims=True) / (x.shape[-1] + 1)",
        "tests/kernels/test_norm.py",
    ),
    Mutant(
        "rope: sign of the second of a pair",
        "kernels/rope.py",
        "tl.fma(second, cos, first * sin)",
        "tl.fma(second, cos, -(first * sin))",
        "tests/kernels/test_rope.py",
    ),
    Mutant(
        "rope: pairs of neighbours for halves",
        "kernels/rope.py",
        "second = tl.load(ptrs + (1 if INTERLEAVED else HALF), mask=mask",
        "second = tl.load(ptrs + (1 if INTERLEAVED else HALF - 1), mask=mask",
        "tests/kernels/test_rope.py",
    ),
    Mutant(
        "rope: the norm of a head without its tail",
        "kernels/rope_cache_write.py",
        "        square += tl.sum(tail * tail, axis=1)\n",
        "        square += 0.0\n",
        "tests/kernels/test_rope.py",
    ),
    Mutant(
        "rope: a key's place one slot on",
        "kernels/rope_cache_write.py",
        "place = slot & ((1 << page_shift) - 1)",
        "place = (slot + 1) & ((1 << page_shift) - 1)",
        "tests/kernels/test_rope.py",
    ),
    Mutant(
        "rope: pages of any size taken for pages of 16",
        "kernels/rope_cache_write.py",
        "page_row = (slot >> page_shift) * page_stride",
        "page_row = (slot >> 4) * page_stride",
        "tests/kernels/test_rope.py::test_fused_equals_rope_then_write",
    ),
    Mutant(
        "rope: the place of a scale in 32 bits",
        "kernels/rope_cache_write.py",
        "scale_row = slot * num_kv_heads",
        "scale_row = slot.to(tl.int32) * num_kv_heads",
        "tests/kernels/test_rope.py::test_scales_beyond_int32",
    ),
    Mutant(
        "pages: pages of 128 and 256 taken for pages of 64",
        "kernels/paged_cache.py",
        "page_row = (slot >> page_shift) * page_stride",
        "page_row = (slot >> tl.minimum(page_shift, 6)) * page_stride",
        "tests/kernels/test_paged_cache.py",
    ),
    Mutant(
        "pages: a gather writes past num_keys",
        "kernels/paged_cache.py",
        "seq_len - first_key), num_keys - out_key)",
        "seq_len - first_key), page_size)",
        "tests/kernels/test_paged_cache.py::test_gather_writes_no_more_keys_than_asked_for",
    ),
    Mutant(
        "pages: a write one slot on",
        "kernels/paged_cache.py",
        "place = slot & ((1 << page_shift) - 1)",
        "place = (slot + 1) & ((1 << page_shift) - 1)",
        "tests/kernels/test_paged_cache.py",
    ),
    Mutant(
        "pages: tokens without a slot are written",
        "kernels/paged_cache.py",
        "    if slot >= 0:\n",
        "    if slot >= -1:\n",
        "tests/kernels/test_paged_cache.py",
    ),
    Mutant(
        "pages: the tail of a gather unscaled",
        "kernels/paged_cache.py",
        "scale = tl.load(scale_ptr + scale_row + rows, mask=mask_rows, other=0.0)",
        "scale = tl.where(rows < page_size, tl.load(scale_ptr + scale_row + rows, mask=mask_rows, other=0.0), 1.0)",
        "tests/kernels/test_paged_cache.py",
    ),
    Mutant(
        "pages: a copy backwards",
        "kernels/paged_cache.py",
        "source = tl.load(source_ptr + copy).to(tl.int64) * page_stride\n"
        "    target = tl.load(target_ptr + copy).to(tl.int64) * page_stride",
        "source = tl.load(target_ptr + copy).to(tl.int64) * page_stride\n"
        "    target = tl.load(source_ptr + copy).to(tl.int64) * page_stride",
        "tests/kernels/test_paged_cache.py",
    ),
    Mutant(
        "pages: the sign of a float8 code lost",
        "kernels/paged_common.py",
        "| ((bits >> 24) & 0x80)",
        "| ((bits >> 24) & 0x00)",
        "tests/kernels/test_paged_cache.py",
    ),
    Mutant(
        "attention: causal mask off by one",
        "kernels/attention_common.py",
        "visible = keys[None, :] <= positions[:, None]",
        "visible = keys[None, :] < positions[:, None]",
        "tests/kernels/test_attention_prefill.py",
    ),
    Mutant(
        "attention: window off by one",
        "kernels/attention_common.py",
        "positions[:, None] - keys[None, :] < window",
        "positions[:, None] - keys[None, :] <= window",
        "tests/kernels/test_attention_prefill.py",
    ),
    Mutant(
        "attention: values not rescaled to the new maximum",
        "kernels/attention_common.py",
        'acc = tl.dot(weights, v, acc * decay[:, None], input_precision="ieee")',
        'acc = tl.dot(weights, v, acc, input_precision="ieee")',
        "tests/kernels/test_attention_prefill.py",
    ),
    Mutant(
        "attention: softcap dropped",
        "kernels/attention_common.py",
        "scores = tanh(scores * score_scale)",
        "scores = scores * score_scale",
        "tests/kernels/test_attention_prefill.py",
    ),
    Mutant(
        "attention: page number in 32 bits",
        "kernels/attention_common.py",
        "rows = page * page_stride + slots",
        "rows = page.to(tl.int32) * page_stride + slots",
        "tests/kernels/test_attention_prefill.py::test_offsets_beyond_int32",
    ),
    Mutant(
        "attention: values of quantised pages unscaled",
        "kernels/attention_common.py",
        "weights *= v_scale[None, :]",
        "weights *= 1.0",
        "tests/kernels/test_attention_prefill.py",
    ),
    Mutant(
        "attention: keys of the last tile unscaled",
        "kernels/attention_common.py",
        "scores *= tl.load(k_scale_ptr + scale_rows, mask=mask_keys, other=0.0)[None, :]",
        "k_scale = tl.load(k_scale_ptr + scale_rows, mask=mask_keys, other=0.0)\n"
        "            scores *= tl.where(tile_start + BLOCK_N > end_key, 1.0, k_scale)[None, :]",
        "tests/kernels/test_attention_decode.py",
    ),
    Mutant(
        "attention: values of the last tile unscaled",
        "kernels/attention_common.py",
        "weights *= v_scale[None, :]",
        "weights *= tl.where(tile_start + BLOCK_N > end_key, 1.0, v_scale)[None, :]",
        "tests/kernels/test_attention_prefill.py",
    ),
    Mutant(
        "attention: the place of a scale in 32 bits",
        "kernels/attention_common.py",
        "scale_rows = ((page << page_shift) + slots) * num_kv_heads",
        "scale_rows = ((page << page_shift) + slots).to(tl.int32) * num_kv_heads",
        "tests/kernels/test_attention_decode.py::test_scales_beyond_int32",
    ),
    Mutant(
        "prefill: a stride of query_start_loc overlooked",
        "kernels/attention_prefill.py",
        "    check_last_dim_contiguous(query_start_loc=query_start_loc)\n",
        "",
        "tests/kernels/test_attention_prefill.py::test_bad_input_is_refused_before_a_launch",
    ),
    Mutant(
        "prefill: groups 5, 9 and 12 see one key too few",
        "kernels/attention_prefill.py",
        "positions = query_position + rows // group\n",
        "positions = query_position + rows // group - ((group == 5) | (group == 9) | (group == 12)).to(tl.int32)\n",
        "tests/kernels/test_attention_prefill.py::test_every_group_and_head_dim_equals_definition",
    ),
    Mutant(
        "prefill: wrong head of the group",
        "kernels/attention_prefill.py",
        "heads = kv_head * group + rows % group",
        "heads = kv_head + rows % group * num_kv_heads",
        "tests/kernels/test_attention_prefill.py",
    ),
    Mutant(
        "prefill: queries stand one position late",
        "kernels/attention_prefill.py",
        "query_position = seq_len - (query_end - query_start)",
        "query_position = seq_len - (query_end - query_start) + 1",
        "tests/kernels/test_attention_prefill.py",
    ),
    Mutant(
        "decode: splits merged with equal weights",
        "kernels/attention_decode.py",
        "acc += tl.sum(weights[:, None] * values, axis=0)",
        "acc += tl.sum(tl.sum(weights, axis=0) * values, axis=0)",
        "tests/kernels/test_attention_decode.py",
    ),
    Mutant(
        "decode: the last head of groups 9, 10 and 13 left out",
        "kernels/attention_decode.py",
        "mask_rows = row_in_group < group\n",
        "mask_rows = row_in_group < group - ((group == 9) | (group == 10) | (group == 13)).to(tl.int32)\n",
        "tests/kernels/test_attention_decode.py::test_every_group_and_head_dim_equals_definition",
    ),
    Mutant(
        "decode: the sequence that is merged in 32 bits",
        "kernels/attention_decode.py",
        "sequence = tl.program_id(1).to(tl.int64)",
        "sequence = tl.program_id(1)",
        "tests/kernels/test_attention_decode.py::test_merge_beyond_int32",
    ),
    Mutant(
        "decode: splits overlap by a tile",
        "kernels/attention_decode.py",
        "end = tl.minimum(start + split_tokens, seq_len)",
        "end = tl.minimum(start + split_tokens + BLOCK_N, seq_len)",
        "tests/kernels/test_attention_decode.py",
    ),
    Mutant(
        "decode: window one key wide of the mark",
        "kernels/attention_decode.py",
        "first_key = tl.maximum(seq_len - window, 0)",
        "first_key = tl.maximum(seq_len - window + 1, 0)",
        "tests/kernels/test_attention_decode.py",
    ),
    Mutant(
        "quantised: scale and minimum swapped",
        "kernels/quantized_tiles.py",
        'planes.get("m", planes.get("dmin"))',
        'planes.get("d") if planes.keys() & {"m", "dmin"} else None',
        "tests/kernels/test_dequantize.py",
    ),
    Mutant(
        "quantised: minimum taken from the scale's bits",
        "kernels/quantized_tiles.py",
        "SHIFT: tl.constexpr = 4 if PACKED else 0",
        "SHIFT: tl.constexpr = 0",
        "tests/kernels/test_dequantize.py",
    ),
    Mutant(
        "quantised: high bits one place low",
        "kernels/quantized_tiles.py",
        "HIGH_BITS, BLOCK, BLOCK_K) << LOW_BITS",
        "HIGH_BITS, BLOCK, BLOCK_K) << (LOW_BITS - 1)",
        "tests/kernels/test_dequantize.py",
    ),
    Mutant(
        "quantised: a code's neighbours in the wrong order",
        "kernels/quantized_tiles.py",
        "shift = BITS * (i // 2) + 16 * (i % 2)",
        "shift = BITS * i",
        "tests/kernels/test_dequantize.py",
    ),
    Mutant(
        "gemv: minima added without the activations",
        "kernels/quantized_matmul.py",
        "each_vector(minima, GROUP)[None, :, :] * tl.sum(x, axis=3)",
        "each_vector(minima, GROUP)[None, :, :]",
        "tests/kernels/test_quantized_matmul.py",
    ),
    Mutant(
        "gemv: groups scaled by their squares",
        "kernels/quantized_matmul.py",
        "each_vector(scales, GROUP)[None, :, :]",
        "each_vector(scales * scales, GROUP)[None, :, :]",
        "tests/kernels/test_quantized_matmul.py",
    ),
    Mutant(
        "gemv: the norm's mean over one column too many",
        "kernels/quantized_matmul.py",
        "tl.sum(squares, axis=1) / columns",
        "tl.sum(squares, axis=1) / (columns + 1)",
        "tests/kernels/test_quantized_matmul.py",
    ),
    Mutant(
        "matmul: gate and up swapped",
        "kernels/quantized_tiles.py",
        "column + (lane % 2) * (rows // 2)",
        "column + (1 - lane % 2) * (rows // 2)",
        "tests/kernels/test_quantized_matmul.py",
    ),
    Mutant(
        "matmul: residual dropped",
        "kernels/quantized_tiles.py",
        "total += tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)",
        "total += 0.0",
        "tests/kernels/test_quantized_matmul.py",
    ),
    Mutant(
        "matmul: batch invariance ends with the tokens of dot",
        "kernels/quantized_matmul.py",
        'if not (batch_invariant or num_tokens <= limits["dot"]):',
        'if not (batch_invariant and num_tokens <= 64 or num_tokens <= limits["dot"]):',
        "tests/kernels/test_quantized_matmul.py::test_batch_invariance",
    ),
    Mutant(
        "matmul: row offset of the output in 32 bits",
        "kernels/quantized_tiles.py",
        "tl.store(out_ptr + offs_m[:, None] * rows",
        "tl.store(out_ptr + offs_m.to(tl.int32)[:, None] * rows",
        "tests/kernels/test_quantized_matmul.py::test_output_beyond_int32",
    ),
    Mutant(
        "matmul: residual added twice by the definition",
        "kernels/reference/quantized_matmul.py",
        "out += residual.astype(dtype, copy=False)",
        "out += 2 * residual.astype(dtype, copy=False)",
        "tests/kernels/test_quantized_matmul.py::test_definition_equals_torch",
    ),
    Mutant(
        "dot: columns past the end of x are read",
        "kernels/quantized_matmul.py",
        " & (offs_k < columns)[None, :],\n            other=0.0,\n        )\n        tile = load_tile(",
        ",\n            other=0.0,\n        )\n        tile = load_tile(",
        "tests/kernels/test_quantized_matmul.py::test_quantized_matmul_equals_definition",
    ),
    Mutant(
        "dot: blocks of tokens and of rows in the wrong order",
        "kernels/quantized_matmul.py",
        "tile_rows(tl.program_id(0) // num_blocks_m, rows, BLOCK_N, SWIGLU)",
        "tile_rows(tl.program_id(0) % num_blocks_m, rows, BLOCK_N, SWIGLU)",
        "tests/kernels/test_quantized_matmul.py::test_quantized_matmul_equals_definition",
    ),
    Mutant(
        "dot: only the last step's columns",
        "kernels/quantized_matmul.py",
        'tl.dot(x, tl.trans(tile.to(x.dtype)), acc, input_precision="ieee")',
        'tl.dot(x, tl.trans(tile.to(x.dtype)), input_precision="ieee")',
        "tests/kernels/test_quantized_matmul.py::test_quantized_matmul_equals_definition",
    ),
    Mutant(
        "dot: every block holds the first tokens",
        "kernels/quantized_matmul.py",
        "(tl.program_id(0) % num_blocks_m).to(tl.int64) * BLOCK_M",
        "(tl.program_id(0) % num_blocks_m).to(tl.int64) * 0",
        "tests/kernels/test_quantized_matmul.py::test_quantized_matmul_equals_definition",
    ),
    Mutant(
        "dot: row offset of x in 32 bits",
        "kernels/quantized_matmul.py",
        "(tl.program_id(0) % num_blocks_m).to(tl.int64) * BLOCK_M",
        "(tl.program_id(0) % num_blocks_m) * BLOCK_M",
        "tests/kernels/test_quantized_matmul.py::test_offsets_beyond_int32",
    ),
    Mutant(
        "quantised: row offset of the codes in 32 bits",
        "kernels/quantized_tiles.py",
        "plane_ptr + offs_n[:, None] * words_per_row",
        "plane_ptr + offs_n.to(tl.int32)[:, None] * words_per_row",
        "tests/kernels/test_dequantize.py::test_rows_beyond_int32",
    ),
    Mutant(
        "dequantize: row offset of the output in 32 bits",
        "kernels/dequantize.py",
        "out_ptr + offs_out[:, None] * columns",
        "out_ptr + offs_out.to(tl.int32)[:, None] * columns",
        "tests/kernels/test_dequantize.py::test_output_beyond_int32",
    ),
    Mutant(
        "embedding: row offset of the output in 32 bits",
        "kernels/embedding.py",
        "offs = token * columns",
        "offs = token.to(tl.int32) * columns",
        "tests/kernels/test_embedding.py::test_output_beyond_int32",
    ),
    Mutant(
        "embedding: the row above",
        "kernels/embedding.py",
        "tl.load(token_ids_ptr + token).to(tl.int64)",
        "tl.maximum(tl.load(token_ids_ptr + token).to(tl.int64) - 1, 0)",
        "tests/kernels/test_embedding.py",
    ),
    Mutant(
        "swiglu: gate and up swapped",
        "kernels/mlp.py",
        "out = gate / (1.0 + tl.exp(-gate)) * up",
        "out = up / (1.0 + tl.exp(-up)) * gate",
        "tests/kernels/test_mlp.py",
    ),
    Mutant(
        "sampling: top-k keeps one too many",
        "kernels/sampling_filters.py",
        "bound = tl.load(limit_ptr + row).to(tl.float32)",
        "bound = tl.load(limit_ptr + row).to(tl.float32) + (0.0 if WEIGHTED else 1.0)",
        "tests/kernels/test_sampling_filters.py",
    ),
    Mutant(
        "sampling: top-p weighs what top-k dropped",
        "kernels/sampling_filters.py",
        "(image >= tl.load(floor_ptr + row).to(tl.uint32, bitcast=True))",
        "(image >= (0 if WEIGHTED else tl.load(floor_ptr + row).to(tl.uint32, bitcast=True)))",
        MIXED,
    ),
    Mutant(
        "sampling: top-p at temperature 1",
        "kernels/sampling_filters.py",
        "_relative(logits, largest, tl.load(temperature_ptr + row))",
        "_relative(logits, largest, 1.0)",
        MIXED,
    ),
    Mutant(
        "sampling: min-p dropped beside top-k or top-p",
        "kernels/sampling.py",
        "            if MIN_P:\n",
        "            if MIN_P and not FLOOR:\n",
        MIXED,
    ),
    Mutant(
        "sampling: temperature ignored",
        "kernels/sampling_filters.py",
        "(logits - largest) / temperature)",
        "(logits - largest) / 1.0)",
        "tests/kernels/test_sampling.py",
    ),
    Mutant(
        "sampling: padding is looked at",
        "kernels/sampling_filters.py",
        "    mask = offs < vocab_size\n",
        "    mask = offs < vocab_size + 1\n",
        "tests/kernels/test_sampling.py",
    ),
    Mutant(
        "gemv: only the last tile of columns counts",
        "kernels/quantized_matmul.py",
        "acc += sums",
        "acc = sums",
        "tests/kernels/test_quantized_matmul.py::test_quantized_matmul_equals_definition",
    ),
    Mutant(
        "embedding: only the first block of columns",
        "kernels/embedding.py",
        "step = tl.program_id(1)",
        "step = tl.program_id(1) * 0",
        "tests/kernels/test_embedding.py",
    ),
    Mutant(
        "decode: only the last splits are merged",
        "kernels/attention_decode.py",
        "acc += tl.sum(weights[:, None] * values, axis=0)",
        "acc = tl.sum(weights[:, None] * values, axis=0)",
        "tests/kernels/test_attention_edges.py",
    ),
    Mutant(
        "decode: the running maximum starts at 0",
        "kernels/attention_decode.py",
        'row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)',
        "row_max = tl.full([BLOCK_M], 0.0, tl.float32)",
        "tests/kernels/test_attention_edges.py",
    ),
    Mutant(
        "prefill: the running maximum starts at 0",
        "kernels/attention_prefill.py",
        'row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)',
        "row_max = tl.full([BLOCK_M], 0.0, tl.float32)",
        "tests/kernels/test_attention_edges.py",
    ),
    Mutant(
        "attention: a row without keys is not set to 0",
        "kernels/attention_common.py",
        "tl.where(unseen[:, None], 0.0, acc / tl.where(unseen, 1.0, total)[:, None])",
        "acc / tl.where(unseen, 1.0, total)[:, None]",
        "tests/kernels/test_attention_edges.py",
    ),
    Mutant(
        "attention: K/V heads taken to fill a place in a page",
        "kernels/attention_common.py",
        "slots.to(tl.int64) * slot_stride",
        "slots.to(tl.int64) * num_kv_heads * HEAD_DIM",
        "tests/kernels/test_strides.py",
    ),
    Mutant(
        "pages: v read by the strides of k",
        "kernels/paged_cache.py",
        "v_ptr + token * v_token_stride, v_head_stride,",
        "v_ptr + token * k_token_stride, k_head_stride,",
        "tests/kernels/test_strides.py",
    ),
    Mutant(
        "pages: heads gathered as if nothing lay between them",
        "kernels/paged_cache.py",
        "places * place_stride + heads * head_stride",
        "places * num_kv_heads * HEAD_DIM + heads * HEAD_DIM",
        "tests/kernels/test_strides.py",
    ),
    Mutant(
        "pages: only the first block of a page is copied",
        "kernels/paged_cache.py",
        "offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)",
        "offs = tl.arange(0, BLOCK)",
        "tests/kernels/test_strides.py",
    ),
    Mutant(
        "rope: v read by the stride of k",
        "kernels/rope_cache_write.py",
        "v_ptr + token * v_token_stride",
        "v_ptr + token * k_token_stride",
        "tests/kernels/test_strides.py",
    ),
    Mutant(
        "sampling: seen read by the stride of the logits",
        "kernels/sampling_filters.py",
        "seen_ptr + row * seen_stride",
        "seen_ptr + row * logits_stride",
        "tests/kernels/test_strides.py",
    ),
]


def copy_tree(target: Path) -> None:
    """The package as an importable ``rooflama`` folder, and the tests beside it."""
    ignored = shutil.ignore_patterns("__pycache__", ".hypothesis", ".pytest_cache")
    shutil.copytree(ROOT / "rooflama", target / "rooflama", ignore=ignored)
    for room in ("kernels", "models", "loaders"):
        shutil.copytree(ROOT / room, target / "rooflama" / room, ignore=ignored)
    shutil.copytree(ROOT / "tests", target / "tests", ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", target)
    # The ci profile's examples, without the time that shrinking a failure takes.
    with (target / "tests" / "conftest.py").open("a") as conftest:
        phases = "[Phase.explicit, Phase.generate]"
        conftest.write(f'\nsettings.register_profile("mutants", settings.get_profile("ci"), phases={phases})\n')
        conftest.write('settings.load_profile("mutants")\n')


def run_tests(tree: Path, tests: str, seconds: float) -> tuple[int | None, str]:
    """(pytest's exit status, None if time ran out; the first failure or the last line)."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", tests]
    try:
        done = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return None, f"no answer in {seconds:.0f} s"
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or [""]
    failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return done.returncode, (failures or lines[-1:])[0]


def kill(mutant: Mutant, seconds: float) -> tuple[str, str, float]:
    """(verdict, why, seconds) of one mutant."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        tree = Path(folder)
        copy_tree(tree)
        path = tree / "rooflama" / mutant.file
        text = path.read_text()
        if text.count(mutant.old) != 1:
            return "stale", f"{text.count(mutant.old)} places match in {mutant.file}", time.perf_counter() - start
        path.write_text(text.replace(mutant.old, mutant.new))
        status, reason = run_tests(tree, mutant.tests, seconds)
    if status is not None and status < 0:
        status, reason = 1, f"died on signal {-status}"
    verdict = {0: "SURVIVED", 1: "killed", None: "SLOW"}.get(status, "BROKEN")
    return verdict, reason.split(" - ")[0], time.perf_counter() - start


def passes(tests: str, seconds: float) -> tuple[bool, str]:
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        copy_tree(Path(folder))
        status, reason = run_tests(Path(folder), tests, seconds)
    return status == 0, reason


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    groups = sorted({mutant.group for mutant in MUTANTS})
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"of {', '.join(groups)}; all by default")
    parser.add_argument("--seconds", type=float, default=600, help="time limit of one test run")
    parser.add_argument("--no-baseline", action="store_true", help="trust that the tests pass as they are")
    options = parser.parse_args()
    if unknown := set(options.groups) - set(groups):
        parser.error(f"unknown groups {sorted(unknown)}; there are {', '.join(groups)}")
    chosen = [mutant for mutant in MUTANTS if mutant.group in (options.groups or groups)]

    with ThreadPoolExecutor(2) as pool:
        if not options.no_baseline:
            files = sorted({mutant.tests.split("::")[0] for mutant in chosen})
            for tests, (passed, reason) in zip(
                files, pool.map(lambda tests: passes(tests, options.seconds), files), strict=True
            ):
                if not passed:
                    print(f"{tests} fails without a mutant: {reason}", file=sys.stderr)
                    return 1
        survivors = 0
        for mutant, (verdict, reason, seconds) in zip(
            chosen, pool.map(lambda mutant: kill(mutant, options.seconds), chosen), strict=True
        ):
            survivors += verdict != "killed"
            print(f"{verdict:9} {seconds:5.0f} s  {mutant.name:52} {reason}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} killed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
